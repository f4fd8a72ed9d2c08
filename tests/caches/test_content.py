"""The digest of a model's files by content."""

import os
from pathlib import Path

import pytest

from serve_app.caches import content


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "digests.json"


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read from now on."""
    read: list[str] = []
    digest = content.digest

    def counted(path: Path) -> str:
        read.append(path.name)
        return digest(path)

    monkeypatch.setattr(content, "digest", counted)
    return read


def test_weights_of_the_same_shape_differ_by_content(model: Path, notes: Path) -> None:
    before = content.digest_of(model, notes)
    info = (model / "model.safetensors").stat()
    (model / "model.safetensors").write_bytes(b"1" * 1000)
    # As a copy that preserves times.
    os.utime(model / "model.safetensors", ns=(info.st_atime_ns, info.st_mtime_ns))
    assert content.digest_of(model, notes) != before


def test_the_same_files_elsewhere_have_the_same_digest(model: Path, notes: Path) -> None:
    before = content.digest_of(model, notes)
    assert content.digest_of(model.rename(model.with_name("elsewhere")), notes) == before


def test_files_that_did_not_change_are_not_read_again(
    model: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content.digest_of(model, notes)
    read = counting(monkeypatch)
    assert content.digest_of(model, notes) == before
    assert read == []
    (model / "config.json").write_text("[]")
    assert content.digest_of(model, notes) != before
    assert read == ["config.json"]


def test_a_file_of_the_hugging_face_cache_is_not_read(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = counting(monkeypatch)
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    digests = []
    for name in ("a" * 64, "b" * 64):
        (blobs / name).write_bytes(b"weights")
        (snapshot / "model.safetensors").unlink(missing_ok=True)
        (snapshot / "model.safetensors").symlink_to(blobs / name)
        digests.append(content.digest_of(snapshot, notes))
    assert read == []
    assert digests[0] != digests[1]
    # A link to a folder of that name whose files are not named by their content.
    (blobs / "weights").write_bytes(b"weights")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(blobs / "weights")
    content.digest_of(snapshot, notes)
    assert read == ["model.safetensors"]


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"x', b'{"/": 1}'])
def test_damaged_notes_are_as_none(model: Path, notes: Path, damage: bytes) -> None:
    before = content.digest_of(model, notes)
    notes.write_bytes(damage)
    assert content.digest_of(model, notes) == before


def test_notes_of_files_that_are_gone_are_forgotten(model: Path, notes: Path) -> None:
    content.digest_of(model, notes)
    (model / "model.safetensors").unlink()
    (model / "config.json").write_text("[]")
    content.digest_of(model, notes)
    assert "safetensors" not in notes.read_text()
