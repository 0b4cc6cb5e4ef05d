#!/usr/bin/env bash
# Everything a machine with an NVIDIA GPU and no network can show, in 8 minutes: the tests of every kernel and of what
# only a GPU has, the main table (launches, host time, energy, peers), the kernels' bandwidth, a diffusers pipeline's
# loop, a policy network's loop, and the roofline of every kernel.
# Usage: bench/gpu.sh [RESULTS_DIR]      (default $OUT, else bench/results/<gpu>/<date>)
# What was measured before a step ran out of time is kept.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
unset TRITON_INTERPRET
$PYTHON -m pip install -q --no-deps --no-build-isolation -e . || echo "not installed; running from the source folders"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
# a C++ compiler would serve the CPU's loops only, and checking it takes a minute
export CXX=none
export MALLOC_MMAP_THRESHOLD_=1099511627776 MALLOC_TRIM_THRESHOLD_=1099511627776 KINETO_LOG_LEVEL=99
name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr ' ' '-' | tr -cd 'A-Za-z0-9._-')
out=${1:-${OUT:-bench/results/${name:-gpu}/$(date -u +%Y-%m-%d)}}
mkdir -p "$out"
nvidia-smi > "$out/nvidia-smi.txt" 2>&1 || true
failed=0
loop=(--device cuda --quick --model unet1d --steps 100 --schedules scaled_linear_betas --solvers ddpm)
kernels=(affine_step add_noise posterior categorical_step denoising_loss guide threshold gaussian_kl categorical_loss
    categorical_noise unmask_step add_noise_flow binned binned_mean)
sizes=(--sizes 12 26) # the launch floor, the bandwidth floor
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

echo "== tests"
begin=$SECONDS
# beside the tests, what torch.compile makes of everything measured below goes into its cache on disk
warm() {
    TORCHINDUCTOR_COMPILE_THREADS=1 timeout -k 5 110 nice -n 5 $PYTHON -m "$@" > /dev/null 2>&1 &
}
for rows in "scaled_linear_betas ddim unipc" "scaled_linear_betas ddpm" "scaled_linear_betas dpmpp_2m" \
    "scaled_linear_betas dpmpp_2m_sde" "edm euler heun" "flow euler" "vp euler_maruyama" "bfndiscrete bfn_discrete"; do
    read -r schedule solvers <<< "$rows"
    # shellcheck disable=SC2086
    warm fastdiff_bench.suite --device cuda --quick --compile-only --schedules "$schedule" --solvers $solvers
done
for kernel in "${kernels[@]}"; do
    warm fastdiff_bench.roofline --device cuda --quick "${sizes[@]}" --compile-only --dtype fp32 bf16 --kernels "$kernel"
done
warm fastdiff_bench.dropin_gpu --repeats 1
warm fastdiff_bench.suite "${loop[@]}" --compile-only
mkdir -p "$out/tests"
rm -f "$out/tests.txt"
files=(gpu gpu_bfn gpu_dropin gpu_conditions gpu_tokens affine_step add_noise posterior denoising_loss
    denoising_loss_limits rng times threshold guide guidance forward_step outer_step binned bound categorical_step categorical_large
    categorical_loss categorical_noise levels learned_variance sums registration accelerate_steps
    accelerate_threshold bfn_sampling bfn_discretised process_modes masked masked_enough race nucleus many_gradients
    unmask_step:1/4 unmask_step:2/4 unmask_step:3/4 unmask_step:4/4)
pids=()
for file in "${files[@]}"; do
    # a process a file, or a part of it: the kernels compile side by side; what runs in the background would ignore an
    # interrupt
    part=1/1
    case $file in *:*) part=${file#*:} ;; esac
    OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 env --default-signal=INT \
        timeout -s INT -k 5 100 $PYTHON -m pytest "tests/test_${file%:*}.py" --kernels-only --part "$part" \
        -m "not compiled" -q -p no:cacheprovider > "$out/tests/${file//\//-}.txt" 2>&1 &
    pids+=($!)
done
for at in "${!files[@]}"; do
    wait "${pids[at]}"
    code=$?
    case $code in
        0) said="" ;;
        5) said="no test was run; " ;;
        124 | 137) said="timed out; " ;;
        *) said="exit $code; " ;;
    esac
    [ "$code" = 0 ] || failed=1
    echo "${files[at]}: $said$(tail -n 1 "$out/tests/${files[at]//\//-}.txt")" >> "$out/tests.txt"
done
wait
echo "$((SECONDS - begin)) s"
cat "$out/tests.txt"
run 115 throughput $PYTHON -m fastdiff_bench.suite --device cuda --quick --json "$out/throughput.json" ${plots[@]+"${plots[@]}"}
cat "$out/throughput.txt"
run 50 kernels $PYTHON -m fastdiff_bench.gpu --quick --out "$out"
cat "$out/kernels.txt"
run 15 profile $PYTHON -m fastdiff profile --device cuda --solver ddpm --schedule scaled_linear_betas --steps 50 \
    --model unet1d --mode step_graph --trace "$out/profile-trace.json"
cat "$out/profile.txt"
run 45 loops $PYTHON -m fastdiff_bench.dropin_gpu --repeats 5 --json "$out/loops.json"
cat "$out/loops.txt"
run 55 loop-unet1d $PYTHON -m fastdiff_bench.suite "${loop[@]}" --json "$out/loop-unet1d.json"
cat "$out/loop-unet1d.txt"
# the last has what is left of 8 minutes
left=$((472 - SECONDS))
run $((left > 60 ? left : 60)) roofline $PYTHON -m fastdiff_bench.roofline --device cuda --quick "${sizes[@]}" --dtype fp32 bf16 \
    --kernels "${kernels[@]}" \
    --json "$out/roofline.json" ${plots[@]:+--plot "$out/roofline"}
cat "$out/roofline.txt"
echo "results in $out, $SECONDS s"
exit $failed
