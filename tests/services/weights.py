"""A daemon in place of vLLM's, which holds no weights: it answers once it has "loaded"."""

import os
import socket
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path


def serve(folder: Path, rank: int) -> None:
    """Listen as vLLM's daemon does. What is in the file `behaviour` makes it fail or hang first."""
    path = folder / "behaviour"
    behaviour = path.read_text() if path.exists() else ""
    if behaviour == "fail":
        raise RuntimeError("no memory for the weights")
    if behaviour == "hang":
        time.sleep(600)
    if behaviour == "share":
        _share_memory()
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


def _share_memory() -> None:
    """As the ranks of one engine do. Of the descriptors below, one has the number of another that
    this process had from its parent."""
    open_files = [os.open(os.devnull, os.O_RDONLY) for _ in range(64)]
    memory = SharedMemory(create=True, size=8)
    memory.close()
    memory.unlink()
    for each in open_files:
        os.close(each)
