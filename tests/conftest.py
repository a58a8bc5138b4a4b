"""What the tests of whole jobs share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

from tests.actors.job_runs import LIMIT_S, PLANTED, sppo, train

# Workers that Ray starts beforehand, one for each CPU, serve none of our actors, which have environments of their own.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")

LOG_END = 3000  # characters

# No time limit for an example: 0.2 s, the default, is less than a busy machine may hold anyone up.
settings.register_profile("no deadline", settings(), deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The shipped default made small, run undisturbed as a user would: (run directory, output). Test processes share it, and
    so do whole test runs that have $SPPO_TEST_SHARED, a folder, in common."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    shared = Path(os.environ.get("SPPO_TEST_SHARED", shared))
    run_dir, output = shared / "whole", shared / "whole.log"
    with FileLock(shared / "whole.lock"):
        if not output.exists():
            shutil.rmtree(run_dir, ignore_errors=True)  # of another process's try that failed
            process = sppo(*train(run_dir), **PLANTED)
            said, _ = process.communicate(timeout=LIMIT_S)
            assert process.returncode == 0, said
            output.write_text(said)
    return run_dir, output.read_text()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With a failure, what the actors of its run directories said last: on another machine nothing else is left of them."""
    report = yield
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    if report.failed and folder is not None:
        for log in sorted(folder.rglob("logs/*.log")):
            report.sections.append((f"{log.relative_to(folder)}, its end", log.read_text(errors="replace")[-LOG_END:]))
    return report
