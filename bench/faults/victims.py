"""Which processes may be disturbed: those of one Ray cluster on this machine, by their titles.

    cluster = of_url("http://127.0.0.1:8000")        # the cluster that listens there
    cluster = Cluster(session="session_2026-...")     # every raylet of that session
    cluster = Cluster(pids=[4711])                    # what is below these processes

The process tree is read each time, because killed processes are replaced. Processes outside its
roots are never returned, whatever their titles: a second cluster of the same machine, an engine
that lost its parent, this process itself. A process is identified by its id and its start time, so
a later process with the same id is not mistaken for it. With `template: true` a raylet has a
stand-in for each worker (serve_app/replica/worker.py), and the worker counts as below it.

A replica is ready once it answers HTTP on its own port, which it does when its engine has loaded.
Any answer counts, because a replica may require a secret, except its own errors (5xx). With
`up="process"`, for processes without HTTP, only the age counts.
"""

import contextlib
import http.client
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from bench.errors import BenchError

# By the titles of a replica's processes, what is part of its engine.
PARTS = {
    "core": re.compile(r"VLLM::EngineCore"),
    "worker": re.compile(r"VLLM::Worker"),
    "frontend": re.compile(r"(.*/)?vllm-rs$"),
    "any": re.compile(r"VLLM::(EngineCore|Worker)|(.*/)?vllm-rs$"),
}
# What a stand-in calls itself.
_STAND_IN = re.compile(r"for (\d+)")
_ANY = ("0.0.0.0", "::")  # "::" takes IPv4 as well.
_ANSWER_S = 3.0  # A replica under full load on a busy machine takes a second.


class ClusterError(BenchError):
    """The processes that may be disturbed cannot be determined, or there are none."""


@dataclass(frozen=True)
class Raylet:
    """One node of the cluster."""

    process: psutil.Process
    node_id: str
    name: str
    head: bool

    def is_(self, node: str) -> bool:
        """Whether `node` means this one: its name, its process id, or how its node id begins."""
        by_id = len(node) >= 6 and self.node_id.startswith(node)
        return node in (self.name, str(self.process.pid)) or by_id


@dataclass(frozen=True)
class Replica:
    """A replica of a deployment, with the processes of its engine: core first."""

    process: psutil.Process
    title: str
    engine: tuple[psutil.Process, ...] = ()

    def part(self, part: str) -> list[psutil.Process]:
        """Processes of its engine: `core`, `worker`, `frontend` (vllm-rs), or `any`."""
        return [process for process in self.engine if PARTS[part].match(title(process))]


@dataclass
class Cluster:
    """The processes of one Ray cluster, below its roots. Not for use by two threads at once."""

    pids: Sequence[int] = ()
    session: str = ""
    _roots: list[psutil.Process] = field(default_factory=list, init=False)
    _ports: dict[psutil.Process, int] = field(default_factory=dict, init=False)
    _ready_s: dict[psutil.Process, float] = field(default_factory=dict, init=False)
    _struck_s: dict[psutil.Process, float] = field(default_factory=dict, init=False)
    _lost: dict[psutil.Process, set[psutil.Process]] = field(default_factory=dict, init=False)
    _had_engine: set[psutil.Process] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        if not (self.pids or self.session):
            raise ClusterError("pid, session: one of them must say whose processes these are")
        for pid in self.pids:
            try:
                self._roots.append(psutil.Process(pid))
            except psutil.NoSuchProcess:
                raise ClusterError.of("pid", pid, "no such process") from None
        if os.getpid() in {process.pid for process in self._tree()}:
            raise ClusterError.of("pid", self.pids, "bench itself is below that")

    # --- what is there ----------------------------------------------------------------------

    def raylets(self) -> list[Raylet]:
        """Its nodes on this machine, the oldest first."""
        raylets = [
            Raylet(process, _argument(words, "node_id"), _argument(words, "node-name"), head)
            for process in self._tree()
            if (words := _raylet(process))
            for head in ["--head" in words]
        ]
        return sorted(raylets, key=lambda raylet: raylet.process.create_time())

    def replicas(self, deployment: str) -> list[Replica]:
        """The replicas of a deployment ("application:deployment"), the oldest first."""
        name = f"ray::ServeReplica:{deployment}"
        return [
            Replica(process, title(process), tuple(_engine(process)))
            for process in self._titled(name)
        ]

    def controllers(self) -> list[Replica]:
        """The controller of Ray Serve."""
        return [Replica(p, title(p)) for p in self._titled("ray::ServeController")]

    def ready(self, replicas: Iterable[Replica], up: str, settle_s: float) -> list[Replica]:
        """Those that have been ready for `settle_s`, as far as anybody looked."""
        replicas = list(replicas)
        running = [replica for replica in replicas if _runs(replica) and self._has_engine(replica)]
        answering = {r.process for r in running} if up == "process" else self._answering(running)
        ready = []
        for replica in replicas:
            process, now_s = replica.process, time.monotonic()
            if process not in answering:
                self._ready_s.pop(process, None)
                continue
            since_s = self._ready_s.setdefault(process, now_s)
            if up == "process":
                since_s = now_s - (time.time() - process.create_time())
            if now_s - since_s >= settle_s:
                ready.append(replica)
        return ready

    def strike(self, replica: psutil.Process) -> None:
        """Note that a replica or its engine was killed: it may answer for a while yet."""
        self._struck_s[replica] = time.monotonic()
        self._lost[replica] = set(_engine(replica))

    def rested(self, replica: Replica, rest_s: float) -> bool:
        """Whether it was struck longer than `rest_s` ago, or never."""
        struck_s = self._struck_s.get(replica.process)
        return struck_s is None or time.monotonic() - struck_s > rest_s

    # --- how --------------------------------------------------------------------------------

    def _has_engine(self, replica: Replica) -> bool:
        """Whether it has all that it had: one that was struck, only with a newer engine."""
        process, engine = replica.process, replica.engine
        if engine:
            self._had_engine.add(process)
        if (lost := self._lost.get(process)) is not None:
            return any(part not in lost for part in engine)
        return bool(engine) or process not in self._had_engine

    def _tree(self) -> list[psutil.Process]:
        """The roots and all below them; a session's roots are its raylets."""
        roots = self._roots
        if self.session:
            roots = [
                process
                for process in psutil.process_iter()
                if _argument(_raylet(process), "session-name") == self.session
            ]
        processes: dict[psutil.Process, None] = {}
        for root in roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                if root.is_running():
                    processes |= dict.fromkeys(family(root))
        return list(processes)

    def _titled(self, name: str) -> list[psutil.Process]:
        """By title; Ray adds ".method" to it while a method runs."""
        wanted = re.compile(re.escape(name) + r"([. (]|$)")
        processes = [p for p in self._tree() if wanted.match(title(p)) and p.pid != os.getpid()]
        return sorted(processes, key=_started_s)

    def _answering(self, replicas: Iterable[Replica]) -> set[psutil.Process]:
        """The processes that answer HTTP. Once a port has answered, only that port is asked, as
        long as it is there: that of vllm-rs is another one after a restart.
        """
        doors = []
        for process in (replica.process for replica in replicas):
            addresses = list(_listens(process))
            last_answered = [each for each in addresses if each[1] == self._ports.get(process)]
            doors += [(process, host, port) for host, port in last_answered or addresses]
        # All at once, because a loading replica delays its answer.
        with ThreadPoolExecutor(max_workers=len(doors) or 1) as pool:
            answered = pool.map(lambda door: _answers(door[1], door[2]), doors)
            answering = {door[0]: door[2] for door, yes in zip(doors, answered, strict=True) if yes}
        self._ports |= answering
        return set(answering)


def of_url(url: str) -> Cluster:
    """The cluster whose proxy or replica listens on the port of `url`, on this machine.

    Raises:
        ClusterError: nothing does, or it belongs to no raylet.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if not _is_local(parts.hostname or ""):
        raise ClusterError.of("url", url, "is not this machine: what is there cannot be disturbed")
    for connection in psutil.net_connections("tcp"):
        if connection.status != psutil.CONN_LISTEN or connection.pid is None:
            continue
        if not connection.laddr or connection.laddr.port != port:
            continue
        for raylet in filter(_raylet, psutil.process_iter()):
            with contextlib.suppress(psutil.NoSuchProcess):
                if connection.pid in {process.pid for process in family(raylet)}:
                    return Cluster(session=_argument(_raylet(raylet), "session-name"))
    problem = "no process of a Ray cluster listens there: say whose with --pid or --session"
    raise ClusterError.of("url", url, problem)


def family(root: psutil.Process) -> list[psutil.Process]:
    """A process and all below it, with the workers that its stand-ins are for."""
    processes = [root, *root.children(recursive=True)]
    for process in processes:  # It grows meanwhile.
        with contextlib.suppress(psutil.NoSuchProcess):
            if stand_in := _STAND_IN.fullmatch(process.name()):
                worker = psutil.Process(int(stand_in[1]))
                processes += [worker, *worker.children(recursive=True)]
    return list(dict.fromkeys(processes))


def title(process: psutil.Process) -> str:
    """The first word of its command line, which is what a process calls itself; "" if it ended."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        words = process.cmdline()
        return words[0].strip() if words else ""
    return ""


def _engine(replica: psutil.Process) -> list[psutil.Process]:
    try:
        below = replica.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    engines = [process for process in below if PARTS["any"].match(title(process))]
    return sorted(engines, key=lambda p: (not PARTS["core"].match(title(p)), _started_s(p)))


def _runs(replica: Replica) -> bool:
    """Whether it is alive, and neither it nor its engine was stopped."""
    still = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE)
    try:
        return all(p.status() not in still for p in (replica.process, *replica.engine))
    except psutil.NoSuchProcess:
        return False


def _raylet(process: psutil.Process) -> list[str]:
    """The command line of a raylet; empty if it is none."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        words: list[str] = process.cmdline()
        if words and Path(words[0]).name == "raylet":
            return words
    return []


def _argument(words: Sequence[str], name: str) -> str:
    begins = f"--{name}="
    return next((word[len(begins) :] for word in words if word.startswith(begins)), "")


def _started_s(process: psutil.Process) -> float:
    """When it began, by the clock of the machine; 0 if it has ended."""
    try:
        return float(process.create_time())
    except psutil.NoSuchProcess:
        return 0.0


def _listens(process: psutil.Process) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                address = connection.laddr
                yield "127.0.0.1" if address.ip in _ANY else address.ip, address.port


def _answers(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=_ANSWER_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _is_local(host: str) -> bool:
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    interfaces = psutil.net_if_addrs().values()
    own = {address.address for addresses in interfaces for address in addresses}
    return bool(addresses & own)
