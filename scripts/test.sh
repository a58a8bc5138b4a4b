#!/usr/bin/env bash
# The tests, in the same environment as quickstart.sh. Arguments go to pytest: scripts/test.sh tests/unit -k win_rates
set -euo pipefail
source "$(dirname "$0")/setup.sh"
if [ $# -eq 0 ]; then
    echo "test: ruff and mypy"
    ruff check .
    ruff format --check .
    mypy
    # Two processes: most of a test's time is waiting for others to start.
    exec python -m pytest -n 2 --dist loadgroup
fi
exec python -m pytest "$@"
