#!/usr/bin/env bash
# Build, test and measure on a machine with a GPU, without network and without installing anything:
#   scripts/gpu_suite.sh OUT [--full | --smoke | --part NAME,...]
# Needs python3 with torch, torchvision, triton, numpy and pytest. What it does and leaves in OUT: scripts/gpu_suite.py.
set -euo pipefail
exec python3 "$(dirname "$0")/gpu_suite.py" "$@"
