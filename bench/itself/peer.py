"""`vllm bench serve` in a process of its own, to be run again and again beside this benchmark.

    with Peer() as peer:
        result = peer.run(["--base-url", url, "--model", name, ...], requests)

It is the code of vLLM, called at `vllm.benchmarks.serve.main`: the CPU build has no metadata under
the name that the command line asks for. Only where its requests come from is changed, since its
data sets need a tokenizer and pandas, and both sides are to send the same. vLLM is imported once,
which takes longer than many a measurement.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}


class Peer:
    """A process that runs `vllm bench serve` on demand. Use it as a context manager."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="peer.")
        self._log = open(Path(self._folder.name) / "log", "wb")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "bench.itself.peer"],
            env={**os.environ, **QUIET},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._answer()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
        self._folder.cleanup()

    def run(self, arguments: list[str], requests: list[tuple[str, int]]) -> dict[str, Any]:
        """One run of `vllm bench serve`.

        Args:
            arguments: of the command line; the number of prompts, the data set and where the
                result goes are added.
            requests: prompt and number of output tokens of each.

        Returns:
            What `--save-result --save-detailed` writes, with `cpu_s` and `wall_s` of the run.

        Raises:
            RuntimeError: it failed; the end of its output is in the message.
        """
        assert self._process.stdin
        order = {"folder": self._folder.name, "arguments": arguments, "requests": requests}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        path = Path(answer.pop("path"))
        result = {**json.loads(path.read_text()), **answer}
        path.unlink()
        return result

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(10)
            log = (Path(self._folder.name) / "log").read_text()
            raise RuntimeError(f"vllm bench serve failed: {log[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _run(order: dict[str, Any]) -> dict[str, Any]:
    from vllm.benchmarks import serve
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    samples = [
        SampleRequest(prompt=prompt, prompt_len=len(prompt.split()), expected_output_len=tokens)
        for prompt, tokens in order["requests"]
    ]
    serve.get_samples = lambda args, tokenizer: samples
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    path = Path(order["folder"]) / "result.json"
    arguments = [*order["arguments"], "--num-prompts", str(len(samples)), "--dataset-name"]
    arguments += ["custom", "--skip-tokenizer-init", "--disable-tqdm", "--save-result"]
    arguments += ["--save-detailed", "--result-dir", order["folder"]]
    parsed = parser.parse_args([*arguments, "--result-filename", path.name])
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    serve.main(parsed)
    return {
        "path": str(path),
        "cpu_s": time.process_time() - cpu_s,
        "wall_s": time.perf_counter() - wall_s,
    }


def main() -> None:
    """Orders come as lines of JSON, and so do answers; what vLLM prints goes to the log."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        import vllm.benchmarks.serve  # noqa: F401

        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(_run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
