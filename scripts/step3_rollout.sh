#!/usr/bin/env bash
# Stage 3: roll a policy out in simulation.
#   scripts/step3_rollout.sh [key=value …]        settings: configs/step3_rollout.yaml
. "$(dirname "$0")/setup.sh"
launch Step3_DeFI.rollout "$@"
