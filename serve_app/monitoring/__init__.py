"""Rules for Prometheus, a dashboard for Grafana, a status page, and runbooks of the alerts."""
