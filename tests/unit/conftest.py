import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the factories beside the tests


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Bits depend on the number of threads, and an engine that ran in this process before may have changed it."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
