"""The run that the scripted buffer makes, without Ray and without interruption; started by tests/faults.

python learner_script_probe.py POLICY OUT RANK WORLD
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from learner_probe import Probe

from actors.ranks import Ranks

if __name__ == "__main__":
    out, rank, world = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    Probe(Path(sys.argv[1]), out, Ranks.join(b"of the test")).script("script", zero_stage=3)
    dist.destroy_process_group()
