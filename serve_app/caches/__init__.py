"""Caches of what a start compiles and measures, for the next start and for other machines."""
