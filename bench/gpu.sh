#!/usr/bin/env bash
# Everything a machine with an NVIDIA GPU and no network can show: the GPU tests, then the measurements, in 8 minutes.
# Usage: bench/gpu.sh [RESULTS_DIR]      (default bench/results/<gpu>/<date>)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
unset TRITON_INTERPRET
$PYTHON -c 'import fastdiff' 2>/dev/null || $PYTHON -m pip install -q --no-deps --no-build-isolation -e . || exit 1
name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr ' ' '-' | tr -cd 'A-Za-z0-9._-')
out=${1:-bench/results/${name:-gpu}/$(date -u +%Y-%m-%d)}
mkdir -p "$out"
nvidia-smi > "$out/nvidia-smi.txt" 2>&1 || true
echo "== tests (at most 4 minutes)"
timeout 240 $PYTHON -m pytest tests -m gpu -q -p no:cacheprovider > "$out/tests.txt" 2>&1
tests=$?
timeout 120 $PYTHON -m pytest tests/test_rng.py tests/test_affine_step.py tests/test_add_noise.py tests/test_forward_step.py \
    tests/test_posterior.py -q -p no:cacheprovider > "$out/kernel-tests.txt" 2>&1
kernels=$?
tail -n 3 "$out/tests.txt" "$out/kernel-tests.txt"
echo "== measurements"
timeout 240 $PYTHON -m fastdiff_bench.gpu --out "$out" > "$out/table.md" 2> "$out/errors.txt"
measured=$?
tail -n 5 "$out/errors.txt"
cat "$out/table.md"
echo "tests exit $tests, kernel tests exit $kernels, measurements exit $measured; results in $out"
exit $(( tests || kernels || measured ))
