"""A bench script that is ended takes along what it has started."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "scripts/bench"
SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from ending import exit_on_sigterm
exit_on_sigterm()
try:
    print("working", flush=True)
    time.sleep(60)
finally:
    print("cleaning", flush=True)
    sys.stdin.readline()  # however long it takes
    print("cleaned", flush=True)
"""


def test_a_second_sigterm_does_not_cut_short_the_cleaning_after_the_first() -> None:
    command = [sys.executable, "-c", SCRIPT, str(BENCH)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "working\n"
        script.send_signal(signal.SIGTERM)
        assert script.stdout.readline() == "cleaning\n"
        script.send_signal(signal.SIGTERM)
        out, errors = script.communicate("\n", timeout=60)
    assert (out, errors, script.returncode) == ("cleaned\n", "terminated\n", 1)
