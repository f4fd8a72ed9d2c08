"""How many replicas there should be: the policy, the signals it reads, Ray Serve's entry point."""
