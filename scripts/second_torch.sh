#!/usr/bin/env bash
# Tests the library that is built here on another torch than it was built with: `scripts/second_torch.sh [PYTEST OPTIONS]`, or
# `make test-torches`. One build has to serve all of them.
#
# PYTHON: where kdkernels is installed with what builds and tests it.   NEWEST: the other torch.   VENV_NEWEST: where it goes.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-.venv/bin/python}
newest=${NEWEST:-2.13.0}
venv=$(realpath --canonicalize-missing "${VENV_NEWEST:-.venv-newest}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

install() {
  # uv where it is: it can be told to take torch without CUDA.
  if command -v uv > /dev/null; then
    uv pip install --quiet --python "$venv/bin/python" "$@"
  else
    "$venv/bin/python" -m pip install --quiet "$@"
  fi
}

# What the tests below import, of the versions of the development set, but for torch and what it chooses itself. The environment is made
# again when any of this changes.
packages=(torch numpy pytest hypothesis pybind11 triton typer rich pyyaml)
pins=$scratch/pins.txt
echo "# ${packages[*]}" > "$pins"
sed -e "s/^torch==.*/torch==$newest/" -e '/^torchvision==/d' -e '/^triton==/d' -e '/^setuptools==/d' constraints.txt >> "$pins"
if ! cmp --silent "$pins" "$venv/pins.txt"; then
  # Nothing is thrown away that is not an environment.
  if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    echo "VENV_NEWEST names what is no virtual environment: $venv" >&2
    exit 2
  fi
  rm -rf "$venv"
  "$python" -m venv "$venv"
  install --constraint "$pins" "${packages[@]}"
  cp "$pins" "$venv/pins.txt"
fi

KDKERNELS_BUILD=${KDKERNELS_BUILD:-cpu} "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$scratch" .
install --no-deps --force-reinstall "$scratch"/kdkernels-*-abi3-*.whl

# Not from here, nor with pyproject.toml's `pythonpath`: the wheel's package is tested, not the checkout's.
cd "$scratch"
"$venv/bin/python" - "$root" << 'END'
import sys
from pathlib import Path

import torch

import kdkernels
from kdkernels.native import build_info

assert not Path(kdkernels.__file__).is_relative_to(Path(sys.argv[1], "kdkernels")), kdkernels.__file__
native = kdkernels.backend_info()["native"]
assert native["available"], native["reason"]
print(f"built with torch {build_info()['torch']}, tested on {torch.__version__}")
END
# The distiller's tests are of torchvision's detectors, and torchvision is of one torch only. The emulated kernels are not of the library.
shopt -s extglob
"$venv/bin/python" -m pytest -m "not emulated" -c "$root/pyproject.toml" -o pythonpath= -p no:cacheprovider "$@" \
  "$root"/tests/test_native!(_distiller).py "$root"/tests/test_losses*.py
