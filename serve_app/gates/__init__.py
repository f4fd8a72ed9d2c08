"""The gates that a request passes before the engine: keys, limits, admission."""
