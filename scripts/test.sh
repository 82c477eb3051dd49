#!/usr/bin/env bash
# Run the tests: scripts/test.sh [pytest arguments]
. "$(dirname "$0")/setup.sh"
exec python -m pytest "$@"
