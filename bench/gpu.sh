#!/usr/bin/env bash
# Everything a machine with an NVIDIA GPU and no network can show, in 8 minutes: the GPU tests, then the main table
# (launches, host time, energy, peers), whole loops of small networks, and the roofline of every kernel.
# Usage: bench/gpu.sh [RESULTS_DIR]      (default $OUT, else bench/results/<gpu>/<date>)
# What was measured before a step ran out of time is kept.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
unset TRITON_INTERPRET
$PYTHON -m pip install -q --no-deps --no-build-isolation -e . || echo "not installed; running from the source folders"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
export MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=1000000000 KINETO_LOG_LEVEL=99
name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr ' ' '-' | tr -cd 'A-Za-z0-9._-')
out=${1:-${OUT:-bench/results/${name:-gpu}/$(date -u +%Y-%m-%d)}}
mkdir -p "$out"
nvidia-smi > "$out/nvidia-smi.txt" 2>&1 || true
failed=0
plots=()
$PYTHON -c "import matplotlib" 2> /dev/null && plots=(--plot "$out")

run() { # run SECONDS NAME COMMAND...: output into NAME.txt, its last lines here
    local limit=$1 name=$2 code
    shift 2
    echo "== $name"
    local begin=$SECONDS
    timeout -s INT -k 10 "$limit" "$@" > "$out/$name.txt" 2> "$out/$name.log"
    code=$?
    [ "$code" = 0 ] && [ ! -s "$out/$name.log" ] && rm -f "$out/$name.log"
    echo "exit $code after $((SECONDS - begin)) s"
    [ "$code" = 0 ] || { failed=1; tail -n 5 "$out/$name.log" 2> /dev/null; }
}

run 90 tests $PYTHON -m pytest tests/test_gpu*.py tests/test_rng.py tests/test_affine_step.py tests/test_add_noise.py \
    tests/test_denoising_loss.py -m gpu -q -p no:cacheprovider
tail -n 2 "$out/tests.txt"
run 45 kernel-tests $PYTHON -m pytest tests/test_affine_step.py tests/test_add_noise.py tests/test_posterior.py \
    -m "not gpu" -q -p no:cacheprovider
tail -n 2 "$out/kernel-tests.txt"
run 130 throughput $PYTHON -m fastdiff_bench.suite --device cuda --quick --json "$out/throughput.json" ${plots[@]+"${plots[@]}"}
cat "$out/throughput.txt"
for network in unet1d mlp; do
    run 25 "loop-$network" $PYTHON -m fastdiff_bench.suite --device cuda --quick --model "$network" \
        --json "$out/loop-$network.json"
    cat "$out/loop-$network.txt"
done
run 60 kernels $PYTHON -m fastdiff_bench.gpu --quick --out "$out"
cat "$out/kernels.txt"
run 90 roofline $PYTHON -m fastdiff_bench.roofline --device cuda --quick --dtype fp32 bf16 \
    --json "$out/roofline.json" ${plots[@]:+--plot "$out/roofline"}
cat "$out/roofline.txt"
echo "results in $out, $SECONDS s"
exit $failed
