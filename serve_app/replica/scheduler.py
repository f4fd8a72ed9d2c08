"""vLLM's scheduler, reporting to the replica. Runs in the engine core's process.

With two front ends on one engine (frontends.py) neither sees all of it. This scheduler sends each
step's statistics to the Python front end, which has the replica's metrics and supervisor, and
reports the requests of the fast lane (reports.py). Its work is per step and per request.

The base class is vLLM's own, through `--scheduler-cls`; what is overridden is in docs/upstream.md.
"""

import logging
import os
import time
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request, RequestStatus

from serve_app.replica.reports import GONE, LATE, VARIABLE, Ended, Report, Sender, client_ids

logger = logging.getLogger("serve_app")

# The place of each front end among the engine's clients.
FAST, FULL = 0, 1
# How often statistics are sent where nothing else is: each message costs the replica's process.
_EVERY_S = 0.05


class _Reporting(Scheduler):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sender: Sender | None = Sender(os.environ[VARIABLE])
        # Requests of the fast lane without a token, and when they came; when each of the others
        # came, and when it got its first.
        self._unread: dict[str, tuple[Request, float]] = {}
        # Requests that were aborted because they were late, until vllm-rs is told so.
        self._late: list[str] = []
        self._first: dict[str, tuple[float, float]] = {}
        # Prompt tokens that were found in the prefix cache, of requests of the fast lane.
        self._cached: dict[str, int] = {}
        self._stats_s = self._step_s = self._report_s = 0.0
        self._begun = 0  # In this step.
        self._clear()

    def _clear(self) -> None:
        self._steps = self._prompt_tokens = self._generated = self._gaps = self._preempted = 0
        self._busy_s = self._gap_s = 0.0
        self._first_s: list[float] = []
        self._ended: list[Ended] = []

    def add_request(self, request: Request) -> None:
        now_s = time.monotonic()
        if not self.requests:
            self._step_s = now_s  # The engine was idle: the next step begins now.
        if request.client_index == FAST:
            self._unread[request.request_id] = request, now_s
        super().add_request(request)

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        now_s = time.monotonic()
        soon = now_s - self._stats_s < _EVERY_S and (self.running or self.waiting)
        if soon and not any((*args, *kwargs.values())):
            return None  # Counts go on until the next time. An idle engine is reported at once.
        self._stats_s = now_s
        return super().make_stats(*args, **kwargs)

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        for request_id, (request, _) in self._unread.items():
            if request.prefill_stats is not None:  # vLLM takes it with the first token.
                self._cached[request_id] = request.prefill_stats.num_cached_tokens
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(*args, **kwargs)
        if self._late:
            errors = outputs.setdefault(FAST, EngineCoreOutputs()).outputs
            errors += [
                EngineCoreOutput(name, [], finish_reason=FinishReason.ERROR) for name in self._late
            ]
            self._late.clear()
        self._redirect_stats(outputs)
        self._count_step(outputs.get(FAST))
        return outputs

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> Any:
        if request_ids is not None:
            request_ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
            if GONE in request_ids:
                request_ids, finished_status = self._fast(), RequestStatus.FINISHED_ERROR
            request_ids = self._named(request_ids)
        ended = super().finish_requests(request_ids, finished_status)
        if self._ended:  # An idle engine takes no step that would report it.
            self._report()
        return ended

    def _fast(self) -> list[str]:
        return [name for name, each in self.requests.items() if each.client_index == FAST]

    def _named(self, request_ids: list[str]) -> list[str]:
        """The engine's names of requests, where some are named by a client's id and are late.

        vllm-rs is told of the end of a late request, and ends its stream with an error event.
        """
        late = {name.removeprefix(LATE) for name in request_ids if name.startswith(LATE)}
        if not late:
            return request_ids
        matching = [
            name
            for name, request in self.requests.items()
            if request.client_index == FAST and not late.isdisjoint(client_ids(name))
        ]
        self._late += matching
        return [name for name in request_ids if not name.startswith(LATE)] + matching

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if request.client_index == FAST:
            now_s = time.monotonic()
            _, unread_s = self._unread.pop(request.request_id, (request, now_s))
            arrived_s, first_s = self._first.pop(request.request_id, (unread_s, None))
            if first_s is None and request.num_output_tokens:
                first_s = now_s  # Its first step was its last.
                self._began(request, now_s - arrived_s)
            self._preempted += request.num_preemptions
            reason = request.get_finished_reason()
            self._ended.append(
                Ended(
                    request.request_id,
                    request.num_prompt_tokens,
                    request.num_output_tokens,
                    arrived_s,
                    first_s,
                    now_s,
                    str(reason) if reason is not None else "error",
                    self._cached.pop(request.request_id, 0),
                )
            )
        return super()._free_request(request, *args, **kwargs)

    def _redirect_stats(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Give the step's statistics to the Python front end, whichever front end vLLM chose."""
        for client, each in outputs.items():
            if each.scheduler_stats is not None and client != FULL:
                stats, each.scheduler_stats = each.scheduler_stats, None
                if not each.outputs and not each.finished_requests and each.utility_output is None:
                    del outputs[client]  # vllm-rs refuses a message that holds nothing.
                mine = outputs.setdefault(FULL, EngineCoreOutputs())
                mine.scheduler_stats = stats
                return

    def _count_step(self, fast: EngineCoreOutputs | None) -> None:
        now_s = time.monotonic()
        step_s, self._step_s = now_s - self._step_s, now_s
        self._steps += 1
        self._busy_s += step_s
        for request_id, (request, arrived_s) in list(self._unread.items()):
            if request.num_output_tokens:
                del self._unread[request_id]
                self._first[request_id] = arrived_s, now_s
                self._began(request, now_s - arrived_s)
        if fast is not None:
            made = len(fast.outputs)
            gaps = max(0, made - self._begun)
            self._generated += made
            self._gaps += gaps
            self._gap_s += gaps * step_s
        self._begun = 0
        if self._ended or self._first_s or now_s - self._report_s >= _EVERY_S:
            self._report()

    def _began(self, request: Request, after_s: float) -> None:
        """A request of the fast lane got its first token."""
        self._begun += 1
        self._first_s.append(after_s)
        self._prompt_tokens += request.num_prompt_tokens

    def _report(self) -> None:
        self._report_s = time.monotonic()
        compiler = self.structured_output_manager.backend
        report = Report(
            engine=0,
            steps=self._steps,
            busy_s=self._busy_s,
            running=len(self.running),
            waiting=len(self.waiting),
            kv_usage=self.kv_cache_manager.usage,
            unread_tokens=sum(each.num_prompt_tokens for each, _ in self._unread.values()),
            prompt_tokens=self._prompt_tokens,
            first_s=self._first_s,
            generated_tokens=self._generated,
            gaps=self._gaps,
            gap_s=self._gap_s,
            preempted=self._preempted,
            ended=self._ended,
            grammar_compiler=type(compiler).__name__ if compiler is not None else "",
        )
        self._clear()
        if self._sender is None:
            return
        try:
            self._sender.send(report)
        except OSError as error:
            # The replica ended: its guard ends this process as well.
            logger.error("the scheduler cannot send its reports to the replica: %s", error)
            self._sender = None


class ReportingScheduler(_Reporting):
    """For an engine that schedules a step once the last one is done."""


class ReportingAsyncScheduler(_Reporting, AsyncScheduler):  # type: ignore[misc]
    """For an engine that schedules a step while the last one runs."""
