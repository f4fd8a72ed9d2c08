"""`python -m serve_app tenants`: add, change, list, rotate, disable and enable tenants; reports."""

import argparse
import re
import secrets
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import yaml

from serve_app.errors import ConfigError
from serve_app.settings import Settings
from serve_app.settings import Tenants as Source
from serve_app.tenants import report
from serve_app.tenants.database import Database, DatabaseError
from serve_app.tenants.ledger import Ledger
from serve_app.tenants.report import Month
from serve_app.tenants.store import Store
from serve_app.tenants.tenant import Key, Quota, Tenant, digest, now, parse, read_file

_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status.

    Raises:
        ConfigError: it cannot be done.
    """
    arguments = _parser().parse_args(argv)
    if arguments.command == "key":
        return _new_key()
    source = _source(arguments)
    store = Store(Database(source.address))
    try:
        store.prepare()
        return int(arguments.run(store, source, arguments))
    except DatabaseError as error:
        raise ConfigError("tenants.database", source.address, str(error)) from None
    finally:
        store.database.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve_app tenants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser(
        "add", help="create a tenant; prints its key, which is not shown again"
    )
    add.set_defaults(run=_add)
    _describe(add)
    change = commands.add_parser("set", help="change what a tenant may use")
    change.set_defaults(run=_set)
    _describe(change)
    every = commands.add_parser("list", help="list all tenants of the file and the database")
    every.set_defaults(run=_list)
    every.add_argument("--json", action="store_true", help="print one JSON object per tenant")
    rotate = commands.add_parser(
        "rotate", help="create a new key; the old keys end after --overlap"
    )
    rotate.set_defaults(run=_rotate)
    rotate.add_argument("name")
    rotate.add_argument(
        "--overlap",
        type=_span,
        default=timedelta(days=1),
        help="how long the old keys stay valid, such as 30m, 24h or 7d",
    )
    _add_expiry(rotate)
    for word, run in (("disable", _disable), ("enable", _enable)):
        each = commands.add_parser(word, help=f"{word} the keys of a tenant")
        each.set_defaults(run=run)
        each.add_argument("name")
    month = commands.add_parser("report", help="what tenants used in a month")
    month.set_defaults(run=_report)
    month.add_argument(
        "--month", default=f"{now():%Y-%m}", help="default: the current month, %(default)s"
    )
    month.add_argument("--tenant", help="only this tenant; default: all")
    month.add_argument(
        "--out", default="-", help="a .html, .csv or .parquet file; -: a table (default)"
    )
    forget = commands.add_parser("forget", help="delete old rows of the ledger")
    forget.set_defaults(run=_forget)
    forget.add_argument(
        "--older-than", type=_span, required=True, help="age of the rows to delete, such as 400d"
    )
    commands.add_parser("key", help="print a new key and its lines for a tenants file")
    of_store = [command for word, command in commands.choices.items() if word != "key"]
    for command in of_store:
        command.add_argument(
            "--config",
            default="serve_config.yaml",
            help="configuration that names the tenants file or database",
        )
        command.add_argument(
            "--database", help="SQLite file or postgresql:// address, instead of --config"
        )
    parser.epilog = "\n".join(command.format_usage().strip() for command in of_store)
    return parser


def _describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("name")
    command.add_argument("--weight", type=float, help="share relative to other tenants; default: 1")
    command.add_argument(
        "--priority", choices=["high", "normal", "low"], help="priority class; default: normal"
    )
    command.add_argument(
        "--model",
        action="append",
        dest="models",
        help="model that the tenant may use; may be repeated; default: all",
    )
    for field in Quota.__struct_fields__:
        command.add_argument(f"--{field.replace('_', '-')}", type=int, help="0: no limit")
    _add_expiry(command)


def _add_expiry(command: argparse.ArgumentParser) -> None:
    command.add_argument("--expires", type=_span, help="lifetime of the new key, such as 90d")


def _add(store: Store, source: Source, arguments: argparse.Namespace) -> int:
    if source.file is not None and arguments.name in read_file(Path(source.file)):
        raise ConfigError("tenant", arguments.name, f"is in {source.file}")
    key, stored_key = _generated(arguments.expires)
    store.add(
        parse({"name": arguments.name, "keys": [stored_key], **_described(arguments, Quota())})
    )
    _show(key)
    return 0


def _set(store: Store, source: Source, arguments: argparse.Namespace) -> int:
    def changed(tenant: Tenant) -> Tenant:
        values = msgspec.to_builtins(tenant) | _described(arguments, tenant.quota)
        return parse(values)

    store.change(arguments.name, changed)
    return 0


def _rotate(store: Store, source: Source, arguments: argparse.Namespace) -> int:
    key, stored_key = _generated(arguments.expires)
    ends = now() + arguments.overlap

    def rotated(tenant: Tenant) -> Tenant:
        old = [
            Key(key.sha256, ends if key.expires is None else min(key.expires, ends))
            for key in tenant.keys
            if key.valid(now())
        ]
        return msgspec.structs.replace(tenant, keys=(*old, stored_key))

    store.change(arguments.name, rotated)
    _show(key)
    return 0


def _disable(store: Store, source: Source, arguments: argparse.Namespace) -> int:
    store.change(arguments.name, lambda each: msgspec.structs.replace(each, disabled=True))
    return 0


def _enable(store: Store, source: Source, arguments: argparse.Namespace) -> int:
    store.change(arguments.name, lambda each: msgspec.structs.replace(each, disabled=False))
    return 0


def _list(store: Store, source: Source, arguments: argparse.Namespace) -> int:
    current = store.read()
    assert current is not None  # It is only None for a version that is known already.
    tenants = dict(current[1])
    if source.file is not None:
        tenants |= read_file(Path(source.file))
    for tenant in tenants.values():
        if arguments.json:
            print(msgspec.json.encode(tenant).decode())
        else:
            print(_line(tenant))
    return 0


def _report(store: Store, source: Source, arguments: argparse.Namespace) -> int:
    ledger = Ledger(store.database, "report")
    ledger.prepare()
    month, out = Month.parse(arguments.month), Path(arguments.out)
    rows = report.rows_of(ledger, month, arguments.tenant)
    if arguments.out == "-":
        days_s = month.days_s
        for (name, model), each in sorted(
            ledger.totals(days_s[0], days_s[-1], arguments.tenant).items()
        ):
            print(
                f"{name:24}  {model:32}  {each.requests:>9,} requests  "
                f"{each.prompt_tokens:>13,} prompt  {each.output_tokens:>13,} output  "
                f"{each.gpu_s / 3600:>9,.3f} GPU hours  ${each.dollars:,.2f}"
            )
    elif out.suffix == ".csv":
        with out.open("w", newline="", encoding="utf-8") as file:
            report.write_csv(rows, file)
    elif out.suffix == ".parquet":
        report.write_parquet(rows, out)
    elif out.suffix == ".html":
        out.write_text(report.html(ledger, month, arguments.tenant), encoding="utf-8")
    else:
        raise ConfigError("--out", arguments.out, "must end with .html, .csv or .parquet")
    return 0


def _forget(store: Store, source: Source, arguments: argparse.Namespace) -> int:
    ledger = Ledger(store.database, "forget")
    ledger.prepare()
    print(ledger.forget((now() - arguments.older_than).timestamp()))
    return 0


def _line(tenant: Tenant) -> str:
    valid = sum(key.valid(now()) for key in tenant.keys)
    words = [
        f"{tenant.name:24}",
        "disabled" if tenant.disabled else f"{valid} of {len(tenant.keys)} keys valid",
        f"weight {tenant.weight:g}",
        f"priority {tenant.priority}",
        *(f"{name} {value}" for name, value in _limits(tenant.quota).items()),
    ]
    if tenant.models:
        words.append(f"models {' '.join(tenant.models)}")
    return "  ".join(words)


def _limits(quota: Quota) -> dict[str, int]:
    values = {name: getattr(quota, name) for name in Quota.__struct_fields__}
    return {name: value for name, value in values.items() if value is not None}


def _described(arguments: argparse.Namespace, quota: Quota) -> dict[str, Any]:
    """What the command says of a tenant; what it leaves out stays as it is."""
    options = {name: getattr(arguments, name) for name in ("weight", "priority", "models")}
    values = {name: value for name, value in options.items() if value is not None}
    limits: dict[str, int | None] = dict(_limits(quota))
    for name in Quota.__struct_fields__:
        if (limit := getattr(arguments, name)) is not None:
            limits[name] = limit or None
    return {**values, "quota": limits}


def _generated(expires: timedelta | None) -> tuple[str, Key]:
    """A new key, and its stored form."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    return key, Key(digest(key.encode()), None if expires is None else now() + expires)


def _new_key() -> int:
    key, stored_key = _generated(None)
    _show(key)
    print(f"    keys:\n      - sha256: {stored_key.sha256}")
    return 0


def _show(key: str) -> None:
    print(key)
    if sys.stdout.isatty():
        print("This key is shown once: only its digest is kept.", file=sys.stderr)


def _source(arguments: argparse.Namespace) -> Source:
    if arguments.database is not None:
        return Source(database=arguments.database)
    try:
        content = yaml.safe_load(Path(arguments.config).read_text(encoding="utf-8"))
        given = content["applications"][0]["args"].get("tenants") or {}
    except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError("--config", arguments.config, f"cannot be read: {error}") from None
    source = Settings.parse({"tenants": given}).tenants
    if not source.configured:
        raise ConfigError(
            "tenants.database", None, f"is not set in {arguments.config}; set it, or use --database"
        )
    return source


def _span(text: str) -> timedelta:
    match = re.fullmatch(r"(\d+)([mhd])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time as 30m, 24h or 7d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})
