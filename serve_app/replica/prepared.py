"""What every replica imports and builds alike.

The zygote of engines imports this (launch/zygote.py). The processes of an engine are forked from
that as well, so it includes what preload.py has.
"""

import importlib

from vllm.platforms import current_platform

from serve_app.replica import arguments, engine, preload  # noqa: F401

# Of Ray Serve's replicas.
importlib.import_module("ray.serve._private.replica")
importlib.import_module("serve_app.replica.deployment")
if current_platform.is_cpu():
    importlib.import_module("vllm.v1.worker.cpu_worker")
arguments.parser()
