#!/bin/bash
# Liveness of a worker, for Kubernetes' probe: Ray's processes, the GPUs, and every replica's server
# must answer, each within its time; what they answer is not asked. An engine that hangs is noticed
# and replaced by the application's own supervisor within seconds: a 503 meanwhile is an answer. What
# this finds is what the supervisor cannot mend: its own process stuck, or a GPU that fell off.
# The pod is then replaced, and its node too if it reports the GPU as broken.
set -u

wget --tries=1 --timeout=5 --quiet --output-document=- \
  http://localhost:52365/api/local_raylet_healthz | grep --quiet success || {
  echo "the raylet does not answer"
  exit 1
}

if command -v nvidia-smi >/dev/null; then
  timeout 15 nvidia-smi --query-gpu=uuid --format=csv,noheader >/dev/null || {
    echo "the GPUs do not answer"
    exit 1
  }
fi

# Ray Serve gives replicas ports from here on, and there is a replica for each GPU at most.
first=${RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT:-30000}
for port in $(seq "$first" $((first + 9))); do
  (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null || continue
  status=0
  wget --tries=1 --timeout=10 --quiet --output-document=/dev/null \
    "http://localhost:$port/health" || status=$?
  # 8: it answered with an error.
  if [ "$status" -ne 0 ] && [ "$status" -ne 8 ]; then
    echo "the replica on port $port does not answer"
    exit 1
  fi
done
