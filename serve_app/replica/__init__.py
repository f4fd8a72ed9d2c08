"""One replica: the engine's processes, the application that serves it, and its supervisor."""
