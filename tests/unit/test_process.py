"""What every actor process does first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

GAPS = """
import sys, time, psutil
from actors.process import give_memory_back

def in_use():
    return psutil.Process().memory_info().rss >> 20

blocks = [b"x" * 60_000 for _ in range(4_000)]  # 229 MiB
kept = blocks[::100]
before = in_use()
del blocks
freed = in_use()
assert freed > before - 50, (before, freed)  # the C library keeps what lies between those that are left
give_memory_back(every_s=0.05)
end = time.monotonic() + 60
while in_use() > before - 200:
    assert time.monotonic() < end, (before, freed, in_use())
    time.sleep(0.05)
"""


def test_freed_memory_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", GAPS], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


SAYS_TOO_MUCH = """
import logging, sys
from actors.process import begin

begin(sys.argv[1], "actor")
logging.warning("a call with planted-in-the-token failed")
try:
    raise OSError("https://me:planted-password@store.example/?sig=planted-signature")
except OSError:
    logging.exception("so did another")

theirs = logging.getLogger("theirs")  # as vLLM's and DeepSpeed's
theirs.propagate = False
theirs.addHandler(logging.StreamHandler(sys.stdout))
theirs.warning("a library says %s", "planted-in-the-token")
try:
    raise OSError("planted-in-the-token")
except OSError:
    theirs.exception("and raises")

import threading, warnings
print("printed planted-in-the-token")
warnings.warn("of planted-in-the-token")
thread = threading.Thread(target=lambda: open("/nowhere/planted-in-the-token"))
thread.start()
thread.join()
"""


def test_what_an_actor_logs_holds_no_secret(tmp_path: Path):
    environ = os.environ | {"HF_TOKEN": "planted-in-the-token"}
    subprocess.run([sys.executable, "-c", SAYS_TOO_MUCH, str(tmp_path)], env=environ, timeout=300, check=True)
    log = (tmp_path / "logs/actor.log").read_text()
    assert "a call with *** failed" in log
    assert "OSError: https://***@store.example/?sig=***" in log
    assert "a library says ***" in log
    assert "OSError: ***" in log
    assert "printed ***\n" in log
    assert "UserWarning: of ***" in log
    assert "No such file or directory: '/nowhere/***'" in log
    assert "planted" not in log


def test_an_actor_works_on_where_its_log_cannot_be_opened(tmp_path: Path):
    (tmp_path / "logs").write_text("not a folder")
    script = "import sys; from actors.process import begin; begin(sys.argv[1], 'actor')"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300, check=True
    )
    assert re.search(r"actor: its log cannot be opened \(.*logs.*\) and is here instead", done.stderr)
