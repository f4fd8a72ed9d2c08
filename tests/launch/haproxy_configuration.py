"""The configuration that the installed Ray Serve writes for HAProxy."""

from pathlib import Path

from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig


def generated(folder: Path, replicas: int = 2, applications: bool = True) -> Path:
    """A file with the configuration for one application of so many replicas, or for none."""
    servers = [
        ServerConfig(name=f"llm_engine_{place}", host="127.0.0.1", port=30000 + place)
        for place in range(replicas)
    ]
    backend = BackendConfig(name="http-llm", path_prefix="/", app_name="llm", servers=servers)
    path = folder / "haproxy.cfg"
    config = HAProxyConfig(socket_path=str(folder / "admin.sock"), stats_port=8404)
    backends = {"http-llm": backend} if applications else {}
    api = HAProxyApi(config, backends, config_file_path=str(path))
    api._generate_config_file_internal()
    return path
