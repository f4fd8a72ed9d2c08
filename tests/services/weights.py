"""A daemon in place of vLLM's, which holds no weights: it answers once it has "loaded"."""

import os
import socket
import time
from pathlib import Path


def serve(folder: Path, rank: int) -> None:
    """Listen as vLLM's daemon does. What is in the file `behaviour` makes it fail or hang first."""
    behaviour = folder / "behaviour"
    if behaviour.exists():
        if behaviour.read_text() == "fail":
            raise RuntimeError("no memory for the weights")
        time.sleep(600)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / f"{rank}.sock"))
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(str(os.getpid()).encode())


def ask(path: Path, timeout_s: float = 1.0) -> int:
    """The pid of the daemon, which answered."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        connection.connect(str(path))
        if answer := connection.recv(32):
            return int(answer)
        raise ConnectionError("it ended")
