#!/usr/bin/env bash
# Make the virtual environment and install; does nothing when that is already done. Other scripts source it:
#   . scripts/setup.sh        # installs if need be, then activates
# DEFI_VENV names another environment (default .venv), PYTHON another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${DEFI_VENV:-.venv}

find_python() {
    # 3.11 and 3.10 have PyBullet wheels, so they simulate; 3.12 trains only.
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.10 python3 python3.12; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10, 3.11 or 3.12 found; install one or set PYTHON=<path>" >&2
    return 1
}

pip_install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
simpler_due=$venv/.simpler-due # SIMPLER's simulator is wanted and not installed yet
stamp=$venv/.installed-$(cat requirements.txt pyproject.toml | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
    python=$(find_python)
    echo "Installing into $venv with $("$python" --version) (a few minutes, once) …"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    extras=track,data,dev
    if "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] >= (3, 12))'; then
        extras=sim,$extras
    else
        echo "Python 3.12 has no PyBullet wheel: training works, simulation needs Python 3.10 or 3.11."
    fi
    pip_install -e ".[$extras]"
    if [ "$(uname -sm)" = "Linux x86_64" ]; then
        touch "$simpler_due"
    else
        echo "SIMPLER's simulator is left out: SAPIEN 3 draws on Linux x86_64."
    fi
    rm -f "$venv"/.installed-*
    touch "$stamp"
fi
if [ -e "$simpler_due" ]; then
    if pip_install -e ".[simpler]"; then
        rm "$simpler_due"
    else
        echo "SIMPLER's simulator could not be installed; all else works. The next script tries again; not to: rm $simpler_due"
    fi
fi
. "$venv/bin/activate"

can_draw_simpler() { # SIMPLER needs a Vulkan driver; where none works, one that draws on the CPU is set up and used
    local draw='from defi.benchmarks.simpler.check import drawing; drawing()' variables
    if ! python -c 'import sapien' 2> /dev/null; then
        echo "SAPIEN is not installed: pip install -e \".[simpler]\"" >&2
        return 1
    fi
    python -c "$draw" 2> /dev/null && return
    variables=$(bash scripts/vulkan_cpu.sh 2> >(tail -n 1 >&2)) && eval "$variables" &&
        python -c "$draw" 2> >(tail -n 1 | sed 's/^[^ ]*Error: //' >&2)
}

launch() { # module, settings …: `accelerate launch` with the user's configuration; without one, on all visible GPUs
    local options=(--quiet)
    if [ ! -e "${HF_HOME:-$HOME/.cache/huggingface}/accelerate/default_config.yaml" ]; then
        local gpus
        gpus=$({ nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true; } | wc -l)
        [ -z "${CUDA_VISIBLE_DEVICES+set}" ] || gpus=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c .) || gpus=0
        if [ "$gpus" -le 1 ] && [ -z "${ACCELERATE_ARGS:-}" ]; then # signals and exit code are its own
            [ "$gpus" -gt 0 ] || export ACCELERATE_USE_CPU=true
            exec python -m "$@"
        fi
        options+=(--num_machines 1 --mixed_precision no --dynamo_backend no --num_processes $((gpus > 1 ? gpus : 1)))
        [ "$gpus" -le 1 ] || options+=(--multi_gpu)
        [ "$gpus" -gt 0 ] || options+=(--cpu)
    fi
    # ACCELERATE_ARGS: more options for `accelerate launch`, such as "--num_processes 4"
    accelerate launch "${options[@]}" ${ACCELERATE_ARGS:-} -m "$@" &
    local job=$! code=0
    trap 'pkill -TERM -P $job || true' TERM USR1 INT # accelerate would leave its processes running
    wait $job || code=$?
    while kill -0 $job 2>/dev/null; do # a signal ended the wait; they save and leave
        code=0
        wait $job || code=$?
    done
    exit $code
}
