#!/usr/bin/env bash
# Stage 2: train the inverse dynamics model (GIDM) on video alone.
#   scripts/step2_train.sh [key=value …]        settings: configs/step2_train.yaml
. "$(dirname "$0")/setup.sh"
launch Step2_GIDM.train "$@"
