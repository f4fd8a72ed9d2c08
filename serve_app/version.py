"""The version: the tag in a checkout, and the release elsewhere, for example in an image.

Tags are named v1.2.3. Between two of them, and in a clone without tags, the commit is stated too.
"""

import re
import subprocess
from pathlib import Path

RELEASE = "0.1.0"  # The newest tag. Packages and images have this version.


def version() -> str:
    """Such as 0.1.0, or 0.1.0+12.g047b457.dirty: twelve commits and an edit after that tag."""
    root = Path(__file__).resolve().parent.parent
    # Installed into somebody else's repository it would have that repository's commits.
    if _git(root, "rev-parse", "--show-toplevel") != str(root):
        return RELEASE
    described = _git(root, "describe", "--tags", "--match=v[0-9]*", "--always", "--dirty")
    return from_description(described)


def from_description(described: str) -> str:
    """The version that `git describe --tags --always --dirty` states.

    It names the tag, the number of commits since and the commit; without a tag the commit alone.
    """
    match = re.fullmatch(r"(?:v(\d[^-]*)(?:-(\d+)-g)?)?([0-9a-f]{4,40})?(-dirty)?", described)
    if not described or match is None:
        return RELEASE
    tag, commits, commit, dirty = match.groups()
    local = [*([commits] if commits else []), *([f"g{commit}"] if commit else [])]
    local += ["dirty"] if dirty else []
    return (tag or RELEASE) + ("+" + ".".join(local) if local else "")


def _git(folder: Path, *words: str) -> str:
    """What git prints; nothing where there is no git, or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
