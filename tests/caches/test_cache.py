"""The folder of compiled kernels: whole or not used, and never in the way of a start."""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from serve_app.caches import archive
from serve_app.caches.cache import Broken, Cache, check, files
from serve_app.caches.source import Folder
from tests.examples import examples

KEY = "k" * 24
FILES = {"vllm/a/artifact": b"x" * 5000, "triton/kernel.cubin": b"\x00\x01" * 900, "empty": b""}


def fill(folder: Path, contents: dict[str, bytes] = FILES) -> None:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def sealed(root: Path) -> Path:
    cache = Cache.prepare(root, KEY)
    fill(cache.folder)
    assert cache.seal()
    return cache.folder


def test_a_start_uses_what_the_last_one_sealed(tmp_path: Path) -> None:
    first = Cache.prepare(tmp_path, KEY)
    assert first.origin == "nothing"
    fill(first.folder)
    assert first.seal()
    second = Cache.prepare(tmp_path, KEY)
    assert second.origin == "here"
    assert contents(second.folder) == FILES


def test_of_a_start_that_did_not_end_nothing_is_used(tmp_path: Path) -> None:
    cache = Cache.prepare(tmp_path, KEY)
    fill(cache.folder)
    cache.close()
    assert Cache.prepare(tmp_path, KEY).origin == "nothing"
    assert contents(tmp_path / KEY) == {}


def test_what_came_after_the_seal_is_removed_and_the_rest_used(tmp_path: Path) -> None:
    folder = sealed(tmp_path)
    fill(folder, {"triton/later": b"half"})
    assert Cache.prepare(tmp_path, KEY).origin == "here"
    assert contents(folder) == FILES


def test_what_was_compiled_for_requests_is_kept_by_an_orderly_stop(tmp_path: Path) -> None:
    cache = Cache.prepare(tmp_path, KEY)
    fill(cache.folder)
    assert cache.seal()
    fill(cache.folder, {"triton/later": b"whole"})
    assert cache.seal()
    assert contents(Cache.prepare(tmp_path, KEY).folder) == {**FILES, "triton/later": b"whole"}


def test_what_inductor_tunes_again_while_an_engine_runs_breaks_no_cache(tmp_path: Path) -> None:
    """An engine that is killed then leaves files that the seal does not know."""
    cache = Cache.prepare(tmp_path, KEY)
    tuned = {"vllm/7z/kernel.best_config": b'{"XBLOCK": 1}', "vllm/7z/other.best_config": b"{}"}
    fill(cache.folder, FILES | tuned)
    assert cache.seal()
    again = {"vllm/7z/kernel.best_config": b'{"XBLOCK": 2}', "vllm/8a/new.best_config": b"{}"}
    fill(cache.folder, again | {"vllm/7z/other.best_config": b'{"XBL'})
    found = Cache.prepare(tmp_path, KEY)
    assert found.origin == "here"
    assert contents(found.folder) == FILES | again


@examples(30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_cache_is_never_used(tmp_path: Path, data: st.DataObject) -> None:
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    folder = sealed(root)
    paths = [*(folder / name for name in FILES), root / f"{KEY}.json"]
    for path in data.draw(st.lists(st.sampled_from(paths), min_size=1, unique=True)):
        content = path.read_bytes()
        how = data.draw(st.sampled_from(["cut", "flip", "remove", "grow"]))
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        if how == "cut":
            path.write_bytes(content[:at])
        elif how == "flip" and content:
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        elif how == "grow":
            path.write_bytes(content + b"}")
        else:
            path.unlink()
    changed = contents(folder) != FILES
    found = Cache.prepare(root, KEY)
    assert found.folder.is_dir()
    after = contents(found.folder)
    # Whole, or gone. Where a seal was damaged, so that it lists less, less is used.
    assert all(FILES.get(name) == content for name, content in after.items())
    if changed and found.origin == "here":
        assert after.items() <= FILES.items()
    shutil.rmtree(root)


@examples(30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_archive_is_fetched_whole_or_not_at_all(tmp_path: Path, data: st.DataObject) -> None:
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    source = Folder(root / "source")
    fill(root / "made")
    archive.publish(root / "made", KEY, {"vllm": "0.32.0"}, source)
    name = data.draw(st.sampled_from([f"{KEY}.tar", f"{KEY}.json", ""]))
    if name:
        path = root / "source" / name
        content = path.read_bytes()
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            path.write_bytes(content[:at])
        else:
            path.write_bytes(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
    cache = Cache.prepare(root / "local", KEY, source)
    if cache.origin == "fetched":
        assert contents(cache.folder) == FILES
        if name.endswith(".tar"):
            pytest.fail("a damaged archive was unpacked")
    else:
        assert cache.origin == "nothing"
        assert name, "a whole archive was not taken"
        assert contents(cache.folder) == {}
    left = {p.name for p in (root / "local").iterdir()} - {KEY, f"{KEY}.json", f"{KEY}.lock"}
    assert not left
    shutil.rmtree(root)


def test_a_fetched_cache_is_sealed(tmp_path: Path) -> None:
    fill(tmp_path / "made")
    source = Folder(tmp_path / "source")
    archive.publish(tmp_path / "made", KEY, {}, source)
    Cache.prepare(tmp_path / "local", KEY, source).close()
    shutil.rmtree(tmp_path / "source")
    assert Cache.prepare(tmp_path / "local", KEY, source).origin == "here"


def test_an_archive_for_another_engine_is_not_taken(tmp_path: Path) -> None:
    fill(tmp_path / "made")
    source = Folder(tmp_path / "source")
    archive.publish(tmp_path / "made", "other", {}, source)
    for kind in ("json", "tar"):
        (tmp_path / "source" / f"other.{kind}").rename(tmp_path / "source" / f"{KEY}.{kind}")
    with pytest.raises(archive.ForeignArchive, match="another engine"):
        archive.fetch(source, KEY, tmp_path / "into")
    assert Cache.prepare(tmp_path / "local", KEY, source).origin == "nothing"


def test_an_archive_does_not_write_elsewhere(tmp_path: Path) -> None:
    import hashlib
    import tarfile

    (tmp_path / "evil").write_text("x")
    folder = tmp_path / "source"
    folder.mkdir()
    with tarfile.open(folder / f"{KEY}.tar", "w") as tar:
        tar.add(tmp_path / "evil", arcname="../../evil-came-out")
    packed = (folder / f"{KEY}.tar").read_bytes()
    about = {"schema": 1, "key": KEY, "bytes": len(packed)}
    about["sha256"] = hashlib.sha256(packed).hexdigest()
    (folder / f"{KEY}.json").write_text(json.dumps(about))
    assert Cache.prepare(tmp_path / "local", KEY, Folder(folder)).origin == "nothing"
    assert not [*tmp_path.rglob("evil-came-out")]


def test_a_slow_source_is_given_up(tmp_path: Path) -> None:
    fill(tmp_path / "made")
    source = Folder(tmp_path / "source")
    archive.publish(tmp_path / "made", KEY, {}, source)
    with pytest.raises(TimeoutError):
        archive.fetch(source, KEY, tmp_path / "into", within_s=-1.0)
    assert not (tmp_path / "into").exists()


def test_a_folder_that_cannot_be_written_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        Cache.prepare(tmp_path / "file" / "below", KEY)


def test_the_environment_leaves_what_somebody_set(tmp_path: Path) -> None:
    cache = Cache.prepare(tmp_path, KEY)
    found = cache.environment({"TRITON_CACHE_DIR": "/mine"})
    assert "TRITON_CACHE_DIR" not in found
    assert found["VLLM_CACHE_ROOT"] == str(tmp_path / KEY / "vllm")
    assert found["VLLM_ENABLE_STARTUP_PLAN"] == "1"


# --- replicas that start together -----------------------------------------------------------

_START = """
import random, sys, time
from pathlib import Path
from serve_app.caches.cache import Cache
root, name, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rng = random.Random(seed)
time.sleep(rng.random() * 0.1)
cache = Cache.prepare(root, "together")
for number in range(5):
    cache.folder.mkdir(exist_ok=True)
    path = cache.folder / f"kernel-{number}"
    if not path.exists():
        # As the compilers do it.
        fresh = cache.folder / f".{name}-{number}"
        fresh.write_bytes(bytes([number]) * 1000)
        fresh.replace(path)
    time.sleep(rng.random() * 0.05)
cache.seal()
"""


@pytest.mark.parametrize("seed", range(3))
def test_replicas_that_start_together_share_one(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", _START, str(tmp_path), str(number), str(rng.random())[2:8]]
        )
        for number in range(4)
    ]
    assert [start.wait(60) for start in starts] == [0] * 4
    # Whoever was ready last sealed it, with all files whole.
    assert Cache.prepare(tmp_path, "together").origin == "here"
    found = contents(tmp_path / "together")
    assert found == {f"kernel-{n}": bytes([n]) * 1000 for n in range(5)}


def test_one_who_starts_alone_does_not_take_it_from_one_who_starts(tmp_path: Path) -> None:
    folder = sealed(tmp_path)
    first = Cache.prepare(tmp_path, KEY)
    fill(folder, {"triton/new": b"being written"})
    second = Cache.prepare(tmp_path, KEY)
    assert second.origin == "here"
    assert "triton/new" in contents(folder)
    assert not second.seal()  # The first one may be writing.
    assert first.seal()
    check(folder)
    assert "triton/new" in files(folder)


def test_a_folder_without_a_seal_is_broken(tmp_path: Path) -> None:
    fill(tmp_path / KEY)
    with pytest.raises(Broken, match="did not end"):
        check(tmp_path / KEY)
