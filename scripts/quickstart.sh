#!/usr/bin/env bash
# From a fresh clone to three iterations of self-play on this machine's CPU: sets up .venv, runs the embedded tiny job,
# shows the held-out table. Further arguments are passed on: scripts/quickstart.sh run.dir=runs/other run.seed=1
set -euo pipefail
source "$(dirname "$0")/setup.sh"
exec sppo train --config configs/tiny_cpu.yaml "$@"
