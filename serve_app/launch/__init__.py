"""`python -m serve_app serve | doctor`: starts Ray Serve, checks the machine, cleans up."""
