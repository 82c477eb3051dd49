#!/usr/bin/env bash
# On one GPU, in less than ten minutes: bf16 parity, full-size training steps, policy latency, memory, share of the peak.
#   scripts/gpu_check.sh [--preset paper] [--output outputs/gpu_check.json] [--help]
. "$(dirname "$0")/setup.sh"
exec python -m benchmarks.gpu_check "$@"
