"""A request that vLLM cannot read is the client's mistake, and is answered 400.

Where reading a request raises a ValueError or a TypeError, vLLM 0.32 answers 400. Where it raises
another error of that kind, it answers 500: an assistant's message with an empty list as its content
is an IndexError over /v1/responses. Here both are 400, as long as the engine was not asked.
"""

import logging
from http import HTTPStatus
from typing import Any

import fastapi
import vllm.entrypoints.anthropic.api_router as anthropic
from starlette.responses import JSONResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from serve_app.gates.work import work

logger = logging.getLogger("serve_app")

# What Python raises where a value does not have the expected shape.
SHAPE_ERRORS = (LookupError, AttributeError, AssertionError, RecursionError)


def answer_400(app: fastapi.FastAPI) -> None:
    """Let vLLM's application answer 400 to requests that it cannot read."""
    for kind in SHAPE_ERRORS:
        app.add_exception_handler(kind, _response)
    # Its routes catch errors themselves, so that no handler sees them.
    anthropic.create_error_response = error_of


def error_of(error: str | Exception, **kwargs: Any) -> Any:
    """vLLM's ErrorResponse for an error, with status 400 where the request is to blame for it."""
    current = work.get()
    if not isinstance(error, SHAPE_ERRORS) or (current is not None and current.begun):
        return create_error_response(error, **kwargs)
    logger.warning("vLLM could not read a request", exc_info=error)
    message = f"The request could not be read: {type(error).__name__}: {error}"
    return create_error_response(message, status_code=HTTPStatus.BAD_REQUEST)


async def _response(request: fastapi.Request, error: Exception) -> JSONResponse:
    # Without a body there is nothing that the client could have written wrongly.
    answer = error_of(error) if request.method == "POST" else create_error_response(error)
    return JSONResponse(answer.model_dump(), status_code=answer.error.code)
