"""What the hardware allows a setting: the rate that it cannot exceed, and its expected gain."""

import math

import msgspec

from bench.engine.knobs import Settings
from bench.hardware import roofline
from bench.hardware.roofline import Ceilings, Shape


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """Of an average request of the load, in tokens.

    Attributes:
        read: of the prompt, without those that the prefix cache has.
        written: of the answer.
    """

    read: float
    written: float


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds the speed of an engine before it is tried.

    Attributes:
        shape, ceilings: None where the machine was not measured.
        step_s: the shortest step that was measured, that of a batch of one.
        seqs, tokens: vLLM's own limits of a batch.
    """

    shape: Shape | None = None
    ceilings: Ceilings | None = None
    step_s: float = 0.0
    seqs: int = 256
    tokens: int = 2048

    def requests_per_s(self, lengths: Lengths, settings: Settings) -> float:
        """The rate that a setting cannot exceed under any load."""
        tokens = int(settings.get("max_num_batched_tokens") or self.tokens)
        seqs = min(int(settings.get("max_num_seqs") or self.seqs), tokens)
        least_s = max(self.step_s, self._read_s(lengths, settings, seqs))
        bounds = [math.inf]
        if least_s > 0:
            # A sequence gets one token a step, and a step has room for a limited number of tokens.
            bounds.append(seqs / (lengths.written * least_s))
            bounds.append(tokens / ((lengths.read + lengths.written) * least_s))
        if hardware_s := self._hardware_s(lengths, settings, seqs):
            bounds.append(1 / max(hardware_s))
        return min(bounds)

    def worth(self, lengths: Lengths, settings: Settings) -> float:
        """By which factor the hardware lets a setting be faster than the defaults, roughly."""
        seqs = min(self.seqs, 128)  # A batch that is neither small nor beyond what fits.
        mine = self._hardware_s(lengths, settings, seqs)
        default = self._hardware_s(lengths, {}, seqs)
        return sum(default) / sum(mine) if mine and default else 1.0

    def _shape_and_ceilings(self, settings: Settings) -> tuple[Shape, Ceilings] | None:
        if self.shape is None or self.ceilings is None:
            return None
        shape, ceilings = self.shape, self.ceilings
        if settings.get("quantization") == "fp8":
            shape = msgspec.structs.replace(shape, weight_bytes=1.0)
            ceilings = msgspec.structs.replace(ceilings, flops_per_s=2 * ceilings.flops_per_s)
        if str(settings.get("kv_cache_dtype", "")).startswith("fp8"):
            shape = msgspec.structs.replace(shape, kv_bytes=1.0)
        return shape, ceilings

    def _read_s(self, lengths: Lengths, settings: Settings, seqs: int) -> float:
        """The least time of a step that generates one token for each of this many sequences."""
        hardware = self._shape_and_ceilings(settings)
        if hardware is None:
            return 0.0
        shape, ceilings = hardware
        return roofline.decode(shape, seqs, lengths.read).least_s(ceilings)

    def _hardware_s(
        self, lengths: Lengths, settings: Settings, seqs: int
    ) -> tuple[float, float] | None:
        """Of one request in a batch of `seqs`: the least time to compute, and to read memory."""
        hardware = self._shape_and_ceilings(settings)
        if hardware is None:
            return None
        shape, ceilings = hardware
        prompt = roofline.prefill(shape, lengths.read)
        step = roofline.decode(shape, seqs, lengths.read)
        flops = prompt.flops + lengths.written * step.flops / seqs
        memory = lengths.written * step.bytes / seqs
        return flops / ceilings.flops_per_s, memory / ceilings.bytes_per_s
