#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds, tests, checks and measures on a machine with an NVIDIA GPU; needs no network. See docs/performance.md.
#
#   scripts/gpu.sh build      compile the extension with its CUDA kernels, in place, and say what was built
#   scripts/gpu.sh test       the tests that run on the GPU
#   scripts/gpu.sh sanitize   small shapes of every kernel under compute-sanitizer: memcheck, racecheck, initcheck
#   scripts/gpu.sh bench      the GPU's benchmarks; figures go to benchmarks/results/<gpu>-<date>.json
#
# Each ends within 10 minutes. Environment: PYTHON (python3), OUT (a folder that logs and results are also put into),
# FUSED_INPAINT_COMMIT (of a copy without .git), TORCH_CUDA_ARCH_LIST and MAX_JOBS for build.
# Exit code 2: something that is needed is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-}
# A toolkit's programs are often installed without being on PATH.
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PYTHONUNBUFFERED=1
# They would change what is tested.
unset FUSED_INPAINT_BACKEND FUSED_INPAINT_LIBRARY TRITON_INTERPRET CI

refuse() {
  echo "gpu.sh: $1" >&2
  exit 2
}

need() {
  command -v "$1" >/dev/null || refuse "$1 must be on PATH or in \$CUDA_HOME/bin"
}

need_gpu() {
  command -v "$python" >/dev/null || refuse "PYTHON must be a Python interpreter, got $python"
  "$python" -c 'import sys; from importlib.util import find_spec; sys.exit(not find_spec("torch"))' ||
    refuse "torch must be installed for $python"
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || refuse "torch finds no GPU"
  [[ -z $out ]] || mkdir -p "$out"
}

need_kernels() {
  local reason
  reason=$("$python" -c 'from fused_inpaint import _backends; print(_backends.status()["cuda"])')
  [[ -z $reason ]] || refuse "scripts/gpu.sh build must come first ($reason)"
}

# logged SECONDS NAME COMMAND...: at most that long, with a log of that name. An interrupt lets pytest report.
logged() {
  local seconds=$1 log=/dev/null
  [[ -z $out ]] || log=$out/$2.log
  shift 2
  timeout --signal=INT --kill-after=20 "$seconds" "$@" 2>&1 | tee "$log"
}

build() {
  local seen='import torch
found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
print(";".join(f"{major}.{minor}" for major, minor in sorted(found)))'
  [[ -n ${TORCH_CUDA_ARCH_LIST:-} ]] || TORCH_CUDA_ARCH_LIST=$("$python" -c "$seen")
  [[ -n ${MAX_JOBS:-} ]] || MAX_JOBS=$(nproc)
  export TORCH_CUDA_ARCH_LIST MAX_JOBS FUSED_INPAINT_BUILD=cuda
  # An installation, since models/ can be imported as fused_inpaint.models through one only.
  logged 500 build "$python" -m pip install --no-index --no-deps --no-build-isolation -v -e .
  logged 60 info "$python" -m fused_inpaint info
}

# Of the files whose tests take a device, what has a GPU's backend in its name, or is a GPU's own. Emulation, Triton's
# interpreter, its compilation for other GPUs and packaging are tested where there is no GPU. Operators are checked once:
# not again for the second route of the partial convolution, which is the same operator, nor without gradients, nor the
# CUDA ones under Triton's name. What other libraries warn of is printed and ends no test.
run_tests() {
  local files selected="cuda or triton or gpu or nccl"
  mapfile -t files < <(grep -lE 'device: (torch\.device|str)\b|NCCL' tests/test_*.py)
  selected="($selected) and not (cuda_vendor and (region or gated or pyramid or gram or opcheck or compile or export))"
  selected+=" and not (opcheck and (no_grad or triton and partial_conv_compile and not opcheck_triton))"
  local options=(-q -p no:cacheprovider --durations=15 -W default -k "$selected")
  # Most of the time goes into compilers, Inductor's pools of which would only wait for each other.
  export TORCHINDUCTOR_COMPILE_THREADS=1
  if "$python" -c 'import xdist' 2>/dev/null; then options+=(-n "$(((3 * $(nproc) + 3) / 4))" --dist worksteal); fi
  if [[ -n $out ]]; then options+=(--junitxml="$out/test.xml"); fi
  logged 560 test "$python" -m pytest "${options[@]}" "${files[@]}"
}

# memcheck sees a tensor's bounds only where each tensor is an allocation of its own. racecheck looks at the project's
# CUDA kernels alone: the vendor's and Triton's synchronise in ways that it does not know. initcheck must see what every
# kernel writes, and does not see bulk tensor stores: there convolutions are torch's own, in float32, which have none.
# The tools run side by side.
sanitize() {
  local status=0 job jobs=() check=(compute-sanitizer --error-exitcode 86 --print-limit 20)
  local suite='import sys, pytest, torch
torch.backends.cudnn.enabled = sys.argv[1] == "vendor"
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "tests/test_gpu.py", "-k", sys.argv[2]]))'
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  logged 400 memcheck "${check[@]}" --tool memcheck \
    "$python" -c "$suite" vendor "test_small_shapes and (cuda or triton and float32)" & jobs+=($!)
  logged 400 racecheck "${check[@]}" --tool racecheck --kernel-name kns=fused_inpaint \
    "$python" -c "$suite" vendor "test_small_shapes and cuda and float32" & jobs+=($!)
  logged 400 initcheck "${check[@]}" --tool initcheck \
    "$python" -c "$suite" torch "test_small_shapes and float32 and not auto" & jobs+=($!)
  for job in "${jobs[@]}"; do wait "$job" || status=$?; done
  return "$status"
}

bench() {
  local started status=0
  started=$(mktemp)
  FUSED_INPAINT_BENCH_SAVE=1 logged 560 bench "$python" -m pytest benchmarks --benchmark-only -q || status=$?
  if [[ -n $out ]]; then find benchmarks/results -name '*.json' -newer "$started" -exec cp {} "$out" \;; fi
  rm "$started"
  return "$status"
}

case ${1:-} in
  build) need_gpu; need nvcc; build ;;
  test) need_gpu; need_kernels; run_tests ;;
  sanitize) need_gpu; need compute-sanitizer; need_kernels; sanitize ;;
  bench) need_gpu; need_kernels; bench ;;
  *) refuse "the first argument must be build, test, sanitize or bench, got ${1:-nothing}" ;;
esac
