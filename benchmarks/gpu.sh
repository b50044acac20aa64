#!/usr/bin/env bash
# On a machine with a CUDA GPU, nvcc and torch: builds this checkout with CUDA, tests it on the GPU,
# runs compute-sanitizer on small cases and the suite of benchmarks. Logs and CSV go to OUT. Needs no
# network, but the packages of the `test` extra, scikit-build-core and CMake; rivals of the `bench`
# extra that are missing are reported as missing. Ends within ten minutes: each step has its limit,
# and a benchmark that reaches it has written the rows it got to.
#
#   benchmarks/gpu.sh OUT
#
# It stops where the build fails; the steps behind it are all tried. The exit code is 1 if any
# failed. UNET_FAST_DRY_RUN=1 leaves out what needs a GPU, and gives each step four times as long.
set -uo pipefail
[ $# -eq 1 ] || { echo "usage: benchmarks/gpu.sh OUT" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
dry=${UNET_FAST_DRY_RUN:-0}
slower=$((dry == 1 ? 4 : 1))  # a shared machine without a GPU may be as much slower
failed=0

step() {  # step SECONDS NAME COMMAND...: runs it with a time limit, output to OUT/NAME.log
  local seconds=$(($1 * slower)) name=$2 start=$SECONDS left=$((570 * slower - SECONDS))
  shift 2
  if timeout -k 5 "$((seconds < left ? seconds : left > 1 ? left : 1))" "$@" > "$out/$name.log" 2>&1; then
    echo "ok      $name  $((SECONDS - start)) s"
  else
    echo "FAILED  $name  (exit code $?, $((SECONDS - start)) s)"
    tail -n 15 "$out/$name.log"
    failed=1
  fi
}

facts='nvcc --version && "$0" -c "import torch; print(torch.__version__, torch.version.cuda)"
  git log -1 --format="commit %H" 2> /dev/null || true'

# Built for the GPU that is here (or 90), into a folder of its own: the machine is left as it was.
architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1 | tr -d .)
site="$out/site"
step 30 facts bash -c "$facts" "$python"
[ "$dry" = 1 ] || step 30 nvidia_smi nvidia-smi
[ "$dry" = 1 ] && export UNET_FAST_ALL_LEVELS=OFF  # builds in less time
UNET_FAST_CUDA=ON step 180 build "$python" -m pip install --no-build-isolation --no-deps --no-index \
  --upgrade --target "$site" --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="${architecture:-90}" .
[ "$failed" = 0 ] || exit 1  # nothing below would be about this checkout
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
step 60 info "$python" -P -m unet_fast.cli info

# The tests of the kernels on the GPU; all others need none, and have been run where there is none.
tests=("$python" -P -m pytest -q -n 8 -W default --thorough tests/ops tests/test_library.py
  tests/training/test_loop.py tests/prediction/test_predictor.py
  -k 'cuda and not on_host and not under_sanitizers')
if [ "$dry" = 1 ]; then
  step 60 tests "${tests[@]}"
  step 60 sanitizer_cases "$python" -P benchmarks/sanitizer_cases.py --device cpu
  step 120 benchmark "$python" -m benchmarks.run --only limits weighted_ce elastic_deform --budget 0.1 --out "$out"
  step 60 profile "$python" -m benchmarks.profile_step --base-channels 2 --steps 3
else
  UNET_FAST_REQUIRE_CUDA=1 step 150 tests "${tests[@]}"
  # The launches that the sanitizers watch are few and small: each costs seconds.
  # Without torch's cache every tensor is an allocation of its own, whose end memcheck knows.
  for tool in memcheck racecheck initcheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step 40 "sanitizer_$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -P benchmarks/sanitizer_cases.py --device cuda
  done
  bench() {  # bench SECONDS SUITE...
    local seconds=$1
    shift
    step "$seconds" "benchmark_$1" "$python" -m benchmarks.run --device cuda --peers --budget 0.5 --only "$@" --out "$out"
  }
  bench 40 limits border_weight_map elastic_deform
  bench 60 weighted_ce
  bench 60 growth
  bench 40 inference
  bench 60 breakdown
  bench 150 step
fi
exit "$failed"
