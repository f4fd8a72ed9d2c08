"""Which replica gets a request: a pure policy over what the gateway knows of each replica.

    prefix_keys(prompt) -> keys           the beginning of a prompt, one key for each block
    Router.choose(candidates, keys, session) -> Choice
    Router.forget(name)                   the replica's KV cache is lost

`PrefixRouter` sends a request to the replica that has cached most of its prompt, because an engine
does not compute cached tokens again, and prefill is most of the time to a first token. The basis is
power of two choices on outstanding tokens. Affinity takes precedence within a bound, in this order:

    session   the session's replica
    prefix    the replica with the longest prefix of the prompt; of several, the least busy
    balance   the less busy of two random replicas

A replica above `factor` times the mean load, plus a few requests, is not chosen. (Without these
few requests no replica of an idle fleet could get a second one.) So a prefix that needs more than
one replica spreads to others, which hold it from then on. Weighing the saved prefill against the
wait was tried; it left hot prefixes on too few replicas, without a gain.

The router assumes what a replica has cached: a prompt that was sent to it, and that later prompts
have not displaced. A wrong assumption, or two prompts with one key, costs a repeated prefill and
never a wrong answer. The other routers exist for comparison.

Not thread-safe: for one event loop. With the same `random.Random` the choices are the same.
"""

import random
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Literal

from serve_app.errors import nearest

BLOCK_BYTES = 512
# What an engine's KV cache holds, as text: about a million tokens (a 7B model on 80 GB).
HELD_BYTES = 4 << 20

# Of a session only its replica is remembered, so that these are some 200 bytes each.
_MAX_SESSIONS = 10_000
# A replica whose requests seem to cost so many times those of the median replica counts as one with
# less, where the mean of all is taken.
_ODD = 16
# A replica that is no candidate may only have failed once, or be what a retry leaves out. One that
# was none at two looks, so many decisions apart, is gone.
_LOOK_EVERY = 1000

Reason = Literal["session", "prefix", "spread", "busy", "balance", "blind"]


@dataclass(slots=True)
class Candidate:
    """A replica that may be chosen. Its owner keeps it up to date; a router only reads it.

    Attributes:
        name: of the replica, never used again for another one.
        outstanding: tokens that were sent to it and are not answered yet: of prompts those that it
            is still to read, and of answers those that are expected. At least 0.
        requests: that were sent to it and are not answered yet.
    """

    name: str
    outstanding: int
    requests: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Where to, and why.

    Attributes:
        name: of the replica.
        reason: "session" and "prefix" are affinity; "spread" left a short match to make another
            holder of it; "busy" would have been affinity but for the bound; "balance" had nobody
            to follow; "blind" is of routers that look at nothing.
        shared: bytes of the prompt that the replica is believed to hold.
    """

    name: str
    reason: Reason
    shared: int = 0


def prefix_keys(
    prompt: bytes, block_bytes: int = BLOCK_BYTES, max_keys: int = 256, of: str | None = None
) -> tuple[int, ...]:
    """A chain: key i stands for bytes 0 to (i + 1) * `block_bytes`; a last, shorter block has none.

    Two prompts have keys in common only where `of` is the same too: the name of model or adapter.
    The chain ends after `max_keys` blocks: a longer common prefix changes no choice. Python's own
    hash is the fastest one here, and its secret keeps clients from constructing two prompts with
    the same key. So keys are valid in this process only.
    """
    keys = []
    key = hash(of)
    for end in range(block_bytes, min(len(prompt), max_keys * block_bytes) + 1, block_bytes):
        key = hash((key, prompt[end - block_bytes : end]))
        keys.append(key)
    return tuple(keys)


class Router(ABC):
    @abstractmethod
    def choose(
        self, candidates: Sequence[Candidate], keys: Sequence[int], session: str | None
    ) -> Choice:
        """The replica for one request, which is taken to be sent there.

        Args:
            candidates: replicas that may be chosen, at least one.
            keys: what its prompt begins with, by `prefix_keys`.
            session: what the client calls the conversation that it belongs to.

        Raises:
            ValueError: there is no candidate.
        """

    def forget(self, name: str) -> None:  # noqa: B027 - most remember nothing.
        """The KV cache of this replica is gone."""


class PrefixRouter(Router):
    """The module's docstring says how.

    Args:
        rng: draws the two of power of two choices, and settles ties.
        held_bytes: of prompts that a replica's KV cache holds, roughly its tokens times 4. Once to
            twice as much is remembered of what was sent there last: to follow what was lost lately
            costs no more than to go elsewhere, and keeps prefixes where they are.
        factor: how much busier than the mean a replica may be and still be followed; at least 1.
        slack_requests: that it may have besides, each of as many tokens as those under way have.
        spread: how often a match of less than half of the prompt is not followed. Without it all
            that begins with one system prompt would stay on the replica that had it first, as long
            as that one has time, and the KV caches of the others would stay empty.
        max_keys: remembered of all replicas together, at some 100 bytes each.
        block_bytes: as `prefix_keys` was given.
    """

    def __init__(
        self,
        rng: random.Random,
        held_bytes: int = HELD_BYTES,
        factor: float = 1.5,
        slack_requests: float = 3.0,
        spread: float = 0.125,
        max_keys: int = 1 << 18,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        if not factor >= 1 or not slack_requests >= 0:
            raise ValueError(
                f"{factor=}, {slack_requests=}: could be below what the least busy has"
            )
        self._rng = rng
        self._factor = factor
        self._slack_requests = slack_requests
        self._spread = spread
        self._block_bytes = block_bytes
        self._max_keys = max_keys
        self._held_keys = min(held_bytes // block_bytes, max_keys // 2)
        self._memories: dict[str, _Memory] = {}
        self._sessions: OrderedDict[int, str] = OrderedDict()
        self._decisions = 0
        self.keys = 0

    def choose(
        self, candidates: Sequence[Candidate], keys: Sequence[int], session: str | None
    ) -> Choice:
        _refuse_none(candidates)
        self._look(candidates)
        limit = self._limit(candidates)
        # The least busy is never above it, so that there is at least one.
        idle = [candidate for candidate in candidates if candidate.outstanding <= limit]
        chosen, reason = self._affine(idle, keys, session)
        if chosen is None:
            if reason == "balance" and len(idle) < len(candidates):
                busy = [candidate for candidate in candidates if candidate.outstanding > limit]
                reason = "balance" if self._affine(busy, keys, session)[1] == "balance" else "busy"
            chosen = _less_busy_of_two(idle, self._rng)
        shared = self.shared(chosen.name, keys)
        self._remember(chosen.name, keys, session)
        return Choice(chosen.name, reason, shared)

    def shared(self, name: str, keys: Sequence[int]) -> int:
        """Bytes of a prompt that a replica is believed to hold."""
        memory = self._memories.get(name)
        return memory.depth(keys) * self._block_bytes if memory is not None else 0

    def forget(self, name: str) -> None:
        memory = self._memories.pop(name, None)
        if memory is not None:
            self.keys -= memory.size

    # Affinity.

    def _limit(self, candidates: Sequence[Candidate]) -> float:
        """The most outstanding tokens of one that is not too busy."""
        each = sorted(
            replica.outstanding / replica.requests for replica in candidates if replica.requests
        )
        # One estimate that is far off must not make everybody else look idle.
        highest = _ODD * each[(len(each) - 1) // 2] if each else 0.0
        tokens, requests = 0.0, 0
        for candidate in candidates:
            tokens += min(candidate.outstanding, highest * candidate.requests)
            requests += candidate.requests
        slack_tokens = self._slack_requests * tokens / max(requests, 1)
        limit = self._factor * (tokens / len(candidates)) + slack_tokens
        return max(limit, min(candidate.outstanding for candidate in candidates))

    def _affine(
        self, candidates: Sequence[Candidate], keys: Sequence[int], session: str | None
    ) -> tuple[Candidate | None, Reason]:
        """The replica that affinity selects, or None with the reason."""
        home = self._sessions.get(hash(session)) if session is not None else None
        if home is not None:
            for candidate in candidates:
                if candidate.name == home:
                    return candidate, "session"
        holders, depth = self._holders(candidates, keys)
        if not holders:
            return None, "balance"
        if 2 * depth < len(keys) and self._rng.random() < self._spread:
            return None, "spread"
        return _least(holders, [holder.outstanding for holder in holders], self._rng), "prefix"

    def _holders(
        self, candidates: Sequence[Candidate], keys: Sequence[int]
    ) -> tuple[list[Candidate], int]:
        """Those that hold the longest part of the prompt, and how many blocks that is."""
        holders: list[Candidate] = []
        depth = 0
        if not keys:
            return holders, depth
        memories, last = self._memories, keys[0]
        for candidate in candidates:
            memory = memories.get(candidate.name)
            # Most hold less than the best so far, and this loop is most of the time of a decision.
            if memory is None or (last not in memory.young and last not in memory.old):
                continue
            here = memory.depth(keys, depth or 1)
            if here > depth:
                holders, depth, last = [candidate], here, keys[here - 1]
            else:
                holders.append(candidate)
        return holders, depth

    # Memory.

    def _remember(self, name: str, keys: Sequence[int], session: str | None) -> None:
        if session is not None:
            # A header may be long: its hash is not.
            key = hash(session)
            self._sessions[key] = name
            self._sessions.move_to_end(key)
            if len(self._sessions) > _MAX_SESSIONS:
                self._sessions.popitem(last=False)
        if not keys:
            return
        memory = self._memories.get(name)
        if memory is None:
            memory = self._memories[name] = _Memory()
        before = memory.size
        memory.remember(keys, self._held_keys)
        self.keys += memory.size - before
        while self.keys > self._max_keys:
            largest = max(self._memories.values(), key=lambda memory: memory.size)
            before = largest.size
            largest.age()
            self.keys += largest.size - before

    def _look(self, candidates: Sequence[Candidate]) -> None:
        """Now and then, forget replicas that are gone."""
        self._decisions += 1
        if self._decisions % _LOOK_EVERY:
            return
        here = {candidate.name for candidate in candidates}
        for name, memory in list(self._memories.items()):
            if name in here:
                memory.missed = False
            elif memory.missed:
                self.forget(name)
            else:
                memory.missed = True


class _Memory:
    """The prefixes that were sent to one replica last, those used least recently lost first.

    Two generations: what is used is put into the young one; when that is full it becomes the old
    one, and the old one is dropped. Coarser than a queue by last use, with less memory and time.
    All of a chain is put in at once, so that with a key those before it are in one of the two, too:
    that is what lets `depth` search.
    """

    __slots__ = ("missed", "old", "young")

    def __init__(self) -> None:
        self.young: set[int] = set()
        self.old: set[int] = set()
        self.missed = False

    @property
    def size(self) -> int:
        return len(self.young) + len(self.old)

    def depth(self, keys: Sequence[int], least: int = 1) -> int:
        """How many of the first keys it has; 0 where they are fewer than `least`, which is > 0."""
        young, old = self.young, self.old
        if least > len(keys) or (keys[least - 1] not in young and keys[least - 1] not in old):
            return 0
        # In longer and longer steps, as most hold no more than the least, then by halves.
        low, high, step = least, len(keys), 1
        while low + step <= high:
            if keys[low + step - 1] not in young and keys[low + step - 1] not in old:
                high = low + step - 1
                break
            low += step
            step *= 2
        while low < high:
            middle = (low + high + 1) // 2
            if keys[middle - 1] in young or keys[middle - 1] in old:
                low = middle
            else:
                high = middle - 1
        return low

    def remember(self, keys: Sequence[int], max_keys: int) -> None:
        """Put a chain in, of which the first `max_keys` count; so many are a generation."""
        keys = keys[:max_keys]
        if len(self.young) + len(keys) > max_keys:
            self.age()
        self.young.update(keys)

    def age(self) -> None:
        self.old, self.young = self.young, set()


class PowerOfTwo(Router):
    """The less busy of two that are drawn: nearly the least busy, and several gateways with old
    news do not all go to the same one."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(
        self, candidates: Sequence[Candidate], keys: Sequence[int], session: str | None
    ) -> Choice:
        _refuse_none(candidates)
        return Choice(_less_busy_of_two(candidates, self._rng).name, "balance")


class Least(Router):
    """The one with the least of something.

    Args:
        of: what is compared: outstanding tokens, or requests under way, however long they are:
            what proxies do.
    """

    def __init__(self, of: Callable[[Candidate], int], rng: random.Random) -> None:
        self._of, self._rng = of, rng

    def choose(
        self, candidates: Sequence[Candidate], keys: Sequence[int], session: str | None
    ) -> Choice:
        _refuse_none(candidates)
        return Choice(_least(candidates, [*map(self._of, candidates)], self._rng).name, "balance")


class RoundRobin(Router):
    """One after the other; the first one is drawn, or all gateways would begin with the same."""

    def __init__(self, rng: random.Random) -> None:
        self._turn = rng.randrange(1 << 16)

    def choose(
        self, candidates: Sequence[Candidate], keys: Sequence[int], session: str | None
    ) -> Choice:
        _refuse_none(candidates)
        self._turn += 1
        return Choice(candidates[self._turn % len(candidates)].name, "blind")


class Random(Router):
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(
        self, candidates: Sequence[Candidate], keys: Sequence[int], session: str | None
    ) -> Choice:
        _refuse_none(candidates)
        return Choice(self._rng.choice(candidates).name, "blind")


ROUTERS: dict[str, Callable[[random.Random], Router]] = {
    "prefix": PrefixRouter,
    "power_of_two": PowerOfTwo,
    "least_outstanding": partial(Least, attrgetter("outstanding")),
    "least_connections": partial(Least, attrgetter("requests")),
    "round_robin": RoundRobin,
    "random": Random,
}


def make(name: str, rng: random.Random) -> Router:
    """The router of that name, as it is by default.

    Raises:
        ValueError: there is none; names the nearest.
    """
    return find(name)(rng)


def find(name: str) -> Callable[[random.Random], Router]:
    """The factory of the router of that name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    if name not in ROUTERS:
        near = nearest(name, ROUTERS)
        hint = f"; did you mean {near}?" if near is not None else ""
        raise ValueError(f"no such routing policy{hint} (there are {', '.join(ROUTERS)})")
    return ROUTERS[name]


def _refuse_none(candidates: Sequence[Candidate]) -> None:
    if not candidates:
        raise ValueError("no candidates")


def _less_busy_of_two(candidates: Sequence[Candidate], rng: random.Random) -> Candidate:
    count = len(candidates)
    if count == 1:
        return candidates[0]
    pick = int(rng.random() * count)
    # Any but the first one, each as likely.
    other = (pick + 1 + int(rng.random() * (count - 1))) % count
    first, second = candidates[pick], candidates[other]
    return second if second.outstanding < first.outstanding else first


def _least(candidates: Sequence[Candidate], loads: Sequence[int], rng: random.Random) -> Candidate:
    """Of several with the least load one that is drawn, or the first replica would get more."""
    least = min(loads)
    if loads.count(least) == 1:
        return candidates[loads.index(least)]
    return rng.choice(
        [candidate for candidate, load in zip(candidates, loads, strict=True) if load == least]
    )
