"""Which tests share a process when the suite runs in several (`scripts/test.sh`: two): what is slow to start is started once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.actors.job_runs import PLANTED, sppo, train

SHARED = {"whole": "jobs", "head": "jobs", "ray_local": "ray"}  # by session fixture


@pytest.hookimpl(tryfirst=True)  # xdist looks at the groups in this hook, too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        used = getattr(item, "fixturenames", ())
        group = next((name for fixture, name in SHARED.items() if fixture in used), item.path.stem)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The shipped default made small, run undisturbed as a user would: (run directory, output)."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    process = sppo(*train(run_dir), **PLANTED)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return run_dir, output
