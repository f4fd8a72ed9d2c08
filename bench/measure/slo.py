"""Service level objectives: which latencies count as good enough."""

import math
from collections.abc import Mapping

import msgspec

from bench import spec
from bench.errors import BenchError
from bench.measure.latency import e2e_s, tpot_s, ttft_s
from bench.records import Record


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """A service level objective: `percentile` % of requests within every limit that is given.

    A request must keep all limits at once, which is a little stricter than each percentile on its
    own. An answer of one token keeps any limit on `tpot_s`.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    percentile: float = 99.0

    def used(self, record: Record) -> float:
        """The greatest share that a request used of a limit: above 1 it missed the objective.

        Infinite for a failure, for an odd answer, and where what is limited is not known.
        """
        if not record.ok or record.odd:
            return math.inf
        return self.share(record, 0.0 if record.output_tokens == 1 else tpot_s(record))

    def share(self, record: Record, tpot: float | None) -> float:
        """The greatest share of a limit that a success used, with this time between its tokens."""
        pairs = ((self.ttft_s, ttft_s(record)), (self.tpot_s, tpot), (self.e2e_s, e2e_s(record)))
        return max(
            (math.inf if took is None else took / limit for limit, took in pairs if limit),
            default=0.0,
        )

    def met_by(self, record: Record) -> bool:
        return self.used(record) <= 1


# Named for the scenarios of MLPerf Inference.
SLOS: Mapping[str, Slo] = {
    "mlperf-server": Slo(ttft_s=2.0, tpot_s=0.1),
    "mlperf-interactive": Slo(ttft_s=0.5, tpot_s=0.03),
}


def parse_slo(text: str) -> Slo:
    """A preset, or limits: "ttft_ms=500,tpot_ms=30,e2e_ms=5000,percentile=95", any of them.

    Raises BenchError, which names the key, its value and the nearest valid choice.
    """
    keys = ("ttft_ms", "tpot_ms", "e2e_ms", "percentile")
    kinds = {**dict.fromkeys(SLOS, ()), "limits": keys}
    options = spec.parse(text, "slo", kinds, BenchError, unnamed="limits")
    if options.name in SLOS:
        return SLOS[options.name]
    limits_ms = [options.number_or_none(key, above=0.0) for key in keys[:3]]
    if not any(limits_ms):
        raise BenchError.of("slo", text, f"limits nothing: give one of {', '.join(keys[:3])}")
    ttft, tpot, e2e = (None if limit is None else limit / 1000 for limit in limits_ms)
    percentile = options.number("percentile", 99.0, minimum=1.0, maximum=99.99)
    return Slo(ttft_s=ttft, tpot_s=tpot, e2e_s=e2e, percentile=percentile)
