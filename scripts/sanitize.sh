#!/usr/bin/env bash
# Runs the native tests on a library that is compiled with sanitisers: `scripts/sanitize.sh [PYTEST OPTIONS]`, or `make sanitize`.
# First it makes sure that they report what they are there for.
#
# SANITIZE: address (default), with undefined behaviour, or thread.   PYTHON: where what builds and tests kdkernels is installed.
# GXX: g++ with its sanitisers' libraries.   Needs fifteen minutes or less; what is compiled stays in build/sanitize.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
gxx=${GXX:-g++}
kind=${SANITIZE:-address}
work=$root/build/sanitize/$kind
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$work"

# Python and torch are compiled without: the libraries come first of all, and what Python keeps until the end is no leak of ours.
case $kind in
  address)
    flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-wrapv"
    preload="$("$gxx" -print-file-name=libasan.so):$("$gxx" -print-file-name=libubsan.so)"
    export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
    ;;
  thread)
    flags="-fsanitize=thread"
    preload=$("$gxx" -print-file-name=libtsan.so)
    export TSAN_OPTIONS="halt_on_error=1 exitcode=66 report_signal_unsafe=0 ignore_noninstrumented_modules=1 die_after_fork=0"
    ;;
  *) echo "SANITIZE is address or thread; got $kind" >&2 && exit 2 ;;
esac

# In the place of OpenMP's, whose synchronisation the thread sanitiser does not see: threads of the standard library.
cat > "$work/threads.cpp" << 'END'
#include <torch/csrc/stable/c/shim.h>

#include <thread>
#include <vector>

__attribute__((visibility("hidden")))
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc run, void* given) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) threads.emplace_back(run, i, i + 1, given);
  for (std::thread& thread : threads) thread.join();
  return 0;
}
END
# Mistakes, each of which has to be reported.
cat > "$work/mistakes.cpp" << 'END'
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

using torch::stable::Tensor;

double element(Tensor x, int64_t place) { return static_cast<const float*>(x.const_data_ptr())[place]; }
int64_t shifted(int64_t by) { return int64_t{1} << by; }
int64_t larger(int64_t x) { return x + 1; }
int64_t counted(int64_t threads) {
  int64_t count = 0;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int i = 0; i < 1000; ++i) ++count;
  });
  return count;
}

STABLE_TORCH_LIBRARY(kdkernels_mistakes, m) {
  m.def("element(Tensor x, int place) -> float");
  m.def("shifted(int by) -> int");
  m.def("larger(int x) -> int");
  m.def("counted(int threads) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(kdkernels_mistakes, CompositeExplicitAutograd, m) {
  m.impl("element", TORCH_BOX(&element));
  m.impl("shifted", TORCH_BOX(&shifted));
  m.impl("larger", TORCH_BOX(&larger));
  m.impl("counted", TORCH_BOX(&counted));
}
END

# setup.py's build, by a compiler that has the last word: Python's own flags make overflow defined, and hide it so.
cat > "$work/c++" << END
#!/bin/sh
exec $gxx "\$@" -O1 -g -fno-omit-frame-pointer $flags \$LAST
END
chmod +x "$work/c++"
torch=$("$python" -c 'import torch; print(torch.__path__[0])')
compile() { "$work/c++" -std=c++17 -fPIC -isystem "$torch/include" "$@"; }

compile -c "$work/threads.cpp" -o "$work/threads.o"
cp -r csrc kdkernels tests pyproject.toml "$scratch"
mkdir -p "$scratch/build" "$work/emulator"
ln -s "$work/emulator" "$scratch/build/emulator"
rm -f "$scratch"/kdkernels/_C_* "$scratch"/kdkernels/_build_info.json
CXX=$work/c++ KDKERNELS_BUILD=cpu LAST=$([ "$kind" = thread ] && echo "$work/threads.o") \
  "$python" setup.py --quiet build_ext --build-lib "$scratch" --build-temp "$work/native"
compile -shared "$work/mistakes.cpp" "$work/threads.o" -o "$scratch/mistakes.so" -L"$torch/lib" -ltorch_cpu

cd "$scratch"
run() { PYTHONPATH=$scratch OMP_NUM_THREADS=2 LD_PRELOAD=$preload "$python" "$@"; }
# mistake CALL [REPORT]: the call ends the process with the report, or without one works.
mistake() {
  local said status=0
  said=$(run -c "import torch; torch.ops.load_library('mistakes.so'); torch.ops.kdkernels_mistakes.$1; print('done')" 2>&1) || status=$?
  if [ $# -eq 1 ] && [ "$status" -eq 0 ]; then return; fi
  if [ $# -eq 2 ] && [ "$status" -ne 0 ] && grep -q -- "$2" <<< "$said"; then return; fi
  echo "the $kind sanitiser: $1 should ${2:+be reported as }${2:-work}, but:" >&2
  echo "$said" >&2
  exit 1
}
if [ "$kind" = thread ]; then
  mistake 'counted(1)'
  mistake 'counted(2)' 'data race'
else
  mistake 'element(torch.ones(8), 7)'
  mistake 'element(torch.ones(8), 16)' heap-buffer-overflow
  mistake 'shifted(62)'
  mistake 'shifted(64)' 'shift exponent 64'
  mistake 'larger(1)'
  mistake 'larger(2**63 - 1)' 'signed integer overflow'
fi
echo "the $kind sanitiser reports mistakes; now the tests"
run - "$scratch" << 'END'
import sys
from pathlib import Path

from kdkernels import native

file, reason = native.library()
assert not reason and file is not None and file.is_relative_to(Path(sys.argv[1]))
END
options=() skip=nothing names=(-name 'test_native*.py')
if [ "$kind" = address ]; then
  # The kernels for CUDA too, as the tests emulate them: by this compiler, without a look at the stack, of which each thread has its own.
  names+=(-o -name 'test_cuda*.py')
  export PATH=$work:$PATH LAST='--param asan-stack=0'
else
  # Threads that are jumped between are none that it knows.
  options=(-k 'not cuda')
  # It needs four times the memory that is addressed, and cannot follow a fork of a process that has threads.
  # What a compiler or a disassembler does shows it nothing.
  skip='_(large|operators|isa).py'
  options+=(--deselect tests/test_native_threads.py::test_a_forked_child_computes_and_so_does_its_parent)
fi
mapfile -t tests < <(find tests "${names[@]}" | grep -Ev "$skip" | sort)
run -m pytest -p no:cacheprovider "${options[@]}" "$@" "${tests[@]}"
