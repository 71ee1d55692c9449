#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, checks, tests, fuzzing, sanitizer, micro-benchmarks, benches.
#
#   bench/gpu.sh [OUT [STAGE...]]    OUT: folder of the logs, $OUT or bench/results/gpu-DATE by default
#                                    STAGE: run only these, as "build check bench_nearest"
#
# Each stage writes OUT/STAGE.log and runs whatever became of the ones before it. OUT/summary.txt and the exit status
# say which failed; OUT/logs.tar.gz holds all of OUT; both are there too if the script is stopped half-way. On a machine
# without a GPU it stops at once with status 2. PYTHON names the interpreter.
set -euo pipefail

OUT=${1:-${OUT:-bench/results/gpu-$(date +%Y%m%d-%H%M%S)}}
wanted=" ${*:2} "
here=$(cd "$(dirname "$0")/.." && pwd)
[[ $OUT == /* || $# -eq 0 ]] || OUT=$PWD/$OUT # as given, from where it was given
cd "$here"
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONUNBUFFERED=1 VQFAST_POISON=1
unset TRITON_INTERPRET VQFAST_BACKEND VQFAST_CPU_ISA

names=() results=() seconds=()
running=

is_wanted() { [[ $wanted == "  " || $wanted == *" $1 "* ]]; }

# stage NAME LIMIT COMMAND...: runs with a time limit in seconds, logs, remembers the result
stage() {
  local name=$1 limit=$2 begin=$SECONDS status=0
  shift 2
  is_wanted "$name" || return 0
  echo "== $name: $*"
  timeout --kill-after=20 "$limit" "$@" >"$OUT/$name.log" 2>&1 &
  running=$!
  wait "$running" || status=$? # a wait, so that the script itself can be stopped meanwhile
  tail -n 3 "$OUT/$name.log" | sed 's/^/   /'
  names+=("$name") results+=("$status") seconds+=($((SECONDS - begin)))
}

# measure SUITE WHICH LIMIT: a stage that measures; its last line, the JSON object, goes to OUT/bench.jsonl too.
# WHICH: of micro the op, of others the cases; empty for all.
measure() {
  local name=bench_$1 limit=$3
  local -a flags=(--suite "$1" --device cuda --budget 5 --record)
  case $1 in
    micro) flags+=(--op "$2" --dtype fp32,fp16,bf16) ;;
    sample) flags+=(--case "$2") ;;
    *) flags+=(--dtype fp32,bf16) ;;
  esac
  [[ -z $2 ]] || name=bench_${2%\*}
  is_wanted "$name" || return 0
  stage "$name" "$limit" "$PYTHON" bench/run.py "${flags[@]}"
  tail -n 1 "$OUT/$name.log" | grep '^{' >>"$OUT/bench.jsonl" || true
}

summary() {
  local i word failed=0
  {
    printf '%-22s %8s %s\n' stage seconds result
    for i in "${!names[@]}"; do
      case ${results[i]} in
        0) word=ok ;;
        124 | 137) word="over its time limit" ;;
        *) word="failed (exit ${results[i]}), see $OUT/${names[i]}.log" ;;
      esac
      [[ ${results[i]} == 0 ]] || failed=$((failed + 1))
      printf '%-22s %8s %s\n' "${names[i]}" "${seconds[i]}" "$word"
    done
    echo "logs: $OUT; $failed of ${#names[@]} stages failed"
  } | tee "$OUT/summary.txt"
  tar -czf "$OUT/logs.tar.gz" -C "$OUT" --exclude=logs.tar.gz . || true
}

"$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 2)' || {
  echo "bench/gpu.sh: torch sees no GPU" >&2
  exit 2
}

trap summary EXIT
trap 'kill $running || true; exit 130' INT
trap 'kill $running || true; exit 143' TERM

environment() { # what is missing is said, not the end
  nvidia-smi || true
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit --format=csv || true
  nvcc --version || echo "no nvcc"
  compute-sanitizer --version || echo "no compute-sanitizer"
  git rev-parse HEAD || true
  git status --short || true
  "$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
}

# an editable install, with what is there alone: no package index. kernels/ is vqfast.kernels only once installed.
build() {
  "$PYTHON" -m pip install -q --no-deps --no-build-isolation --no-index -e .
  "$PYTHON" -c 'import vqfast.kernels'
  ls vqfast/_C.*.so vqfast/_C_cuda*.so
  "$(command -v cuobjdump || "$PYTHON" -c 'import pathlib, triton
print(pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")')" -res-usage vqfast/_C_cuda*.so
}

# memory errors, races and uninitialised reads, kernel by kernel; the caching allocator would hide over-reads
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    --kernel-name-exclude regex=at::native "$PYTHON" bench/gpu_micro.py --smoke
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
stage tests 900 "$PYTHON" -m pytest -q -m "gpu or not slow" tests/test_gpu.py tests/test_gpu_decode.py tests/test_ops.py
stage decode 400 "$PYTHON" bench/gpu_decode.py --check
stage fuzz 400 "$PYTHON" -m vqfast.testing.fuzz --device cuda --rows 1e8 --minutes 5
stage determinism 300 "$PYTHON" bench/gpu_micro.py --repeat 1000
stage large 300 "$PYTHON" bench/gpu_micro.py --large
for tool in memcheck racecheck initcheck synccheck; do
  stage "sanitize_$tool" 300 bash -euo pipefail -c "sanitize $tool"
done
unset VQFAST_POISON # no filling inside timed calls
stage decode_time 600 "$PYTHON" bench/gpu_decode.py --time --json "$OUT/decode.json"
stage decode_profile 120 "$PYTHON" bench/gpu_decode.py --profile
# fills the table of who runs where: bench/gpu.sh OUT attention, then OUT/attention_measured.json into vqfast/ops
stage attention 900 "$PYTHON" bench/gpu_attention.py --plans --spatial --measure --write "$OUT/attention_measured.json"
stage micro 600 "$PYTHON" bench/gpu_micro.py --time --json "$OUT/micro.json"
for op in nearest nearest_quantize quantize code_stats causal_attention decode_attention group_norm_silu cross_entropy \
  sample_logits; do
  measure micro "$op" 600
done
measure model "" 600
measure train "" 600
for cases in "gpt_small*" "gpt_336m*" "gpt576*" "emoji64*"; do # the opponents compile: minutes
  measure sample "$cases" 900
done
stage picture 60 "$PYTHON" bench/picture.py "$OUT/bench.jsonl" "$OUT/bench.png"

for status in ${results[@]+"${results[@]}"}; do [[ $status == 0 ]] || exit 1; done
