"""Results that were never measured: records with known times, written as bench writes them."""

import datetime
import ipaddress
import random
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bench import measure, result
from bench.figures import Repeat, Run, figures
from bench.matrix import Matrix
from bench.measure import Slo
from bench.pages import locust_report
from bench.pages.locust_report import Locust
from bench.records import Record, append
from bench.result import Result
from bench.scrape import Sample
from bench.search import RateResult, SweepResult, UsersPoint
from bench.traffic import workload
from bench.traffic.load import Happening, Outcome

R = TypeVar("R", bound=Result)
MACHINE = {
    "processor": "A processor",
    "cores": 8,
    "memory_gib": 64.0,
    "system": "Linux",
    "gpus": [{"name": "A GPU", "memory_gib": 80.0, "driver": "1"}],
    "versions": {"python": "3.11", "vllm": "0.32.0"},
}


def records(
    count: int,
    *,
    repeat: int = 0,
    rate: float = 8.0,
    tokens: int = 40,
    ttft_s: float = 0.12,
    itl_s: float = 0.012,
    stall_at_s: float = 1e9,
    stall_s: float = 2.0,
    fails: float = 0.0,
    users: int | None = None,
    seed: int = 0,
) -> list[Record]:
    """Poisson arrivals, or `users` in turn; gaps vary, and all stand still for `stall_s` once."""
    rng = random.Random(f"{seed}/{repeat}")
    free_s = [0.05 * user for user in range(users or 0)]
    outcome, now_s = [], 0.0
    for index in range(count):
        user = index % users if users else None
        now_s = now_s + rng.expovariate(rate) if user is None else free_s[user]

        def ends_s(at_s: float) -> float:
            return at_s + stall_s if at_s > stall_at_s else at_s

        record = Record(
            index=index,
            repeat=repeat,
            planned_s=now_s,
            sent_s=now_s + rng.uniform(1e-4, 6e-4),
            user=user,
            status=200,
            asked_output_tokens=tokens,
            input_tokens=100,
            output_tokens=tokens,
            finish_reason="length",
        )
        at_s = now_s + ttft_s * rng.lognormvariate(0, 0.35)
        for _ in range(tokens):
            record.chunk_s.append(ends_s(at_s) if now_s < stall_at_s else at_s + 0.0)
            at_s += itl_s * rng.lognormvariate(0, 0.25) * (4 if rng.random() < 0.04 else 1)
        record.headers_s, record.end_s = record.chunk_s[0], record.chunk_s[-1] + 1e-4
        if rng.random() < fails:
            record.error, record.chunk_s = "http 429: rate limit reached", []
            record.status, record.output_tokens, record.end_s = 429, None, now_s + 0.01
        if user is not None:
            free_s[user] = record.end_s
        outcome.append(record)
    return outcome


def header(benchmark: str, name: str, **more: Any) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "name": name,
        "command": f"python -m bench {benchmark} --url http://127.0.0.1:8000 --out results/x",
        "started": "2026-01-02T03:04:05+00:00",
        "commit": "abc1234",
        "machine": MACHINE,
        "target": {"url": "http://127.0.0.1:8000", "model": "m", "endpoint": "completions"},
        **more,
    }


# Of a load of which no repeat was measured: a result without these is refused.
UNMEASURED: dict[str, Any] = {"repeats": [], "whole": [], "summary": {}}


def typed(kind: type[R], fields: Any) -> R:
    """A result of fields that are plain or typed."""
    return msgspec.convert(msgspec.to_builtins(fields, str_keys=True), kind, str_keys=True)


def run(
    folder: Path,
    name: str,
    repeats: list[list[Record]],
    *,
    users: int | None = None,
    slo: Slo | None = None,
    server: list[Sample] | None = None,
    events: list[Happening] | None = None,
    interrupted: bool = False,
    **more: Any,
) -> Run:
    """A run's folder. Returns its result."""
    outcomes = [
        Repeat(
            outcome=Outcome(records=each, events=events or [], interrupted=interrupted),
            server=server or [],
        )
        for each in repeats
    ]
    about = {"workload": "synthetic:input=100,output=40", "load": "poisson:rate=8", "seed": 0}
    measured = msgspec.structs.asdict(figures(outcomes, slo, users))
    path = result.prepare(folder)
    append(path, [record for each in repeats for record in each])
    return result.write(folder, typed(Run, measured | header("run", name, **about) | more))


def cells(folder: Path, benchmark: str, name: str, speed: float = 1.0, per_user: int = 8) -> Matrix:
    """A matrix or a baseline: every cell under load by its users."""
    done = []
    for place, cell in enumerate(workload.matrix()):
        scale = speed * (1 + 0.06 * cell.users)
        each = [
            records(
                cell.users * per_user,
                repeat=repeat,
                users=cell.users,
                tokens=cell.output_tokens,
                ttft_s=(0.03 + cell.input_tokens * 2e-4) * scale,
                itl_s=0.01 * scale,
                seed=place,
            )
            for repeat in range(3)
        ]
        measured = figures([Repeat(outcome=Outcome(records=item)) for item in each], None, None)
        done.append(msgspec.structs.asdict(measured) | {"cell": cell, "name": cell.name})
    return result.write(folder, typed(Matrix, header(benchmark, name) | {"cells": done}))


def locust(
    folder: Path, heard: list[Record], request: dict[int, str], users: int, **more: Any
) -> Locust:
    about = header("locust", "locust", workload="synthetic:input=100,output=40", load="users=100")
    outcome = locust_report.result(heard, request, users, {"locust": 0.4}, about)
    path = result.prepare(folder)
    append(path, heard)
    return result.write(folder, typed(Locust, msgspec.structs.asdict(outcome) | more))


def sweep(folder: Path, name: str) -> SweepResult:
    """Throughput that saturates as users double."""
    points = []
    for users in (1, 2, 4, 8, 16, 32, 64):
        slow = max(1.0, users / 16)
        each = records(
            users * 12, users=users, ttft_s=0.05 * slow**1.5, itl_s=0.008 * slow, seed=users
        )
        measures = measure.measure(each, window=measure.window(each, users))
        points.append(
            UsersPoint(
                users=users,
                looks=1,
                resolved=True,
                tokens_per_s=measures.output_tokens_per_s or 0.0,
                measures=[measures],
                summary=measure.summary([measures]),
            )
        )
    found = {"users": 16, "tokens_per_s": points[4].tokens_per_s, "resolved": True, "reason": ""}
    fields = header("sweep", name) | found | {"points": points}
    return result.write(folder, typed(SweepResult, fields))


def search(folder: Path, name: str) -> RateResult:
    """A search for the highest rate, which ended without a clear answer."""
    points = []
    for rate, verdict, good in ((4.0, "pass", 400), (6.0, "unresolved", 396), (8.0, "fail", 200)):
        measures = measure.measure(records(400, rate=rate), Slo(ttft_s=0.5))
        points.append(
            {
                "rate": rate,
                "verdict": verdict,
                "looks": 2,
                "share": {"good": good, "counted": 400, "independent": 400, "low": 0, "high": 1},
                "measures": [measures],
                "summary": measure.summary([measures]),
            }
        )
    fields = header("search", name) | {
        "rate": 4.0,
        "fails_at": 8.0,
        "resolved": False,
        "reason": "the rates in between are too near the objective to tell with 4 probes each",
        "goodput_per_s": 3.9,
        "points": points,
    }
    return result.write(folder, typed(RateResult, fields))


def certificate_of_localhost(folder: Path) -> Path:
    """A certificate of 127.0.0.1 with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return path
