"""What the tests of whole jobs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.actors.job_runs import PLANTED, sppo, train


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The shipped default made small, run undisturbed as a user would: (run directory, output)."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    process = sppo(*train(run_dir), **PLANTED)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return run_dir, output
