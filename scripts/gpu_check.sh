#!/usr/bin/env bash
# Proves the package on a machine with an NVIDIA GPU, nvcc and PyTorch, without network:
#
#   bash scripts/gpu_check.sh OUT [--stage STAGE] [--dry-run] [--wheels DIR] [--ops "NAMES"]
#
#   build       installs this tree with the native module, compiled for the GPU that is here only
#   test        pytest -m gpu
#   sanitize    compute-sanitizer (memcheck, racecheck) over a few tests of every native op
#   bench       python -m benchmarks.run --suite quick
#   bench-full  python -m benchmarks.run --suite full; only when named
#
# Without --stage the first four run, in less than nine minutes together. Each has its own time limit, and none waits for
# the success of another. OUT gets a log of each stage, junit.xml, the CSV files and a one-page summary.md.
#
#   --wheels DIR  installs DIR/*.whl first, without dependencies (bitsandbytes, peers to compare with)
#   --ops NAMES   only these benchmarks
#   --dry-run     all that needs no GPU: compiles, collects the tests, runs the benchmarks' smallest shapes on the CPU;
#                 installs nothing
#   PYTHON        the interpreter (python3); FASTPEFT_COMMIT names the commit where there is no repository
#
# Exit status: 0; 1 when a stage failed; 2 for wrong arguments; 3 without a GPU.
set -uo pipefail

usage() { sed -n '2,/^set /p' "$0" | grep '^#' | cut -c3-; exit 2; }

out= only= dry= wheels= ops=
while [ $# -gt 0 ]; do
  case $1 in
    --stage) only=${2:-}; shift 2 || usage ;;
    --wheels) wheels=${2:-}; shift 2 || usage ;;
    --ops) ops=${2:-}; shift 2 || usage ;;
    --dry-run) dry=yes; shift ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage; out=$1; shift ;;
  esac
done
[ -n "$out" ] || usage
case $only in "" | build | test | sanitize | bench | bench-full) ;; *) usage ;; esac

mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
[ -z "$wheels" ] || wheels=$(cd "$wheels" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

archs=$("$python" -c 'import setup; print(";".join(setup.gpu_archs()))') || exit 2
if [ -n "$dry" ]; then
  archs=90a
  export PYTHONPATH=$PWD
elif [ -z "$archs" ]; then
  echo "no NVIDIA GPU here (compute capability 8.0 or later, with its driver): nothing was run"
  exit 3
fi

gpu_tests() { "$python" -m pytest -m gpu -p no:cacheprovider "$@"; }

stage_build() {
  if [ -n "$wheels" ]; then "$python" -m pip install --no-index --no-deps "$wheels"/*.whl; fi
  export FASTPEFT_BUILD_CUDA=1 FASTPEFT_CUDA_ARCHS=$archs
  if [ -n "$dry" ]; then
    local folder
    folder=$(mktemp -d)
    trap "rm -rf '$folder'" EXIT
    "$python" setup.py build_ext --build-lib "$folder" --build-temp "$folder"
  else
    "$python" -m pip install -v --no-index --no-deps --no-build-isolation -e .
    "$python" -c "from fastpeft import _native; print(_native.cuda or _native.why_absent); assert _native.cuda"
  fi
}

stage_test() {
  if [ -n "$dry" ]; then
    gpu_tests --collect-only -q
  else
    local workers=()
    if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 4 --dist worksteal); fi
    gpu_tests -q "${workers[@]}" --durations 10 --junitxml "$out/junit.xml"
  fi
}

# Of every test function that runs natively two parameter sets, the first and one from the middle: a kernel under
# racecheck is a hundred times slower. Both tools at once: they wait for Python more than for the GPU. Without the caching
# allocator memcheck sees where a tensor ends; a graph cannot be captured then.
stage_sanitize() {
  local tests tool running=() status=0
  mapfile -t tests < <(gpu_tests --collect-only -q tests/ops -k 'cuda-gpu and not graph and not compile' | awk -F'[' '
    /::/ { line[++n] = $0; if (!first[$1]) first[$1] = n; last[$1] = n }
    END { for (f in first) { print line[first[f]]; m = int((first[f] + last[f]) / 2); if (m > first[f]) print line[m] } }')
  printf '%s\n' "${#tests[@]} tests:" "${tests[@]}"
  [ ${#tests[@]} -gt 0 ]
  if [ -n "$dry" ]; then return; fi
  command -v compute-sanitizer || { echo "compute-sanitizer is not installed" && return 1; }
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    timeout --kill-after=5 120 compute-sanitizer --tool $tool --kernel-name kns=fastpeft --target-processes all \
      --error-exitcode 9 "$python" -m pytest -m gpu -p no:cacheprovider -q "${tests[@]}" >"$out/$tool.log" 2>&1 &
    running+=("$tool:$!")
  done
  for tool in "${running[@]}"; do
    wait "${tool#*:}" && echo "${tool%:*}: passed" || { status=$? && echo "${tool%:*}: status $status"; }
  done
  return $status
}

stage_bench() {
  if [ -n "$dry" ]; then
    "$python" -m benchmarks.run --suite smoke --device cpu --out "$out" ${ops:+--ops $ops}
  else
    "$python" -m benchmarks.run --suite quick --device cuda --out "$out" ${ops:+--ops $ops}
  fi
}

stage_bench_full() { "$python" -m benchmarks.run --suite full --device cuda --out "$out" ${ops:+--ops $ops}; }

# run_stage NAME SECONDS: in a shell of its own, under its limit; output to OUT/NAME.log, a line to OUT/stages.tsv. The
# first signal is an interrupt, so that pytest still writes its report.
run_stage() {
  local name=$1 limit=$2 began=$SECONDS status
  if [ "${only:-$name}" != "$name" ] || { [ -z "$only" ] && [ "$name" = bench-full ]; }; then return; fi
  echo "== $name (at most $limit s)"
  timeout --signal=INT --kill-after=15 "$limit" bash -c "set -euo pipefail; stage_${name/-/_}" >"$out/$name.log" 2>&1
  status=$?
  tail -n 3 "$out/$name.log" | sed 's/^/   /'
  touch "$out/stages.tsv"
  sed -i "/^$name\t/d" "$out/stages.tsv" # a stage that runs again replaces what it said before
  printf '%s\t%s\t%s\t%s\n' "$name" "$status" $((SECONDS - began)) "$limit" >>"$out/stages.tsv"
  [ "$status" -eq 0 ] || failed=1
}

export python out wheels ops archs dry
export -f gpu_tests stage_build stage_test stage_sanitize stage_bench stage_bench_full
failed=0
slower=${dry:+4} # a dry run is for small machines
run_stage build $((80 * ${slower:-1}))
run_stage test $((150 * ${slower:-1}))
run_stage sanitize $((140 * ${slower:-1}))
run_stage bench $((160 * ${slower:-1}))
run_stage bench-full 560

"$python" scripts/gpu_summary.py "$out" >"$out/summary.md" && cat "$out/summary.md"
exit $failed
