"""The rows of the dashboard, one module each, in the order in which an operator asks them."""

from serve_app.monitoring.rows import causes, cost, fast, full, healthy, tenants

ROWS = (healthy.ROW, fast.ROW, full.ROW, cost.ROW, tenants.ROW, causes.ROW)
