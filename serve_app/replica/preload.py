"""What an engine process imports. The fork server imports this module before it forks the first."""

import importlib

from serve_app.replica.forkserver import undisturbed

# Ray is what the main module of a Ray worker imports, which a child of it does again.
MODULES = ("ray", "vllm.v1.engine.async_llm", "vllm.v1.worker.gpu_worker")

with undisturbed():
    for _name in MODULES:
        importlib.import_module(_name)
