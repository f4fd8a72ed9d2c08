"""The checks of preflight, by subject; each returns its lines."""
