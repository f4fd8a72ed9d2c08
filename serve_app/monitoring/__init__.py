"""What Prometheus and Grafana are given: rules, dashboards, and what to do when an alert fires."""
