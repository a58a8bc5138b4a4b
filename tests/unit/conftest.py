"""What unit tests share."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the factories beside the tests


@pytest.fixture
def dumped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Whose stacks were taken, and when; it takes 3 s."""
    taken = []

    async def dump(name: str, node_id: str, pid: int, run_dir: str) -> Path:
        taken.append((name, asyncio.get_running_loop().time()))
        await asyncio.sleep(3)
        return Path(run_dir) / f"{name}.stacks.txt"

    monkeypatch.setattr("actors.revival.dump", dump)
    monkeypatch.setattr("actors.revival.ray.kill", lambda actor: actor.die("killed by ray.kill"))
    return taken
