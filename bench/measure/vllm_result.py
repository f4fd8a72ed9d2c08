"""The same run by the names and the definitions of `vllm bench serve`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from bench.measure.flow import per_second, whole_span
from bench.measure.latency import PERCENTS, gaps, itl_s, lag_s, percentile, present, ttft_s
from bench.measure.slo import Slo
from bench.records import Record


def vllm_names(
    records: Iterable[Record],
    *,
    model: str = "",
    endpoint: str = "completions",
    date: str = "",
    slo: Slo | None = None,
    request_rate: float | None = None,
    burstiness: float = 1.0,
    max_concurrency: int | None = None,
    detailed: bool = False,
) -> dict[str, Any]:
    """What `vllm bench serve --save-result` writes, by its names and its definitions.

    These differ from ours, and agree with what it measures on the same requests: latencies count
    from when a request was sent (`sent_s`) and end with its last chunk; nothing is excluded at
    the start and the end; `max_output_tokens_per_s` counts chunks, and `max_concurrent_requests`
    all that were under way at any time in one second. Two things do not agree: a 99th percentile
    of too few samples, like a statistic of nothing, is None here (0 there), and answers without
    usage have no tokens here (there they are counted with a tokenizer).

    Args:
        records: of one repeat or of several; durations of repeats add up.
        date: as %Y%m%d-%H%M%S.
        request_rate, burstiness: of an open loop; None is "inf".
        max_concurrency: users of a closed loop.
        detailed: also what --save-detailed adds, a value for each request. As there, a failed
            request has 0 for what it has not got; `errors` says which failed.
    """
    everything = sorted(records, key=lambda record: (record.repeat, record.index))
    ok = [record for record in everything if record.ok and record.chunk_s]
    repeats = [
        [record for record in everything if record.repeat == repeat]
        for repeat in sorted({record.repeat for record in everything})
    ]
    return {
        "date": date,
        "endpoint_type": "openai-chat" if endpoint == "chat" else "openai",
        "backend": "openai-chat" if endpoint == "chat" else "openai",
        "label": None,
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": len(everything),
        "request_rate": "inf" if request_rate is None else request_rate,
        "burstiness": burstiness,
        "max_concurrency": max_concurrency,
        **_vllm_rates(everything, ok, repeats, slo),
        **_vllm_statistics(ok, max_concurrency is not None),
        **_vllm_lists(everything, detailed),
    }


def _vllm_rates(
    everything: Sequence[Record],
    ok: Sequence[Record],
    repeats: Sequence[Sequence[Record]],
    slo: Slo | None,
) -> dict[str, Any]:
    windows = [whole_span(repeat) for repeat in repeats]
    duration_s = sum(to_s - from_s for from_s, to_s in windows)
    inputs, outputs = (sum(map(_input_len, ok)), sum(record.output_tokens or 0 for record in ok))
    # vLLM's start of a request is when it was sent.
    good = sum(_vllm_meets(slo, record) for record in ok) if slo else None
    peaks = [_vllm_peaks(repeat) for repeat in repeats]
    per_s = partial(per_second, duration_s=duration_s)
    return {
        "duration": duration_s,
        "completed": len(ok),
        "failed": len(everything) - len(ok),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": per_s(len(ok)),
        "request_goodput": per_s(good),
        "output_throughput": per_s(outputs),
        "total_token_throughput": per_s(inputs + outputs),
        "max_output_tokens_per_s": max((peak[0] for peak in peaks), default=0.0),
        "max_concurrent_requests": max((peak[1] for peak in peaks), default=0),
        "rtfx": 0.0,
    }


def _vllm_statistics(ok: Sequence[Record], queued: bool) -> dict[str, float | None]:
    latencies_s = {
        "ttft": present(ttft_s(_from_sent(record)) for record in ok),
        "tpot": present(map(_vllm_tpot_s, ok)),
        "itl": gaps(ok),
        "e2el": np.array([_vllm_latency_s(record) for record in ok]),
    }
    if queued:
        latencies_s["client_queue_time"] = present(map(lag_s, ok))
    statistics: dict[str, float | None] = {}
    for name, values in latencies_s.items():
        ms = values * 1000
        statistics[f"mean_{name}_ms"] = float(ms.mean()) if len(ms) else None
        statistics[f"std_{name}_ms"] = float(ms.std()) if len(ms) else None
        statistics[f"median_{name}_ms"] = float(np.median(ms)) if len(ms) else None
        for percent in PERCENTS:
            statistics[f"p{percent}_{name}_ms"] = percentile(ms, percent)
    return statistics


def _vllm_lists(everything: Sequence[Record], detailed: bool) -> dict[str, list[Any]]:
    lists = {
        "latencies": [_vllm_latency_s(record) if record.ok else 0.0 for record in everything],
        "queue_times": [lag_s(record) or 0.0 for record in everything],
    }
    if not detailed:
        return lists
    return lists | {
        "input_lens": [_input_len(record) for record in everything],
        "output_lens": [(record.output_tokens or 0) * record.ok for record in everything],
        "ttfts": [ttft_s(_from_sent(record)) or 0.0 for record in everything],
        "itls": [itl_s(record) for record in everything],
        "start_times": [_from_sent(record).planned_s for record in everything],
        "generated_texts": [record.text for record in everything],
        "errors": [record.error for record in everything],
    }


def _vllm_peaks(records: Sequence[Record]) -> tuple[float, int]:
    """The most chunks, and requests under way, in any one second from the first that was sent."""
    ok = [record for record in records if record.ok and record.chunk_s]
    if not ok:
        return 0.0, 0
    start_s = min(_from_sent(record).planned_s for record in ok)
    chunks = np.concatenate([record.chunk_s for record in ok]) - start_s
    running: Counter[int] = Counter()
    for record in ok:
        first_s = _from_sent(record).planned_s - start_s
        last_s = first_s + _vllm_latency_s(record)
        running.update(range(int(first_s), int(last_s) + 1))
    return float(np.bincount(chunks.astype(int)).max()), max(running.values())


def _vllm_meets(slo: Slo, record: Record) -> bool:
    return slo.share(_from_sent(record), _vllm_tpot_s(record) or 0.0) <= 1


def _vllm_tpot_s(record: Record) -> float | None:
    """Also of an answer that came in one piece, whose time between tokens is then 0."""
    if record.output_tokens is None or record.output_tokens < 2:
        return None
    return (record.chunk_s[-1] - record.chunk_s[0]) / (record.output_tokens - 1)


def _vllm_latency_s(record: Record) -> float:
    """From sent to the last chunk; 0 where no chunk came."""
    return record.chunk_s[-1] - _from_sent(record).planned_s if record.chunk_s else 0.0


def _input_len(record: Record) -> int:
    return record.input_tokens or record.asked_input_tokens or 0


def _from_sent(record: Record) -> Record:
    """The record as vLLM sees it: planned when it was sent, and over with its last chunk."""
    last_s = record.chunk_s[-1] if record.chunk_s else record.end_s
    sent_s = record.planned_s if record.sent_s is None else record.sent_s
    return msgspec.structs.replace(record, planned_s=sent_s, end_s=last_s)
