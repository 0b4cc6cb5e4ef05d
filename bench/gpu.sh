#!/usr/bin/env bash
# Everything a machine with an NVIDIA GPU and no network can show: the GPU tests, then the measurements, in 8 minutes.
# Usage: bench/gpu.sh [RESULTS_DIR]      (default bench/results/<gpu>/<date>)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
unset TRITON_INTERPRET
$PYTHON -m pip install -q --no-deps --no-build-isolation -e . || echo "not installed; running from the source folders"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr ' ' '-' | tr -cd 'A-Za-z0-9._-')
out=${1:-bench/results/${name:-gpu}/$(date -u +%Y-%m-%d)}
mkdir -p "$out"
nvidia-smi > "$out/nvidia-smi.txt" 2>&1 || true
echo "== tests"
timeout 150 $PYTHON -m pytest tests/test_gpu.py tests/test_rng.py tests/test_affine_step.py tests/test_add_noise.py \
    -m gpu -q -p no:cacheprovider > "$out/tests.txt" 2>&1
tests=$?
timeout 90 $PYTHON -m pytest tests/test_rng.py tests/test_affine_step.py tests/test_add_noise.py tests/test_forward_step.py \
    tests/test_posterior.py tests/test_categorical_step.py tests/test_categorical_noise.py tests/test_categorical_loss.py \
    -m "not gpu and not compiled" -q -p no:cacheprovider > "$out/kernel-tests.txt" 2>&1
kernels=$?
tail -n 3 "$out/tests.txt" "$out/kernel-tests.txt"
echo "== measurements"
timeout 200 $PYTHON -m fastdiff_bench.gpu --out "$out" > "$out/table.md" 2> "$out/errors.txt"
measured=$?
tail -n 5 "$out/errors.txt"
cat "$out/table.md"
echo "tests exit $tests, kernel tests exit $kernels, measurements exit $measured; results in $out"
exit $(( tests || kernels || measured ))
