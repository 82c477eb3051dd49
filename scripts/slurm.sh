#!/usr/bin/env bash
# Train on a Slurm cluster, through time limits and preemptions, until the run is done.
#   sbatch [--nodes 2 --gpus-per-node 8 --ntasks-per-node 8 --time 12:00:00 …] \
#       scripts/slurm.sh Step3_DeFI.train output=/scratch/me/policy key=value …
#
# One task per GPU. Three minutes before the time limit Slurm sends SIGUSR1 to the tasks, on preemption SIGTERM: they
# save, exit with code 75, and the job queues itself again. A job that starts again finds its configuration in
# output= and continues from its newest checkpoint; so does one whose node died. Any other exit code ends the job.
# A rollout during training is not interrupted: where one takes longer, give `sbatch --signal=USR1@900`, say.
#SBATCH --job-name=defi
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
preempted=75

# Slurm runs a copy of this script from elsewhere; the job's folder is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?start it with sbatch, from the repository}"
module=${1:?usage: sbatch scripts/slurm.sh <module> output=<folder> [key=value …]}
shift
output=
for setting in "$@"; do
    case $setting in output=*) output=${setting#output=} ;; esac
done
[ -n "$output" ] || { echo "error: give output=<folder>, on a disk that all nodes see" >&2; exit 2; }
if [ -e "$output/config.yaml" ]; then
    # What the first start was to overwrite is overwritten; from then on the job continues its own run.
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
        for setting in "$@"; do
            shift
            case $setting in overwrite=*) ;; *) set -- "$@" "$setting" ;; esac
        done
    fi
    case " $* " in *" overwrite=true "*) ;; *) set -- "$@" resume=true ;; esac
fi

export PATH="$(realpath "${DEFI_VENV:-.venv}")/bin:$PATH"
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Each task is one process of the run. `accelerate launch` is left out: it would not pass the signal and exit code on.
code=0
# One that fails alone is followed by the others a minute later: they wait for it, and would for hours.
srun --kill-on-bad-exit=0 --wait=60 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    [ "$WORLD_SIZE" -gt 1 ] || unset RANK LOCAL_RANK WORLD_SIZE
    exec python -m "$@"
' run "$module" "$@" || code=$?

# 138, 143: SIGUSR1 or SIGTERM came before the run could answer it, while Python started, say.
if [ "$code" -eq "$preempted" ] || [ "$code" -eq 138 ] || [ "$code" -eq 143 ]; then
    echo "stopped by the cluster; queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
