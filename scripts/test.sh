#!/usr/bin/env bash
# The tests, in the same environment as quickstart.sh. Arguments go to pytest: scripts/test.sh tests/unit -k win_rates
set -euo pipefail
source "$(dirname "$0")/setup.sh"
if [ $# -eq 0 ]; then
    echo "test: ruff and mypy"
    ruff check .
    ruff format --check .
    mypy
    echo "test: 15 to 20 minutes on two cores; the slow tests come first; those in tests/gpu are skipped where there is no GPU"
    # Two processes, each a file at a time: most of a test's time is waiting for others to start. In our order: slow ones first.
    exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
fi
exec python -m pytest "$@"
