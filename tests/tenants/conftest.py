"""A SQLite database, and PostgreSQL's where its programs are installed."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_BIN = [Path(p) for p in ("/usr/lib/postgresql/15/bin", "/usr/lib/postgresql/16/bin")]


def _program(name: str) -> str | None:
    found = next((str(folder / name) for folder in _BIN if (folder / name).exists()), None)
    return found or shutil.which(name)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The address of a PostgreSQL server of this session's own, on a socket in its folder."""
    programs = {name: _program(name) for name in ("initdb", "pg_ctl")}
    if not all(programs.values()):
        pytest.skip("initdb and pg_ctl come with Debian's postgresql")
    # Not in pytest's own folder, which other users may not enter.
    folder = Path(tempfile.mkdtemp(prefix="tenants-"))
    data, user = folder / "data", None
    data.mkdir()
    if os.getuid() == 0:  # PostgreSQL does not run as root.
        user = next((u for u in ("postgres", "nobody") if _exists(u)), None)
        if user is None:
            pytest.skip("PostgreSQL does not run as root, and there is no other user")
        for each in (folder, data):
            shutil.chown(each, user)

    def run(*command: str) -> None:
        done = subprocess.run(command, user=user, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    initdb, pg_ctl = programs["initdb"], programs["pg_ctl"]
    assert initdb is not None
    assert pg_ctl is not None
    run(initdb, "-D", str(data), "-A", "trust", "-U", "tenants", "--no-sync")
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    run(pg_ctl, "-D", str(data), "-w", "-o", options, "-l", str(folder / "log"), "start")
    yield f"postgresql://tenants@/postgres?host={folder}"
    run(pg_ctl, "-D", str(data), "-m", "immediate", "stop")
    shutil.rmtree(folder)


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.server)])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield str(tmp_path / "tenants.sqlite3")
        return
    server: str = request.getfixturevalue("postgresql")
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    yield server
