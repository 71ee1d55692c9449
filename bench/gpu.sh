#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, checks, tests, sanitizer, micro-benchmarks, benches.
#
#   bench/gpu.sh [OUT]        OUT: folder of the logs, bench/results/gpu-DATE by default
#
# Each stage writes OUT/STAGE.log and runs whatever became of the ones before it; the table at the end and the exit
# status say which failed. On a machine without a GPU it stops at once with status 2. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${1:-bench/results/gpu-$(date +%Y%m%d-%H%M%S)}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 VQFAST_POISON=1
unset TRITON_INTERPRET VQFAST_BACKEND VQFAST_CPU_ISA

names=() results=() seconds=()

# stage NAME LIMIT COMMAND...: runs with a time limit in seconds, logs, remembers the result
stage() {
  local name=$1 limit=$2 begin=$SECONDS status=0
  shift 2
  echo "== $name: $*"
  timeout --kill-after=20 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
  tail -n 3 "$OUT/$name.log" | sed 's/^/   /'
  names+=("$name") results+=("$status") seconds+=($((SECONDS - begin)))
}

"$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 2)' || {
  echo "bench/gpu.sh: torch sees no GPU" >&2
  exit 2
}

environment() {
  nvidia-smi
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit --format=csv
  nvcc --version
  "$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  git rev-parse HEAD
  git status --short
}

# the build in place, so that no package index is needed; both libraries must come out of it
build() {
  "$PYTHON" setup.py -q build_ext --inplace
  ls vqfast/_C.*.so vqfast/_C_cuda*.so
  cuobjdump -res-usage vqfast/_C_cuda*.so
}

# memory errors, races and uninitialised reads, kernel by kernel; the caching allocator would hide over-reads
sanitize() {
  local tool status=0
  for tool in memcheck racecheck initcheck synccheck; do
    echo "---- $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --kernel-name-exclude regex=at::native "$PYTHON" bench/gpu_micro.py --smoke || status=$?
  done
  return "$status"
}

repeat_check() { # the record that lets a CUDA kernel into the automatic choice
  "$PYTHON" -m vqfast check --device cuda --json | tee "$OUT/check_cuda.json"
}

export -f environment build sanitize repeat_check
export PYTHON OUT

stage environment 60 bash -euo pipefail -c environment
stage build 600 bash -euo pipefail -c build
stage check 600 bash -euo pipefail -c repeat_check
stage compile 600 "$PYTHON" -m pytest -q tests/test_triton_compile.py
stage tests 900 "$PYTHON" -m pytest -q -m "gpu or not slow" tests/test_gpu.py tests/test_ops.py
stage determinism 300 "$PYTHON" bench/gpu_micro.py --repeat 1000
stage large 300 "$PYTHON" bench/gpu_micro.py --large
stage sanitizer 900 bash -euo pipefail -c sanitize
unset VQFAST_POISON # no filling inside timed calls
stage micro 600 "$PYTHON" bench/gpu_micro.py --time --json "$OUT/micro.json"
stage bench_micro 900 "$PYTHON" bench/run.py --suite micro --device cuda --dtype fp32,fp16,bf16 --record
stage bench_model 600 "$PYTHON" bench/run.py --suite model --device cuda --dtype fp32,bf16 --record
stage bench_train 600 "$PYTHON" bench/run.py --suite train --device cuda --dtype fp32,bf16 --record
stage bench_sample 600 "$PYTHON" bench/run.py --suite sample --device cuda --dtype fp32,bf16 --record

echo
printf '%-14s %8s %s\n' stage seconds result
failed=0
for i in "${!names[@]}"; do
  case ${results[i]} in
    0) word=ok ;;
    124 | 137) word="over its time limit" ;;
    *) word="failed (exit ${results[i]}), see $OUT/${names[i]}.log" ;;
  esac
  [[ ${results[i]} == 0 ]] || failed=$((failed + 1))
  printf '%-14s %8s %s\n' "${names[i]}" "${seconds[i]}" "$word"
done
echo "logs: $OUT; $failed of ${#names[@]} stages failed"
[[ $failed == 0 ]]
