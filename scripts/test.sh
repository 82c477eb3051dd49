#!/usr/bin/env bash
# Run the tests, a file per processor at a time: scripts/test.sh [pytest arguments]
. "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the processors are taken by other test files
exec python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
