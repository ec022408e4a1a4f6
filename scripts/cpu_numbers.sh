#!/usr/bin/env bash
# Measures again what the documents say of the CPU: benchmarks/results/cpu/{kernels,steps}.jsonl, then the tables and pictures.
# About an hour on two cores; let the machine be idle. A second call goes on where the first was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
results=benchmarks/results/cpu

# Exit code 1: somebody was rejected, which the tables say.
kernels() { "$python" -m benchmarks --device cpu --output $results/kernels.jsonl --resume "$@" || [ $? -eq 1 ]; }
kernels --entry gkd_bmfi,gkd_bmfi_separate
kernels --entry attention,box_mask,channel_mean,feature_imitation,map_distance,weighted_channel_sum
kernels --entry gkd,gkd_imitation,bmfi,aid_bmfi
kernels --entry gkd_bmfi --mode backward,inline --case kitti,tiny,frcnn
for change in "--dtype bf16,fp16" "--layout channels_last" "--boxes 0,100" "--channels 64"; do
  # shellcheck disable=SC2086 # two words
  kernels --entry gkd_bmfi --mode backward $change
done
steps() { "$python" -m benchmarks step --device cpu --provider paper,eager,compile,reference --output $results/steps.jsonl "$@" || [ $? -eq 1 ]; }
steps --pair fcos-small --loss gkd_bmfi,gkd,gkd_imitation,bmfi,aid_bmfi
steps --pair frcnn-small
"$python" -m benchmarks.report.tables
