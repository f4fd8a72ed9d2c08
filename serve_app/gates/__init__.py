"""What a request passes before the engine: who asks, how much, and is there room."""
