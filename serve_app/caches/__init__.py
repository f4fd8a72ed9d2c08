"""What a start compiles and measures, kept for the next one, and carried to other machines."""
