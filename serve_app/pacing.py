"""When several tokens of a stream are sent in one event.

Each token sent on its own costs the front end an event to encode, a write, and the proxy a copy.
While the front end keeps up, every token is sent at once. Once it falls behind, the engine's
outputs wait for it anyway: sending two of them in one event then delays no stream, and frees time
for the others. So the gap between two events of one stream follows a measured lag: the age of the
engine's outputs when the front end handles them, or in the gateway, which does not know their age,
the lag of its event loop. Neither the load nor the concurrency is configured, and the gap returns
to zero with the load.
"""

import asyncio
from typing import NoReturn

# An output that waits this long is scheduling noise, not a front end that falls behind.
_TOLERATED_LAG_S = 0.002
# How fast the estimate follows: about 16 engine steps. Bursts pass, a load does not.
_WEIGHT = 1 / 16
# Gap per second of lag beyond the tolerance.
_GAIN = 2.0
# How often the lag of an event loop is measured.
_PERIOD_S = 0.005


class Pacer:
    """The gap that one replica's streams keep between two events, seconds.

    Args:
        max_gap_s: bound of the gap; 0 sends every token at once.
    """

    def __init__(self, max_gap_s: float) -> None:
        self.max_gap_s = max_gap_s
        self.lag_s = 0.0
        self.gap_s = 0.0

    def observe(self, lag_s: float) -> None:
        """Take note that an engine output waited `lag_s` before the front end read it."""
        self.lag_s += (lag_s - self.lag_s) * _WEIGHT
        self.gap_s = min(max(self.lag_s - _TOLERATED_LAG_S, 0.0) * _GAIN, self.max_gap_s)

    def hold_s(self, since_last_event_s: float) -> float:
        """How long the next event of a stream should wait; 0 or less sends it now."""
        return self.gap_s - since_last_event_s


async def watch(pacer: Pacer) -> NoReturn:
    """Measure how far behind this event loop is, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + _PERIOD_S
        await asyncio.sleep(_PERIOD_S)
        pacer.observe(loop.time() - due_s)
