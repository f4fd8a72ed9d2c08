"""Layouts of a host's GPUs: one engine over several of them (TP), or a replica on each.

Which layouts there are for a number of GPUs and a choice of systems, and which GPUs each gets.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from bench.engine import systems
from bench.errors import BenchError


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """A system on a number of GPUs.

    Attributes:
        system: a name of `bench.engine.systems`.
        variant, engine: a name, and the engine arguments that it stands for.
    """

    tensor_parallel: int
    replicas: int = 1
    system: str = "ours"
    variant: str = ""
    engine: dict[str, Any] = {}

    @property
    def gpus(self) -> int:
        return self.tensor_parallel * self.replicas

    @property
    def name(self) -> str:
        """The same for each system."""
        if self.replicas > 1:
            return f"{self.replicas} replicas"
        return f"TP={self.tensor_parallel} {self.variant}".rstrip()

    @property
    def title(self) -> str:
        return f"{self.name} of {self.system}"


def splits(gpus: int) -> list[tuple[int, int]]:
    """(TP, replicas): one GPU, then each power of two as TP and as replicas, and all of them."""
    sizes = [2**power for power in range(1, gpus.bit_length()) if 2**power <= gpus]
    if gpus > 1 and gpus not in sizes:
        sizes.append(gpus)
    return [(1, 1), *(split for size in sizes for split in ((size, 1), (1, size)))]


def layouts(
    gpus: int,
    names: Sequence[str] = ("ours",),
    variants: Mapping[str, dict[str, Any]] | None = None,
    only: Sequence[str] = (),
) -> list[Layout]:
    """The layouts to measure, those of one split next to each other.

    Replicas are of this application alone, and have no variants.

    Args:
        names: of systems.
        only: names of layouts; all where it is empty.

    Raises:
        BenchError: a system or a layout of that name does not exist.
    """
    for name in names:
        if name not in systems.NAMES:
            raise BenchError.of("systems", name, "no such system", systems.NAMES)
    plain: tuple[str, dict[str, Any]] = ("", {})
    every = [
        Layout(tensor_parallel=parallel, replicas=many, system=name, variant=variant, engine=more)
        for parallel, many in splits(gpus)
        for variant, more in ([plain, *(variants or {}).items()] if many == 1 else [plain])
        for name in names
        if many == 1 or systems.is_ours(name)
    ]
    names_of_all = list(dict.fromkeys(layout.name for layout in every))
    for name in only:
        if name not in names_of_all:
            raise BenchError.of("only", name, "no such layout", names_of_all)
    return [layout for layout in every if not only or layout.name in only]


def placed(wanted: Sequence[Layout], gpus: int) -> list[list[int]]:
    """Which GPUs each layout gets if all stand at once, so that the fullest has the fewest weights.

    Returns indices from 0 to `gpus` - 1.
    """
    used = [0.0] * gpus
    places: list[list[int]] = [[] for _ in wanted]
    for index in sorted(range(len(wanted)), key=lambda i: -wanted[i].gpus):
        order = sorted(range(gpus), key=lambda place: used[place])
        places[index] = sorted(order[: wanted[index].gpus])
        for place in places[index]:
            used[place] += 1 / wanted[index].tensor_parallel
    return places
