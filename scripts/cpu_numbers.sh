#!/usr/bin/env bash
# Measures again what the documents say of the CPU: benchmarks/results/cpu/{kernels,scaling,steps}.jsonl, then the tables and pictures.
#   scripts/cpu_numbers.sh              all of it: more than an hour on two cores; let the machine be idle
#   scripts/cpu_numbers.sh PART...      some of it: kernels, scaling, steps, tables
# A second call goes on where the kernels were stopped; scaling and steps are measured anew.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
results=benchmarks/results/cpu

# Exit code 1: somebody was rejected, which the tables say.
bench() { "$python" -m benchmarks "$@" --device cpu || [ $? -eq 1 ]; }
kernel() { bench --output $results/kernels.jsonl --resume "$@"; }
step() { bench step --provider paper,eager,compile,reference,native --output $results/steps.jsonl "$@"; }

kernels() {
  kernel --entry gkd_bmfi,gkd_bmfi_separate
  kernel --entry attention,box_mask,channel_mean,feature_imitation,map_distance,weighted_channel_sum
  kernel --entry box_mask --boxes 100
  kernel --entry gkd,gkd_imitation,bmfi,aid_bmfi
  kernel --entry gkd_bmfi --mode backward,inline --case kitti,tiny,frcnn
  for change in "--dtype bf16,fp16" "--layout channels_last" "--boxes 0,100" "--channels 64"; do
    # shellcheck disable=SC2086 # two words
    kernel --entry gkd_bmfi --mode backward $change
  done
}
scaling() { bench scaling --output $results/scaling.jsonl; }
steps() {
  step --pair fcos-small --loss gkd_bmfi,gkd,gkd_imitation,bmfi,aid_bmfi
  step --pair frcnn-small
}
tables() { "$python" -m benchmarks.report.tables; }

for part in "${@:-all}"; do
  case $part in
    all) for each in kernels scaling steps tables; do "$each"; done ;;
    kernels | scaling | steps | tables) "$part" ;;
    *) echo "unknown part: $part; the parts are kernels, scaling, steps and tables" >&2 && exit 2 ;;
  esac
done
