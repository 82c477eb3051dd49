#!/usr/bin/env bash
# Stage 3: train the DeFI policy.
#   scripts/step3_train.sh [key=value …]        settings: configs/step3_train.yaml
. "$(dirname "$0")/setup.sh"
launch Step3_DeFI.train "$@"
