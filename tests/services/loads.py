"""The loads of replicas that several tests report."""

from serve_app.scaling.types import ReplicaLoad

BUSY = ReplicaLoad(
    running=40,
    max_running=64,
    decode_tokens_per_s=2000,
    steps_per_s=30,
    busy=0.9,
    arrivals_per_s=9,
    finished_per_s=9,
    ttft_s=0.3,
    itl_s=0.03,
)
