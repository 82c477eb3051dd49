#!/usr/bin/env bash
# Run the tests of the LeRobot plug-in, by LeRobot's own commands: scripts/test_lerobot.sh [pytest arguments]
# They need an environment of their own (Python 3.12, LeRobot 0.6, some 6 GB), which is made once. DEFI_LEROBOT_VENV names
# another place than .venv-lerobot, PYTHON another interpreter; uv is used where there is one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${DEFI_LEROBOT_VENV:-.venv-lerobot}
plugin=integrations/lerobot_policy_defi

install() {
    if command -v uv > /dev/null; then
        uv pip install --quiet --python "$venv/bin/python" "$@"
    else
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    fi
}

stamp=$venv/.installed-defi-$(cat pyproject.toml $plugin/pyproject.toml | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
    python=${PYTHON:-python3.12}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2> /dev/null; then
        echo "error: LeRobot 0.6 needs Python 3.12, $python is none; install it or set PYTHON=<path>" >&2
        exit 2
    fi
    echo "Installing into $venv (a few minutes, once) …"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    install -e $plugin 'gym-pusht>=0.1.5,<0.2' 'pymunk>=6.6,<7' 'pytest>=8'
    install --no-deps -e .
    rm -f "$venv"/.installed-defi-*
    touch "$stamp"
fi
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$venv/bin/python" -m pytest -m lerobot tests/test_lerobot_plugin.py "$@"
