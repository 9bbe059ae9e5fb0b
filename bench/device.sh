#!/usr/bin/env bash
# Everything worth doing on a GPU, in one go under ten minutes: build for this GPU, the tests on it, compute-sanitizer on small
# inputs, copy bandwidth, and the benches. The results go to bench/results and, where OUT is set, to $OUT too.
#
#   bench/device.sh            all of it
#   bench/device.sh bench      build and benches alone
#
# Needs: nvcc, cmake, ninja, and a Python (PYTHON, default python3) with a CUDA build of torch >= 2.10, pytest,
# pytest-benchmark and hypothesis. Nothing is downloaded: the peers of bench/requirements.txt are measured where they are installed.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
what=${1:-all}

"$PYTHON" - <<'PY' || exit 1
import sys, torch
if not torch.cuda.is_available():
    sys.exit("device.sh: torch sees no GPU here")
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
PY
architecture=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')

echo "==> build for sm_$architecture"
cmake -S . -B build/device -G Ninja -DPython_EXECUTABLE="$(command -v "$PYTHON")" -DFASTSEL_CUDA=1 \
  -DFASTSEL_CUDA_ARCHS="$architecture-real" -DFASTSEL_TESTS=OFF >/dev/null
cmake --build build/device

if [ "$what" = all ]; then
  echo "==> tests on cuda"
  "$PYTHON" -m pytest -q tests -k "cuda" \
    --ignore=tests/test_simt.py --ignore=tests/test_core.py --ignore=tests/test_topk_kernels.py --ignore=tests/test_adaselection_kernels.py \
    --ignore=tests/test_ranks.py --ignore-glob="tests/test_integrations_*.py" --ignore=tests/test_examples.py
  echo "==> compute-sanitizer"
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck initcheck; do
      echo "--- $tool"
      PYTHONPATH=. compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" bench/sanitize.py
    done
  else
    echo "compute-sanitizer was not found: not run"
  fi
fi

echo "==> benches"
"$PYTHON" -m pytest bench -q -k cuda -o python_files="bench_*.py" -o python_functions="bench_*" \
  -o pythonpath="bench tests" --benchmark-only --benchmark-disable-gc
if [ -n "${OUT:-}" ]; then cp bench/results/*.json "$OUT"/; fi
