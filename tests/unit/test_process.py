"""What every actor process does first."""

from __future__ import annotations

import subprocess
import sys

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
