"""What a tenant sees of itself: `/tenant` in a browser, `/tenant/usage` as JSON."""

import msgspec
from starlette.types import Send

from serve_app.tenants import report
from serve_app.tenants.book import Book
from serve_app.tenants.ledger import Total
from serve_app.tenants.quota import Kind
from serve_app.tenants.tenant import Tenant, now

PATH, USAGE_PATH = "/tenant", "/tenant/usage"


class Left(msgspec.Struct, frozen=True):
    """A limit of a tenant, and what is left of it until it is reset."""

    limit: int
    remaining: int
    resets_s: int


class ModelUse(Total, frozen=True):
    """The requests of a tenant for one model in a month."""

    mean_ttft_s: float | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant may use, has left, and used in a month (UTC).

    Attributes:
        limits: by kind.
        models: by name.
    """

    tenant: str
    priority: str
    weight: float
    limits: dict[str, Left]
    month: str
    models: dict[str, ModelUse]


async def usage(tenant: Tenant, book: Book) -> Usage:
    """What a tenant may use, has left, and used in this month (UTC).

    Raises:
        DatabaseError: the database is away.
    """
    at = now()
    month_s = at.replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()
    totals = await book.totals(tenant.name, month_s, at.timestamp() + 1)
    limits = {}
    for part in await book.allowances(tenant):
        _, end_s = part.kind.window(at.timestamp())
        resets_s = 0 if part.kind is Kind.RUNNING_REQUESTS else round(end_s - at.timestamp())
        limits[part.kind.value] = Left(part.limit, part.remaining, resets_s)
    return Usage(
        tenant=tenant.name,
        priority=tenant.priority,
        weight=tenant.weight,
        limits=limits,
        month=f"{at:%Y-%m}",
        models={
            model: ModelUse(**msgspec.structs.asdict(each), mean_ttft_s=each.ttft_s)
            for (_, model), each in totals.items()
        },
    )


def html(used: Usage) -> str:
    """The same for people."""
    facts = [("class", used.priority), ("weight", f"{used.weight:g}")]
    for name, left in used.limits.items():
        facts.append((name.replace("_", " "), f"{left.remaining:,} of {left.limit:,} left"))
    for model, each in used.models.items():
        ttft_s = each.mean_ttft_s
        wait = "" if ttft_s is None else f", mean time to first token {ttft_s:.3f} s"
        facts.append(
            (
                f"{model} in {used.month}",
                f"{each.requests:,} requests, {each.prompt_tokens:,} prompt and "
                f"{each.output_tokens:,} output tokens, ${each.dollars:,.2f}{wait}",
            )
        )
    return report.page(used.tenant, facts)


async def send_page(path: str, used: Usage, send: Send) -> None:
    """The response for one of the two paths."""
    as_json = path == USAGE_PATH
    body = msgspec.json.encode(used) if as_json else html(used).encode()
    kind = b"application/json" if as_json else b"text/html; charset=utf-8"
    headers = [
        (b"content-type", kind),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
