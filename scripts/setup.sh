#!/usr/bin/env bash
# Makes .venv with the pinned CPU dependencies. Sourced by quickstart.sh and test.sh; does nothing when .venv is up to date.
#
#   PYTHON             the Python to use (default: python3.11, else python3; 3.11 or 3.12)
#   SPPO_TORCH_INDEX   index of CPU builds of torch, asked only if no other configured source has the pinned build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH="torch==2.13.0+cpu"
SPPO_TORCH_INDEX="${SPPO_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
wanted="$(cat requirements/cpu.lock pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)"

if [ "$(cat .venv/.installed 2>/dev/null || true)" = "$wanted" ]; then
    echo "setup: .venv is up to date"
else
    PYTHON="${PYTHON:-$(command -v python3.11 || command -v python3)}"
    "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
        || { echo "setup: $PYTHON is not Python 3.11 or 3.12; set PYTHON=/path/to/python3.11" >&2; exit 2; }
    echo "setup: making .venv with $("$PYTHON" --version) (about 2 minutes, 4 GB)"
    rm -rf .venv
    "$PYTHON" -m venv .venv
    # --no-deps: vLLM's metadata asks for torchvision, torchaudio and torchcodec, whose default builds want CUDA libraries and
    # break `import transformers` beside a CPU torch. Nothing here needs them; the lock file lists all that is needed.
    echo "setup: installing $TORCH"
    .venv/bin/pip install -qq --no-deps "$TORCH" 2>/dev/null \
        || .venv/bin/pip install -qq --no-deps --extra-index-url "$SPPO_TORCH_INDEX" "$TORCH"
    echo "setup: installing $(grep -c == requirements/cpu.lock) pinned packages"
    .venv/bin/pip install -qq --no-deps -r requirements/cpu.lock
    .venv/bin/pip install -qq --no-deps --no-build-isolation -e .
    echo "$wanted" > .venv/.installed
    echo "setup: done in $SECONDS s"
fi
export PATH="$PWD/.venv/bin:$PATH"
