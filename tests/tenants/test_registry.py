"""Tenants as data: files and databases, keys that rotate and expire, and what is not accepted."""

import logging
import os
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from serve_app.errors import ConfigError
from serve_app.gates.keys import KeyRing
from serve_app.observe import metrics
from serve_app.settings import ApiKeys, Settings, Tenants
from serve_app.tenants import registry as module
from serve_app.tenants.commands import main
from serve_app.tenants.database import Database
from serve_app.tenants.registry import Registry, keys_of
from serve_app.tenants.store import Store
from serve_app.tenants.tenant import Key, Priority, Tenant, digest, read_file

SEARCH = f"""
tenants:
  - name: search
    weight: 2
    priority: high
    models: [qwen, an-adapter]
    quota: {{requests_per_minute: 600, tokens_per_month: 1000000}}
    keys:
      - sha256: {digest(b"sk-search")}
      - {{sha256: "{digest(b"sk-old")}", expires: 2030-01-01T00:00:00Z}}
"""


def file(folder: Path, text: str = SEARCH) -> Path:
    path = folder / "tenants.yaml"
    path.write_text(text)
    return path


def registry(path: Path, **kwargs: object) -> Registry:
    return Registry(Tenants(file=str(path)), ApiKeys(), **kwargs)  # type: ignore[arg-type]


def at(*date: int) -> float:
    return datetime(*date, tzinfo=UTC).timestamp()  # type: ignore[misc, arg-type]


def test_a_file_says_who_the_tenants_are(tmp_path: Path) -> None:
    found = registry(file(tmp_path))
    assert found.required
    assert found.holder("sk-search") == "search"
    assert found.holder("sk-else") is None
    tenant = found.tenant("search")
    assert (tenant.weight, tenant.priority) == (2.0, Priority.HIGH)
    assert tenant.quota.tokens_per_month == 1_000_000
    assert tenant.may_use("an-adapter")
    assert not tenant.may_use("other")


def test_a_key_expires(tmp_path: Path) -> None:
    now_s = [at(2029, 12, 31)]
    found = registry(file(tmp_path), clock=lambda: now_s[0])
    assert found.holder("sk-old") == "search"
    now_s[0] = at(2030, 1, 1)
    assert found.holder("sk-old") is None
    assert found.holder("sk-search") == "search"


def test_a_disabled_tenant_has_no_keys(tmp_path: Path) -> None:
    text = SEARCH.replace("weight: 2", "disabled: true")
    (tmp_path / "keys").write_text("search sk-of-the-key-file\nother sk-other\n")
    keys = ApiKeys(file=str(tmp_path / "keys"))
    found = Registry(Tenants(file=str(file(tmp_path, text))), keys)
    assert found.holder("sk-search") is None
    assert found.holder("sk-of-the-key-file") is None
    assert found.holder("sk-other") == "other"


def test_keys_of_the_key_file_are_tenants_of_the_default_kind(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("search sk-of-the-key-file\nthe others sk-other\n")
    keys = ApiKeys(file=str(tmp_path / "keys"))
    found = Registry(Tenants(file=str(file(tmp_path))), keys)
    assert found.tenant(found.holder("sk-of-the-key-file") or "").weight == 2.0
    assert found.holder("sk-other") == "the others"
    assert found.tenant("the others") == Tenant.default("the others")


def test_without_tenants_keys_are_those_of_before() -> None:
    assert isinstance(keys_of(Settings.parse({})), KeyRing)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("weight: 2", "wieght: 2", "unknown field `wieght`.*did you mean 'weight'"),
        ("weight: 2", "weight: 0", r"\$.tenants\[0\].weight"),
        ("weight: 2", "weight: [", "while parsing|expected"),
        ("priority: high", "priority: urgent", "Invalid enum value 'urgent'"),
        ("name: search", "name: a team", "matching regex"),
        ("requests_per_minute: 600", "requests_per_minute: -1", "requests_per_minute"),
        (digest(b"sk-search"), "sk-search", "matching regex"),
        ("2030-01-01T00:00:00Z", "soon", "RFC3339"),
    ],
)
def test_a_malformed_file_is_one_sentence(
    tmp_path: Path, old: str, new: str, sentence: str
) -> None:
    path = file(tmp_path, SEARCH.replace(old, new))
    with pytest.raises(ConfigError) as error:
        registry(path)
    assert re.search(sentence, str(error.value))
    assert "\n" not in str(error.value)


def test_two_tenants_share_no_name_and_no_key(tmp_path: Path) -> None:
    twice = SEARCH + SEARCH.removeprefix("\ntenants:\n")
    with pytest.raises(ConfigError, match="two tenants of this name"):
        registry(file(tmp_path, twice))
    other = SEARCH.removeprefix("\ntenants:\n").replace("name: search", "name: other")
    with pytest.raises(ConfigError, match="has a key that search has"):
        registry(file(tmp_path, SEARCH + other))


def test_a_file_that_becomes_malformed_keeps_the_old_state_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Ray, once a test has started it, sets levels in this process.
    caplog.set_level(logging.WARNING, "serve_app")
    path = file(tmp_path)
    found = registry(path)
    for broken in ("tenants: [", "tenants: 3"):
        path.write_text(broken)
        for _ in range(3):
            found.refresh()
        assert found.holder("sk-search") == "search"
        assert metrics.tenants_stale._value.get() == 1
    path.unlink()
    found.refresh()
    assert found.holder("sk-search") == "search"
    path.write_text(SEARCH.replace("sk-search", "x").replace("weight: 2", "weight: 3"))
    found.refresh()
    assert found.tenant("search").weight == 3
    assert metrics.tenants_stale._value.get() == 0
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.levelname for record in said] == ["ERROR", "ERROR", "ERROR", "WARNING"]


SHA = digest(b"sk-else")


def expiring(date: str) -> str:
    return f"tenants: [{{name: a, keys: [{{sha256: {SHA}, expires: {date}}}]}}]"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="emptied, before it is written"),
        "# tenants: []",
        "false",
        "0",
        "[]",
        "{}",
        "tenants:",
        "tenants: {a: {weight: 1}}",
        pytest.param("tenants: [{name: a}]\ntenants: [{name: b}]", id="two lists"),
        pytest.param("tenants: [{name: a, weight: 1, weight: 5}]", id="two weights"),
        pytest.param("tenants: [{name: a}]\n---\ntenants: [{name: b}]", id="two documents"),
        "tenants: [{name: a, weight: .nan}]",
        "tenants: [{name: a, weight: 1.0e-300}]",
        "tenants: [{name: a, weight: 1.0e+300}]",
        pytest.param(f"tenants: [{{name: a, quota: {{tokens_per_day: {10**400}}}}}]", id="10**400"),
        "tenants: [{name: a, quota: {requests_per_minute: 1.5}}]",
        expiring("2027-02-30T00:00:00Z"),
        expiring("2027-02-20T00:00:00+99:00"),
        expiring("2027-02-20"),
        expiring("2027-02-20T00:00:00"),
        "tenants: !!timestamp soon",
        "tenants: !!int ''",
        "tenants: !!python/object/apply:os.getpid []",
        pytest.param("tenants: " + "[" * 5000 + "]" * 5000, id="deep"),
        "tenants: &a [*a]",
        "tenants:\n\t- name: a",
        'tenants: [{name: "a\\0"}]',
        "tenants: [{name: yes}]",
        f"tenants: [{{name: a, keys: [{{sha256: {SHA.upper()}}}]}}]",
        pytest.param(SEARCH[: SEARCH.index("expires") + 3], id="cut within a word"),
    ],
)
def test_whatever_a_file_becomes_the_old_state_is_in_force(tmp_path: Path, text: str) -> None:
    path = file(tmp_path)
    found = registry(path)
    path.write_text(text)
    found.refresh()
    assert found.holder("sk-search") == "search"
    assert found.tenant("search").weight == 2
    assert metrics.tenants_stale._value.get() == 1
    with pytest.raises(ConfigError) as error:  # At a start it is one sentence.
        registry(path)
    assert "\n" not in str(error.value)
    path.write_text("tenants: []")
    found.refresh()
    assert found.holder("sk-search") is None
    assert metrics.tenants_stale._value.get() == 0


def test_what_is_no_file_changes_nothing(tmp_path: Path) -> None:
    path = file(tmp_path)
    found = registry(path)
    for make in (os.mkfifo, os.mkdir, lambda name: os.symlink(name, name)):
        path.unlink() if path.is_file() else None
        make(path)  # type: ignore[operator]
        found.refresh()  # It does not wait for a writer of the pipe.
        assert found.holder("sk-search") == "search"
        assert metrics.tenants_stale._value.get() == 1
        path.rmdir() if path.is_dir() else path.unlink()


async def test_a_request_does_not_wait_for_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(tmp_path)
    found = registry(path)
    monkeypatch.setattr(module, "_REREAD_S", 0.0)
    path.write_text(SEARCH.replace("weight: 2", "weight: 4"))
    threads = []
    read = read_file

    def watched(path: Path) -> dict[str, Tenant]:
        threads.append(threading.current_thread())
        return read(path)

    monkeypatch.setattr(module, "read_file", watched)
    assert found.holder("sk-search") == "search"
    assert found._reading is not None
    await found._reading
    assert found.tenant("search").weight == 4
    assert threads
    assert threading.main_thread() not in threads


def test_ten_thousand_tenants(tmp_path: Path) -> None:
    """Found by digest: the number of tenants does not matter for a request."""
    lines = ["tenants:"]
    for number in range(10_000):
        lines.append(f"- {{name: t{number}, keys: [{{sha256: {digest(b'%d' % number)}}}]}}")
    found = registry(file(tmp_path, "\n".join(lines)))
    assert len(found) == 10_000
    assert found.holder("9999") == "t9999"


# --- the database ---


def test_a_database_has_tenants(address: str) -> None:
    store = Store(Database(address))
    store.prepare()
    store.prepare()  # Every process does.
    store.add(Tenant("search", weight=2, keys=(Key(digest(b"sk-search")),)))
    found = Registry(Tenants(database=address), ApiKeys())
    assert found.holder("sk-search") == "search"
    with pytest.raises(ConfigError, match="there is a tenant of this name"):
        store.add(Tenant("search"))
    with pytest.raises(ConfigError, match="has a key that search has"):
        store.add(Tenant("other", keys=(Key(digest(b"sk-search")),)))
    with pytest.raises(ConfigError, match="there is no tenant of this name"):
        store.change("nobody", lambda tenant: tenant)
    store.change("search", lambda tenant: Tenant("search", weight=5))
    found.refresh()
    assert found.tenant("search").weight == 5
    assert found.holder("sk-search") is None
    store.database.close()


def test_many_processes_change_tenants_at_once(address: str) -> None:
    """No change is lost, and none is refused because another one is under way."""
    first = Store(Database(address))
    first.prepare()
    first.add(Tenant("search", weight=1))

    def grow() -> None:
        store = Store(Database(address))
        for _ in range(10):
            store.change("search", lambda each: Tenant("search", weight=each.weight + 1))
        store.database.close()

    threads = [threading.Thread(target=grow) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = first.read()
    assert found is not None
    assert found[1]["search"].weight == 41
    first.database.close()


def test_a_later_version_of_the_tables_is_refused(address: str) -> None:
    store = Store(Database(address))
    store.prepare()
    with store.database.transaction() as transaction:
        transaction.do("UPDATE meta SET value = 99 WHERE name = 'schema'")
    with pytest.raises(ConfigError, match="version 99"):
        Registry(Tenants(database=address), ApiKeys())
    store.database.close()


@pytest.mark.parametrize("data", ['{"name":"search","colour":"red"}', "{", '{"name":"search"'])
def test_a_tenant_in_the_database_that_cannot_be_read_changes_nothing(
    address: str, data: str
) -> None:
    """As one of a later version of this program, which a part of the fleet has already."""
    store = Store(Database(address))
    store.prepare()
    store.add(Tenant("search", keys=(Key(digest(b"sk-search")),)))
    found = Registry(Tenants(database=address), ApiKeys())
    with store.database.transaction() as transaction:
        transaction.do("UPDATE tenant SET data = ?", [data])
        transaction.do("UPDATE meta SET value = value + 1 WHERE name = 'tenants'")
    found.refresh()
    assert found.holder("sk-search") == "search"
    assert metrics.tenants_stale._value.get() == 1
    with pytest.raises(ConfigError, match="'search' cannot be read"):
        Registry(Tenants(database=address), ApiKeys())
    store.database.close()


def test_a_database_that_is_away_stops_a_start_and_not_a_server(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tenants\.database"):
        Registry(Tenants(database="postgresql://nobody@127.0.0.1:1/none"), ApiKeys())
    path = tmp_path / "tenants.sqlite3"
    store = Store(Database(str(path)))
    store.prepare()
    store.add(Tenant("search", keys=(Key(digest(b"sk-search")),)))
    store.database.close()
    found = Registry(Tenants(database=str(path)), ApiKeys())
    path.write_bytes(b"this is no database" * 1000)
    found.refresh()
    assert found.holder("sk-search") == "search"


def test_a_name_is_in_one_place(tmp_path: Path) -> None:
    path = file(tmp_path)
    store = Store(Database(f"{path}.sqlite3"))
    store.prepare()
    store.add(Tenant("search"))
    with pytest.raises(ConfigError, match="is in the file and in the database"):
        registry(path)
    store.database.close()


# --- the commands ---


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = str(tmp_path / "t.sqlite3")

    def run(*words: str) -> str:
        assert main([*words, "--database", database]) == 0
        return capsys.readouterr().out.strip()

    first = run("add", "search", "--weight", "2", "--model", "qwen", "--tokens-per-day", "1000")
    found = Registry(Tenants(database=database), ApiKeys())
    assert found.holder(first) == "search"
    assert first not in Path(database).read_bytes().decode("latin-1")
    second = run("rotate", "search", "--overlap", "24h")
    found.refresh()
    assert [found.holder(key) for key in (first, second)] == ["search", "search"]
    late = Registry(Tenants(database=database), ApiKeys(), clock=lambda: time.time() + 90_000)
    assert [late.holder(key) for key in (first, second)] == [None, "search"]
    run("set", "search", "--tokens-per-day", "0", "--requests-per-minute", "5")
    found.refresh()
    tenant = found.tenant("search")
    assert (tenant.quota.tokens_per_day, tenant.quota.requests_per_minute) == (None, 5)
    assert (tenant.weight, tenant.models) == (2.0, ("qwen",))
    assert "search" in run("list")
    assert "requests_per_minute 5" in run("list")
    run("disable", "search")
    found.refresh()
    assert found.holder(second) is None
    run("enable", "search")
    found.refresh()
    assert found.holder(second) == "search"


def test_rotation_never_makes_a_key_valid_for_longer(tmp_path: Path) -> None:
    database = str(tmp_path / "t.sqlite3")
    soon = datetime.now(UTC) + timedelta(minutes=1)
    gone = datetime.now(UTC) - timedelta(minutes=1)
    store = Store(Database(database))
    store.prepare()
    keys = (Key(digest(b"soon"), soon), Key(digest(b"gone"), gone))
    store.add(Tenant("search", keys=keys))
    main(["rotate", "search", "--overlap", "24h", "--database", database])
    read = store.read()
    assert read is not None
    kept = read[1]["search"].keys
    assert kept[0] == keys[0]
    assert len(kept) == 2  # The one that had expired is gone, the new one is there.
    store.database.close()


def test_overlaps_of_several_rotations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each key ends with the overlap of the first rotation after it, or of a shorter later one."""
    database = str(tmp_path / "t.sqlite3")

    def run(*words: str) -> str:
        assert main([*words, "--database", database]) == 0
        return capsys.readouterr().out.strip()

    keys = [run("add", "search")]
    keys += [run("rotate", "search", "--overlap", overlap) for overlap in ("24h", "1h", "2h")]
    valid = {0: "1111", 0.9: "1111", 1.1: "0011", 2.1: "0001", 25: "0001"}
    for hours, expected in valid.items():
        at_s = time.time() + hours * 3600
        found = Registry(Tenants(database=database), ApiKeys(), clock=lambda at_s=at_s: at_s)  # type: ignore[misc]
        assert "".join(str(int(found.holder(key) == "search")) for key in keys) == expected


def test_a_key_for_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key"]) == 0
    key, lines = capsys.readouterr().out.split("\n", 1)
    found = registry(file(tmp_path, f"tenants:\n  - name: a\n{lines}"))
    assert found.holder(key) == "a"


def test_commands_read_where_tenants_are_from_the_configuration(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("applications: [{args: {tenants: {}}}]")
    with pytest.raises(ConfigError, match=r"tenants\.database"):
        main(["list", "--config", str(config)])
    config.write_text(f"applications: [{{args: {{tenants: {{database: {tmp_path}/t.db}}}}}}]")
    assert main(["list", "--config", str(config)]) == 0
