#!/usr/bin/env bash
# Checks what needs a GPU, on a machine that has one for a quarter of an hour: no Java, no registry, no root.
#
#   scripts/gpu_check.sh [FOLDER]    builds Horovod with NCCL, runs scripts/gpu_check.py and prints its report
#   scripts/gpu_check.sh --dry-run   runs the checks with what is installed; without a GPU it says what it skips
#
# FOLDER (default: build/gpu-check) holds what the machine's Python lacks, fetched beforehand where there is a
# registry: Horovod's source archive and wheels for that Python.
#   pip download --no-deps --no-binary :all: --no-build-isolation -d build/gpu-check horovod==0.28.1
#   pip download --only-binary :all: --python-version 3.12 -d build/gpu-check \
#     cloudpickle packaging platformdirs psutil tqdm setuptools wheel pyyaml cffi pycparser
# PYTHON names another interpreter than python3; torch has to be there, with nvcc of its CUDA version.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

if [[ ${1:-} == --dry-run ]]; then
  exec timeout 300 "$python" scripts/gpu_check.py
fi

command -v nvidia-smi >/dev/null ||
  { echo "error: no nvidia-smi, so no GPU: --dry-run does what can be done without" >&2; exit 1; }
carried=$(realpath "${1:-build/gpu-check}")
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PIP_NO_INDEX=1 PIP_FIND_LINKS=$carried XDG_CACHE_HOME=$site/cache PYTHONPATH=$site/packages:$PWD

nvidia-smi
shopt -s nullglob
wheels=("$carried"/*.whl)
if ((${#wheels[@]})); then
  "$python" -m pip install --quiet --no-deps --target "$site/packages" "${wheels[@]}"
fi
# The GPU's own architecture only: Horovod's kernels are compiled for all of them otherwise.
architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
export HOROVOD_BUILD_CUDA_CC_LIST=$architecture
began=$SECONDS
timeout 300 "$python" - "$site/packages" <<'PROGRAM'
import sys
from pathlib import Path
from horovodrunner.horovod_build import build_horovod
build_horovod(target=Path(sys.argv[1]))
PROGRAM
echo "Horovod was built, verified and installed in $((SECONDS - began)) s"
timeout 300 "$python" scripts/gpu_check.py
