"""The queue worker: Runpod's jobs, answered by the application on this machine over HTTP.

What a job's input may be is in question.py.

An answer that streams is yielded as whole SSE events, as text: what came in while the batch before
it was being posted goes out as the next one, so a slow queue gets fewer and larger posts. An error
fails the job, with the HTTP status and OpenAI's error as JSON. A cancelled job closes its
connection, at which the application aborts the engine's work.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from typing import Any

import aiohttp

from question import BadJob, Question
from serve_app import sse

# No post is made for less than this much time of a stream, except its first.
_BATCH_S = 0.2
# While a replica is being replaced the application answers 503; the job can wait for the next.
_PATIENCE_S = 120.0
_RETRY_S = (1.0, 30.0)
_EVENT_END = b"\n\n"


class Failed(Exception):
    """An error answer: its HTTP status, and OpenAI's error."""

    def __init__(self, status: int, error: Mapping[str, Any]) -> None:
        super().__init__(str(error.get("message")))
        self.status, self.error = status, dict(error)

    def output(self) -> dict[str, str]:
        # The SDK fails a job for this key, and keeps its value as text.
        return {"error": json.dumps({"status": self.status, **self.error})}


class Application:
    """The application, as handlers see it.

    Args:
        url: where it listens.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._session: aiohttp.ClientSession | None = None
        self._model: str | None = None

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            # The application's own limits end a request; the client has none.
            self._session = aiohttp.ClientSession(
                self._url,
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            )
        return self._session

    async def answer(self, question: Question) -> AsyncGenerator[Any, None]:
        """What the handler yields: batches of events as text, or one JSON value."""
        question = await self._named(question)
        async with self._response(question) as response:
            if response.content_type != "text/event-stream":
                data = await response.read()
                yield _parsed(data)
                return
            async for batch in _batches(response.content):
                yield batch.decode("utf-8", "replace")
                if error := _error_in(batch):
                    # The events before it were delivered; the job is a failure all the same.
                    raise Failed(_status(error), error)

    async def _named(self, question: Question) -> Question:
        """The question, with the served model's name where it has none."""
        body = question.body
        if body is None or "model" in body or question.method != "POST":
            return question
        if self._model is None:
            async with self._response(Question("GET", "/v1/models", None)) as response:
                self._model = _first_model(await response.read())
        return Question(question.method, question.route, {**body, "model": self._model})

    @contextlib.asynccontextmanager
    async def _response(self, question: Question) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response, once it is good; refusals for lack of room are waited out.

        Raises:
            Failed: the answer is an error.
        """
        pause_s, longest_s = _RETRY_S
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + _PATIENCE_S
        while True:
            try:
                async with self._connected().request(
                    question.method, question.route, json=question.body
                ) as response:
                    if response.status < 400:
                        with _closed_with_the_job(response):
                            yield response
                        return
                    failure = Failed(response.status, _error_of(await response.read()))
                    wait_s = _seconds(response.headers.get("Retry-After"), pause_s)
            except aiohttp.ClientConnectorError as error:
                failure = Failed(503, {"message": f"the server is not there: {error}"})
                wait_s = pause_s
            except aiohttp.ClientError as error:
                # It was being answered: to ask again could do the work twice.
                raise Failed(502, {"message": f"the connection broke: {error!r}"}) from None
            again = failure.status in (429, 503) and loop.time() + wait_s < deadline_s
            if not again:
                raise failure
            await asyncio.sleep(wait_s)
            pause_s = min(2 * pause_s, longest_s)


@contextlib.contextmanager
def _closed_with_the_job(response: aiohttp.ClientResponse) -> Iterator[None]:
    """Close the connection when the job's task ends, however it does.

    A job that is cancelled while the SDK posts a batch leaves this generator where it yielded, to
    be closed by the garbage collector at some time; until then the engine would work on.
    """
    task = asyncio.current_task()
    assert task is not None

    def close(over: "asyncio.Task[Any]") -> None:
        response.close()

    task.add_done_callback(close)
    try:
        yield
    finally:
        task.remove_done_callback(close)


async def _batches(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Whole events, as many at a time as came in while the one before was delivered."""
    buffered, arrived, over = bytearray(), asyncio.Event(), False
    failure: BaseException | None = None

    async def read() -> None:
        nonlocal over, failure
        try:
            async for data in content.iter_any():
                buffered.extend(data)
                arrived.set()
        except aiohttp.ClientError as error:
            failure = Failed(502, {"message": f"the connection broke: {error!r}"})
        finally:
            over = True
            arrived.set()

    reader = asyncio.ensure_future(read())
    loop = asyncio.get_running_loop()
    next_s = 0.0
    try:
        while True:
            await arrived.wait()
            arrived.clear()
            if not over and (early_s := next_s - loop.time()) > 0:
                await asyncio.sleep(early_s)
            end = len(buffered) if over else buffered.rfind(_EVENT_END) + len(_EVENT_END)
            # rfind is -1 where no event has ended.
            if end >= len(_EVENT_END) or (over and end):
                batch = bytes(buffered[:end])
                del buffered[:end]
                next_s = loop.time() + _BATCH_S
                yield batch
            if over and not buffered:
                break
        if failure is not None:
            raise failure
    finally:
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader


def _first_model(data: bytes) -> str:
    """The first model of an answer of /v1/models.

    Raises:
        Failed: it is not such an answer.
    """
    try:
        return str(json.loads(data)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise Failed(502, {"message": "the server does not say which model it serves"}) from None


def _seconds(retry_after: str | None, default_s: float) -> float:
    """How long a Retry-After asks to wait; a date, which proxies may send, is not waited for."""
    try:
        return max(0.0, float(retry_after or default_s))
    except ValueError:
        return default_s


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode("utf-8", "replace")


def _error_of(data: bytes) -> dict[str, Any]:
    """OpenAI's error in a body, whatever else the body is."""
    data_of = _parsed(data)
    error = data_of.get("error") if isinstance(data_of, dict) else None
    return error if isinstance(error, dict) else {"message": str(data_of)[:1000]}


def _error_in(batch: bytes) -> dict[str, Any] | None:
    """The error event among events, if there is one."""
    for data in sse.data_lines(batch):
        if data.startswith(b'{"') and b'"error"' in data[:34]:
            return _error_of(data)
    return None


def _status(error: Mapping[str, Any]) -> int:
    """The HTTP status that an error would have had before the stream began."""
    code = error.get("code")
    if isinstance(code, int) and 400 <= code < 600:
        return code
    return {"timeout_error": 504, "invalid_request_error": 400, "rate_limit_error": 429}.get(
        str(error.get("type")), 500
    )


def room(environ: Mapping[str, str]) -> int:
    """How many jobs at once: what the engines batch, or less where MAX_CONCURRENCY says so."""
    can = int(environ.get("SERVE_ROOM") or 256)
    wanted = int(environ.get("MAX_CONCURRENCY") or 0)  # choice.py has refused what is no number.
    return min(can, wanted) if wanted else can


def main() -> None:
    """Take jobs until told to stop."""
    import runpod
    from runpod.serverless.modules import rp_scale

    application = Application(os.environ.get("SERVE_URL") or "http://127.0.0.1:8000")

    async def handler(job: dict[str, Any]) -> AsyncIterator[Any]:
        try:
            async with contextlib.aclosing(
                application.answer(Question.of(job.get("input")))
            ) as answer:
                async for output in answer:
                    yield output
        except BadJob as error:
            yield Failed(400, {"message": str(error), "type": "invalid_request_error"}).output()
        except Failed as error:
            yield error.output()

    class Scaler(rp_scale.JobScaler):  # type: ignore[misc]
        """The SDK's loop, which on SIGTERM would wait for its long polls: up to 90 s."""

        async def run(self) -> None:
            async with rp_scale.AsyncClientSession() as session:
                take = asyncio.create_task(self.get_jobs(session))
                stop = asyncio.create_task(self.monitor_stop_signals(session))
                # Ends on SIGTERM, once the jobs in progress are done and told.
                await self.run_jobs(session)
                for task in (take, stop):
                    task.cancel()
                await asyncio.gather(take, stop, return_exceptions=True)

    rp_scale.JobScaler = Scaler
    concurrency = room(os.environ)
    runpod.serverless.start(
        {
            "handler": handler,
            "concurrency_modifier": lambda current: concurrency,
            # /run and /runsync answer with what was yielded, and not with nothing.
            "return_aggregate_stream": True,
        }
    )


if __name__ == "__main__":
    main()
