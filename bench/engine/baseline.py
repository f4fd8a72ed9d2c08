"""The engine alone, in this process: what `bench baseline` measures.

`LLM.generate` takes a batch and returns when all of it is done: there is no server, no network and
no stream, so what is left is what the engine itself can do. Its records have the same form as those
of a served run, with two times of output instead of one for each event: the first token's and the
last's, as the engine saw them.
"""

import os
import time
from typing import Any

from bench.hardware import gpu
from bench.records import Record
from bench.traffic.request import Request
from serve_app.planning import kernels


class Engine:
    """vLLM in this process.

    Args:
        model: a local folder, or a hub id.
        arguments: vLLM's engine arguments, by their Python names.
    """

    def __init__(self, model: str, arguments: dict[str, Any]) -> None:
        # Read when vLLM is imported. One process: what is measured has no neighbour to wait for.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        kernels.settle()
        from vllm import LLM

        if not gpu.present():
            # The CPU build compiles wrong code.
            arguments = {"enforce_eager": True, **arguments}
        self._llm = LLM(model=model, disable_log_stats=False, **arguments)

    def generate(self, requests: list[Request], repeat: int, start_s: float) -> list[Record]:
        """One batch, all sent at once.

        Args:
            start_s: start of the run, `time.time()`.
        """
        from vllm import SamplingParams

        # Not min_tokens: vLLM would mask logits in every step, which no user's request asks for.
        params = [
            SamplingParams(temperature=0, max_tokens=r.output_tokens, ignore_eos=True)
            for r in requests
        ]
        sent_s = time.time() - start_s
        outputs = self._llm.generate([r.prompt for r in requests], params, use_tqdm=False)
        return [
            _record(index, request, output, repeat, sent_s, start_s)
            for index, (request, output) in enumerate(zip(requests, outputs, strict=True))
        ]


def _record(
    index: int, request: Request, output: Any, repeat: int, sent_s: float, start_s: float
) -> Record:
    """The record of a finished output; its first and last token by the engine's own times."""
    stats = output.metrics
    first_s = stats.arrival_time + stats.first_token_latency - start_s
    last_s = first_s + stats.last_token_ts - stats.first_token_ts
    tokens = len(output.outputs[0].token_ids)
    return Record(
        index=index,
        repeat=repeat,
        kind=request.kind,
        planned_s=sent_s,
        sent_s=sent_s,
        chunk_s=[first_s, last_s][:tokens],
        end_s=last_s,
        status=200,
        asked_input_tokens=request.input_tokens,
        asked_output_tokens=request.output_tokens,
        input_tokens=len(output.prompt_token_ids),
        output_tokens=tokens,
        cached_tokens=output.num_cached_tokens,
        finish_reason=output.outputs[0].finish_reason or "",
    )
