#!/usr/bin/env bash
# Stage 1: captioned video to VAE latents.
#   scripts/step1_prepare.sh [key=value …]        settings: configs/step1_prepare.yaml
. "$(dirname "$0")/setup.sh"
launch Step1_GFDM.prepare "$@"
