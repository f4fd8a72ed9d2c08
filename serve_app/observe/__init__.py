"""What is measured, logged and traced of each request."""
