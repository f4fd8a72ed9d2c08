"""What a replica is, decided before it starts: hardware, the model's size, placement."""
