#!/usr/bin/env bash
# Stage 1: imagine held-out episodes, measure them, show them beside the real ones.
#   scripts/step1_eval.sh [key=value …]        settings: configs/step1_eval.yaml
. "$(dirname "$0")/setup.sh"
launch Step1_GFDM.eval "$@"
