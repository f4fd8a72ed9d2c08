"""Where the weights are: Runpod's cached models, a network volume, or the hub.

Runpod puts a cached model at /runpod-volume/huggingface-cache/hub before a worker starts, in the
layout of the hub's own cache. A network volume is mounted at the same place in a worker, and
at /workspace in a pod unless its mount says otherwise. Weights that are fetched go to a volume
that can be written, so that the next start finds them; weights that are there need no hub.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from logs import show

CACHE = Path("huggingface-cache") / "hub"
_ROOTS = ("/runpod-volume", "/workspace")
# What serve_app fetches of a repository.
_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
# Engine arguments that can name a second repository of the hub.
_MORE_REPOSITORIES = frozenset(
    {"tokenizer", "hf_config_path", "lora_modules", "default_mm_loras", "speculative_config"}
)


def volumes(environ: Mapping[str, str]) -> list[Path]:
    """The mounted volumes, the one that BASE_PATH names first."""
    roots = dict.fromkeys([environ.get("BASE_PATH") or _ROOTS[0], *_ROOTS])
    return [Path(root) for root in roots if Path(root).is_dir()]


def caches(environ: Mapping[str, str]) -> list[Path]:
    """Folders in the layout of the hub's cache, in the order in which to look."""
    home = environ.get("HF_HOME")
    own = [Path(home) / "hub"] if home else [Path.home() / ".cache" / "huggingface" / "hub"]
    return [root / CACHE for root in volumes(environ)] + own


def writable(environ: Mapping[str, str]) -> Path:
    """Where to fetch to: the first volume that can be written, else this machine's own cache."""
    *shared, own = caches(environ)
    for folder in shared:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return own


def is_hub_id(model: str) -> bool:
    return not model.startswith(("/", ".", "~", "s3://")) and model.count("/") == 1


def find(model: str, revision: str | None, folders: Sequence[Path]) -> Path | None:
    """The folder with the whole model, or None."""
    wanted = "models--" + model.replace("/", "--")
    for folder in folders:
        for repository in _named(folder, wanted):
            if (snapshot := _snapshot(repository, revision or "main")) and whole(snapshot):
                return snapshot
    return None


def _named(folder: Path, wanted: str) -> list[Path]:
    exact = folder / wanted
    if exact.is_dir():
        return [exact]
    try:
        # Runpod writes the name as it was typed; the hub does not tell case apart.
        return [entry for entry in folder.iterdir() if entry.name.lower() == wanted.lower()]
    except OSError:
        return []


def _snapshot(repository: Path, revision: str) -> Path | None:
    """The files of a branch, tag or commit of one repository."""
    reference = repository / "refs" / revision
    try:
        commit = reference.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        commit = revision
    if (snapshot := repository / "snapshots" / commit).is_dir():
        return snapshot
    # A cached model may come without refs: one snapshot is then the one that is meant.
    try:
        only = list((repository / "snapshots").iterdir())
    except OSError:
        return None
    return only[0] if len(only) == 1 and revision == "main" else None


def whole(snapshot: Path) -> bool:
    """Whether a folder holds config.json and all weights; links to nowhere do not count."""
    if not (snapshot / "config.json").is_file():
        return False
    index = snapshot / "model.safetensors.index.json"
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError:
        return any(shard.is_file() for shard in snapshot.glob("*.safetensors"))
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return all((snapshot / shard).is_file() for shard in shards)


def fetch(model: str, revision: str | None, folder: Path) -> Path:
    """Bring the model to `folder`; what is there already is not fetched again.

    Raises:
        RuntimeError: in one sentence.
    """
    # Imported late: it reads its environment when it is imported.
    from huggingface_hub import snapshot_download

    try:
        path = Path(
            snapshot_download(model, revision=revision, cache_dir=folder, allow_patterns=_PATTERNS)
        )
    except Exception as error:
        raise RuntimeError(f"{model} cannot be fetched: {_first_line(error)}") from error
    if not whole(path):
        # Where the hub does not answer, what is there is returned, however little.
        raise RuntimeError(f"{model} cannot be fetched: only a part of it came to {path}")
    return path


def configuration(model: str, revision: str | None, folder: Path) -> Path | None:
    """A folder with the model's config.json, which is fetched before all else; None without it."""
    from huggingface_hub import snapshot_download

    try:
        path = Path(
            snapshot_download(
                model, revision=revision, cache_dir=folder, allow_patterns=["config.json"]
            )
        )
    except Exception as error:
        # `fetch` meets the same, and its failure counts.
        show(f"warning: {model} is not sized: {_first_line(error)}")
        return None
    return path if (path / "config.json").is_file() else None


def missing_bytes(model: str, revision: str | None, folder: Path) -> int | None:
    """How much of the model `fetch` would bring; None where the hub does not say."""
    from huggingface_hub import snapshot_download

    try:
        files = snapshot_download(
            model, revision=revision, cache_dir=folder, allow_patterns=_PATTERNS, dry_run=True
        )
        return sum(file.file_size or 0 for file in files if file.will_download)
    except Exception as error:
        show(f"warning: how large {model} is, is not known: {_first_line(error)}")
        return None


def free_bytes(folder: Path) -> int:
    """What the disk below a folder, which need not be there yet, has room for."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return shutil.disk_usage(existing).free


def _first_line(error: Exception) -> str:
    """The hub's own errors run over many lines; the first says which it was."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def offline(engine: Mapping[str, object]) -> bool:
    """Whether the hub can be left alone, once the model itself is a folder."""
    return not _MORE_REPOSITORIES & engine.keys()
