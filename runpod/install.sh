#!/usr/bin/env bash
# The steps inside the image, which also run on a plain machine:
#
#     runpod/install.sh [system] [python] [application] [check]      all of them, if none is named
#
#   system       packages of the distribution, and the user that the container runs as; needs root
#   python       a virtual environment with the pinned engine and Runpod's SDK
#   application  this repository in it, and its commands where a login shell finds them
#   check        everything is there, in its pinned version
#
# PREFIX (/opt/serve) is where the environment goes, FLAVOUR (gpu) which engine: gpu or cpu.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
prefix=${PREFIX:-/opt/serve}
flavour=${FLAVOUR:-gpu}
python=${PYTHON:-python3}
links=${LINKS:-/usr/local/bin}
venv=$prefix/venv

system() {
  # gcc and Python's headers: Triton compiles a launcher for each kernel when it first runs. g++:
  # torch.compile, where a graph computes something on the host. No CUDA toolkit:
  # serve_app/planning/kernels.py turns off what would be compiled with its nvcc.
  # tini: reaps, and passes signals on, as process 1. wget: KubeRay's probes call it.
  export DEBIAN_FRONTEND=noninteractive
  apt-get update
  apt-get install --yes --no-install-recommends \
    ca-certificates g++ gcc libc6-dev libnuma1 python3 python3-dev python3-venv tini wget
  rm -rf /var/lib/apt/lists/*
  id serve >/dev/null 2>&1 || useradd --uid 1001 --create-home --shell /bin/bash serve
}

python() {
  "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || {
    echo "install.sh: $("$python" --version) is not 3.11 or 3.12" >&2
    exit 1
  }
  mkdir -p "$prefix"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  case $flavour in
    gpu)
      # What pyproject.toml asks for, without the application: this layer outlives its changes.
      "$venv/bin/python" - "$root/pyproject.toml" >"$prefix/requirements.txt" <<'PYTHON'
import sys, tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)
asked = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["gpu"]
print("\n".join([*asked, *project["build-system"]["requires"]]))
PYTHON
      install --constraint "$root/constraints-gpu.txt" --requirement "$prefix/requirements.txt"
      ;;
    cpu)
      # As the Makefile does it, and for its reasons.
      install --no-deps 'torch==2.13.0+cpu' --extra-index-url https://download.pytorch.org/whl/cpu
      install --no-deps --requirement "$root/constraints-cpu.txt"
      ;;
    *)
      echo "install.sh: FLAVOUR=$flavour is not gpu or cpu" >&2
      exit 1
      ;;
  esac
  # The SDK asks for a newer fastapi than vLLM allows, for a local test server that is not used.
  install --no-deps --requirement "$here/requirements.txt"
}

application() {
  # Editable: serve_app/launch/start_haproxy.sh is a script, and keeps its mode.
  install --no-deps --no-build-isolation --editable "$root"
  mkdir -p "$links"
  # A login shell, with which KubeRay starts Ray, forgets the PATH of the image.
  for command in ray serve; do
    ln -sfn "$venv/bin/$command" "$links/$command"
  done
  # Not a link: Python finds its environment by the path that it is called by.
  printf '#!/bin/sh\nexec %s "$@"\n' "$venv/bin/python" >"$links/python"
  chmod 755 "$links/python"
}

check() {
  # In the repository's folder, where the folder runpod/ must not be taken for the SDK.
  (cd "$root" && "$venv/bin/python" - <<'PYTHON'
import sys

import runpod
import serve_app
from serve_app.launch import doctor

checks = [doctor.python(sys.version_info[:2]), doctor.haproxy()]
checks += [doctor.version(name, pin) for name, pin in doctor.PINS.items()]
checks.append(doctor.Check("Runpod SDK", hasattr(runpod, "serverless"), str(runpod.__file__)))
for found in checks:
    print(f"{'ok ' if found.ok else 'BAD'}  {found.name:<12} {found.found}")
sys.exit(not all(found.ok for found in checks))
PYTHON
  )
  "$venv/bin/ray" --version
}

install() {
  "$venv/bin/python" -m pip --disable-pip-version-check --no-cache-dir --quiet install "$@"
}

[ $# -gt 0 ] || set -- system python application check
for step in "$@"; do
  case $step in
    system | python | application | check) "$step" ;;
    *)
      echo "install.sh: no step $step" >&2
      exit 2
      ;;
  esac
done
