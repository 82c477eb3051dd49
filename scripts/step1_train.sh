#!/usr/bin/env bash
# Stage 1: train the forward dynamics model (GFDM).
#   scripts/step1_train.sh [key=value …]        settings: configs/step1_train.yaml
. "$(dirname "$0")/setup.sh"
launch Step1_GFDM.train "$@"
