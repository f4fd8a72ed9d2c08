"""`python -m serve_app observe`: Prometheus, and Grafana or the status page, beside `make serve`.

Runs until a signal, and then ends what it started. Everything listens on loopback, on the
ports where Ray's dashboard looks for Prometheus and Grafana.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import uvicorn
import yaml

from serve_app import processes
from serve_app.errors import ConfigError
from serve_app.monitoring import status
from serve_app.monitoring.prometheus import Prometheus, configuration

HERE = Path(__file__).parent
_HOST = "127.0.0.1"
_START_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 stopped, 1 a program ended by itself, 2 something to mend."""
    parser = argparse.ArgumentParser(prog="python -m serve_app observe", description=__doc__)
    parser.add_argument("--prometheus-port", type=int, default=9090, help="default: %(default)s")
    parser.add_argument("--grafana-port", type=int, default=3000, help="default: %(default)s")
    parser.add_argument("--status-port", type=int, default=8266, help="default: %(default)s")
    # As Ray Serve reads it.
    haproxy = f"127.0.0.1:{os.environ.get('RAY_SERVE_HAPROXY_METRICS_PORT', 9101)}"
    parser.add_argument("--haproxy", default=haproxy, help="its metrics; default: %(default)s")
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder in which measurements are kept; by default they are deleted at the end",
    )
    options = parser.parse_args(argv)
    # uvicorn passes a signal on once it has stopped: what was started is to be ended then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with (
        contextlib.suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory(prefix="observe.") as made,
    ):
        folder = Path(made)
        url = f"http://{_HOST}:{options.prometheus_port}"
        with _prometheus(folder, options, url), _grafana(folder, options, url) as grafana:
            page = f"http://{_HOST}:{options.status_port}"
            say(f"Prometheus  {url}  (alerts: {url}/alerts)")
            say(f"Grafana     {grafana or 'is not installed; dashboards: serve_app/monitoring'}")
            say(f"status      {page}")
            _serve(Prometheus(url), options.status_port)
    return 0


def say(text: str) -> None:
    print(text, flush=True)


def discovery() -> Path:
    """The file in which Ray lists the scrape targets of the cluster on this machine.

    Raises:
        ConfigError: Ray does not run here.
    """
    base = os.environ.get("RAY_TMPDIR", tempfile.gettempdir())
    path = Path(base) / "ray" / "prom_metrics_service_discovery.json"
    if not path.exists():
        raise ConfigError("RAY_TMPDIR", base, "no Ray cluster has run here; start `make serve`")
    return path


@contextlib.contextmanager
def _prometheus(folder: Path, options: argparse.Namespace, url: str) -> Iterator[None]:
    program = shutil.which("prometheus")
    if program is None:
        raise ConfigError(
            "PATH", os.environ.get("PATH"), "no prometheus; Debian and Ubuntu have the package"
        )
    config = folder / "prometheus.yml"
    config.write_text(configuration(discovery(), options.haproxy))
    command = [
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={options.keep or folder / 'prometheus'}",
        f"--web.listen-address={_HOST}:{options.prometheus_port}",
        "--storage.tsdb.retention.time=7d",
        "--log.level=warn",
    ]
    with _running(command, f"{url}/-/ready"):
        yield


@contextlib.contextmanager
def _grafana(folder: Path, options: argparse.Namespace, prometheus: str) -> Iterator[str | None]:
    """Grafana with our dashboards and Ray's, where it is installed; its address, or None."""
    program = shutil.which("grafana-server") or shutil.which("grafana")
    if program is None:
        yield None
        return
    home = Path(os.environ.get("GF_PATHS_HOME", "/usr/share/grafana"))
    provisioning = folder / "provisioning"
    source = {"name": "Prometheus", "uid": "prometheus", "type": "prometheus", "url": prometheus}
    source |= {"access": "proxy", "isDefault": True}  # type: ignore[dict-item]
    folders = {"qwen-ray-serve": HERE, "Ray": discovery().parent / "session_latest" / "metrics"}
    providers = [
        {"name": name, "folder": name, "type": "file", "options": {"path": str(path)}}
        for name, path in folders.items()
    ]
    _write(provisioning / "datasources" / "all.yaml", {"apiVersion": 1, "datasources": [source]})
    _write(provisioning / "dashboards" / "all.yaml", {"apiVersion": 1, "providers": providers})
    url = f"http://{_HOST}:{options.grafana_port}"
    command = [program, *(["server"] if program.endswith("grafana") else []), f"--homepath={home}"]
    environment = {
        "GF_PATHS_DATA": str(folder / "grafana"),
        "GF_PATHS_PROVISIONING": str(provisioning),
        "GF_SERVER_HTTP_ADDR": _HOST,
        "GF_SERVER_HTTP_PORT": str(options.grafana_port),
        # Ray's dashboard shows panels in frames.
        "GF_SECURITY_ALLOW_EMBEDDING": "true",
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_LOG_LEVEL": "warn",
    }
    with _running(command, f"{url}/api/health", environment):
        yield url


def _write(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(dict(content)))


@contextlib.contextmanager
def _running(
    command: Sequence[str], ready: str, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """A program, from when it answers at `ready` on; it is ended afterwards.

    Raises:
        ConfigError: it ended by itself, or was not ready in time. It has said why.
    """
    # A group of its own: a Ctrl-C at the keyboard is ours to pass on.
    process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, process_group=0)
    try:
        until_s = time.monotonic() + _START_S
        while not _answers(ready):
            if process.poll() is not None or time.monotonic() > until_s:
                raise ConfigError("observe", " ".join(command), "did not start")
            time.sleep(0.1)
        yield
    finally:
        processes.end(process, 10)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _serve(prometheus: Prometheus, port: int) -> None:
    """The status page, until SIGINT or SIGTERM."""
    config = uvicorn.Config(status.app(prometheus), host=_HOST, port=port, log_level="warning")
    uvicorn.Server(config).run()


if __name__ == "__main__":
    sys.exit(main())
