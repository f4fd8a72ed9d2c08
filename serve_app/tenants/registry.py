"""Who an API key belongs to: the tenants of file and database, read again while requests run.

Reading happens in a thread, so that no request waits for it. What cannot be read changes nothing:
the tenants that were read last stay in force, and one line says so each time that the reason
changes.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from stat import S_ISREG

from serve_app.errors import ConfigError
from serve_app.gates.keys import KeyRing, Keys, sent_digests
from serve_app.observe import metrics
from serve_app.settings import ApiKeys, Settings, Tenants
from serve_app.tenants.database import Database, DatabaseError
from serve_app.tenants.store import Store
from serve_app.tenants.tenant import Tenant, by_name, read_file

logger = logging.getLogger("serve_app")

_REREAD_S = 1.0

# A key's tenant, and from when on it is refused (Unix time).
_Holders = dict[bytes, tuple[str, float]]


class Registry:
    """The tenants, and their keys. For KeyGate it is what a KeyRing is.

    A key of `api_keys` belongs to the tenant that has its name, and where there is none to one of
    that name with a weight of 1 and no quota.

    Raises:
        ConfigError: file or database cannot be read at the start.
    """

    required = True

    def __init__(
        self,
        source: Tenants,
        api_keys: ApiKeys,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._ring = KeyRing(api_keys)
        self._file = Path(source.file) if source.file is not None else None
        self._store = Store(Database(source.address))
        self._signature: tuple[int, int, int] | None = None
        self._version = -1
        self._in_file: dict[str, Tenant] = {}
        self._in_store: dict[str, Tenant] = {}
        self._tenants: dict[str, Tenant] = {}
        self._holders: _Holders = {}
        self._read_at = time.monotonic()
        self._reading: asyncio.Future[None] | None = None
        self._problem: str | None = None
        try:
            self._store.prepare()
            self._read()
        except DatabaseError as error:
            raise ConfigError("tenants.database", source.address, str(error)) from None

    def holder(self, key: str) -> str | None:
        """The name of the tenant that has this key; None if there is none, or if it is not valid
        now.
        """
        self._reread()
        now_s = self._clock()
        for digest in sent_digests(key):
            name, expires_s = self._holders.get(digest, (None, 0.0))
            if name is not None and now_s < expires_s:
                return name
        name = self._ring.holder(key)
        return None if name is None or self.tenant(name).disabled else name

    def tenant(self, name: str) -> Tenant:
        tenant = self._tenants.get(name)
        return tenant if tenant is not None else Tenant.default(name)

    def __len__(self) -> int:
        return len(self._holders) + len(self._ring)

    def refresh(self) -> None:
        """Read changes. A source that cannot be read is reported, and changes nothing."""
        problem = None
        try:
            self._read()
        except (ConfigError, DatabaseError) as error:
            problem = str(error)
        metrics.tenants_stale.set(problem is not None)
        if problem is not None and problem != self._problem:
            logger.error("tenants were not read, and stay as they were: %s", problem)
        elif problem is None and self._problem is not None:
            logger.warning("tenants are read again")
        self._problem = problem

    def _reread(self) -> None:
        """Read again soon, if the last time was a while ago."""
        now_s = time.monotonic()
        if now_s - self._read_at < _REREAD_S or (self._reading and not self._reading.done()):
            return
        self._read_at = now_s
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.refresh()
            return
        self._reading = loop.run_in_executor(None, self.refresh)

    def _read(self) -> None:
        in_file, signature = self._in_file, self._signature
        if self._file is not None and (signature := _signature(self._file)) != self._signature:
            in_file = read_file(self._file)
        in_store, version = self._in_store, self._version
        if (changed := self._store.read(self._version)) is not None:
            version, in_store = changed
        if in_file is self._in_file and in_store is self._in_store:
            return
        if twice := in_file.keys() & in_store.keys():
            raise ConfigError("tenants", min(twice), "is in the file and in the database")
        tenants = by_name((in_store | in_file).values())
        self._holders = _holders(tenants)
        self._tenants = tenants
        self._in_file, self._signature = in_file, signature
        self._in_store, self._version = in_store, version
        metrics.tenants.set(len(tenants))


def keys_of(settings: Settings) -> Keys:
    """The keys that are accepted with these settings.

    Raises:
        ConfigError: tenants are configured and cannot be read.
    """
    if settings.tenants.configured:
        return Registry(settings.tenants, settings.api_keys)
    return KeyRing(settings.api_keys)


def _holders(tenants: dict[str, Tenant]) -> _Holders:
    holders: _Holders = {}
    for tenant in tenants.values():
        for key in () if tenant.disabled else tenant.keys:
            expires_s = float("inf") if key.expires is None else key.expires.timestamp()
            holders[bytes.fromhex(key.sha256)] = tenant.name, expires_s
    return holders


def _signature(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise ConfigError("tenants.file", str(path), str(error)) from None
    if not S_ISREG(stat.st_mode):  # A pipe would never end.
        raise ConfigError("tenants.file", str(path), "is not a file")
    # A mounted file is replaced by renaming a link: the inode tells where mtime may not.
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)
