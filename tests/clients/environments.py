"""An environment of its own for each client: what it pins would not fit beside the engine."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"
ROOT = PROGRAMS.parent.parent.parent
# Kept between runs, like .venv.
_FOLDER = ROOT / ".venv-clients"


@dataclass(frozen=True)
class Client:
    """A client library.

    Attributes:
        program: in the folder programs, what asks the server with it.
        packages: what it needs, pinned.
    """

    program: str
    packages: tuple[str, ...]

    def command(self) -> list[str]:
        """What runs the program, after installing what it needs."""
        return self._node() if self.program.endswith(".mjs") else self._python()

    def _python(self) -> list[str]:
        folder = _FOLDER / Path(self.program).stem
        python = folder / "bin" / "python"
        if self._missing(folder):
            _run([sys.executable, "-m", "venv", "--clear", str(folder)])
            _run([str(python), "-m", "pip", "install", "--quiet", *self.packages])
            self._installed(folder)
        return [str(python), str(PROGRAMS / self.program)]

    def _node(self) -> list[str]:
        folder = _FOLDER / Path(self.program).stem
        if self._missing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            install = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund"]
            _run([*install, "--prefix", str(folder), *self.packages])
            self._installed(folder)
        # Node looks for packages beside the program.
        copy = folder / self.program
        copy.write_text((PROGRAMS / self.program).read_text())
        return ["node", str(copy)]

    def _missing(self, folder: Path) -> bool:
        stamp = folder / "packages"
        return not stamp.is_file() or stamp.read_text().split() != list(self.packages)

    def _installed(self, folder: Path) -> None:
        (folder / "packages").write_text("\n".join(self.packages))


CLIENTS = (
    Client("openai_sdk.py", ("openai==3.57.0",)),
    Client("anthropic_sdk.py", ("anthropic==2.14.0",)),
    Client("langchain_suite.py", ("langchain-openai==1.7.4", "langchain-tests==1.1.9")),
    Client("litellm_sdk.py", ("litellm==1.110.2",)),
    Client("instructor_sdk.py", ("instructor==1.17.0",)),
    Client("pydantic_ai_sdk.py", ("pydantic-ai-slim[openai]==2.68.0",)),
    Client(
        "ai_sdk.mjs",
        ("ai@6.0.326", "@ai-sdk/openai@3.0.141", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7"),
    ),
)


def _run(command: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=900)
