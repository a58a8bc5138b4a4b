"""chaos.py and soak.py find what they look for: their verdicts on runs and readings with one thing wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sppo_ray.config import Config
from sppo_ray.config_io import load_config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts/bench"))

import chaos  # noqa: E402
import kills  # noqa: E402
import soak  # noqa: E402

SYNC = [{"prompt_id": name, "loss_weight": 1.0} for name in "abc"]
ASYNC = [
    {"prompt_id": name, "epoch": epoch, "policy_version": 3, "consumed_version": 4}
    for epoch in range(2)
    for name in "ab"
]


def run(folder: Path, rows: list[dict[str, Any]], weights: bytes = b"weights", steps: Sequence[int] = (1, 2)) -> Path:
    (folder / "iter_1/policy").mkdir(parents=True)
    (folder / "iter_1/policy/model.safetensors").write_bytes(weights)
    pq.write_table(pa.Table.from_pylist(rows), folder / "iter_1/train.parquet")
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    return folder


def config(name: str, tmp_path: Path, *overrides: str) -> Config:
    return load_config(
        ROOT / f"configs/{name}.yaml", ["schedule.iterations=1", f"run.dir={tmp_path / 'x'}", *overrides]
    )


@pytest.mark.parametrize(
    ("rows", "weights", "wrong"),
    [
        (SYNC, b"weights", {}),
        (SYNC[:2], b"weights", {"rows_lost": 1}),
        ([*SYNC, SYNC[0]], b"weights", {"rows_doubled": 1}),
        ([*SYNC[:2], SYNC[0]], b"weights", {"rows_lost": 1, "rows_doubled": 1}),
        ([*SYNC[:2], SYNC[2] | {"loss_weight": 1.1}], b"weights", {"rows_different": 1}),
        (SYNC[::-1], b"weights", {"rows_different": 2}),
        (SYNC, b"weightz", {"weights_differ": True}),
    ],
)
def test_a_sync_run_is_compared_row_by_row(
    tmp_path: Path, rows: list[Any], weights: bytes, wrong: dict[str, int]
) -> None:
    undisturbed = run(tmp_path / "undisturbed", SYNC)
    verdict = chaos.compare(config("tiny_cpu", tmp_path), run(tmp_path / "run", rows, weights), undisturbed)
    nothing = chaos.Verdict(0, 0, 0, weights_differ=False, beyond_bound=0, updates_wrong=0)
    assert verdict == replace(nothing, **wrong)
    assert verdict.ok == (not wrong)


@pytest.mark.parametrize(("steps", "wrong"), [((1, 2), 0), ((1,), 1), ((1, 2, 2), 1), ((1, 2, 3), 1), ((), 2)])
def test_every_update_is_on_record_once(tmp_path: Path, steps: tuple[int, ...], wrong: int) -> None:
    undisturbed, mine = run(tmp_path / "undisturbed", SYNC), run(tmp_path / "run", SYNC, steps=steps)
    verdict = chaos.compare(config("tiny_cpu", tmp_path), mine, undisturbed)
    assert (verdict.updates_wrong, verdict.ok) == (wrong, not wrong)


def test_weights_that_are_not_there_equal_nothing(tmp_path: Path) -> None:
    both = [run(tmp_path / name, SYNC) for name in ("undisturbed", "run")]
    for folder in both:
        (folder / "iter_1/policy/model.safetensors").unlink()
    with pytest.raises(SystemExit, match="holds no weights"):
        chaos.compare(config("tiny_cpu", tmp_path), *both)


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [
        (ASYNC, {}),
        (ASYNC[::-1], {}),
        (ASYNC[1:], {"rows_lost": 1}),
        ([*ASYNC, ASYNC[0]], {"rows_doubled": 1}),
        ([*ASYNC[:3], ASYNC[3] | {"policy_version": 2}], {"beyond_bound": 1}),
        ([*ASYNC[:3], ASYNC[3] | {"policy_version": 5}], {"beyond_bound": 1}),
    ],
)
def test_an_async_run_has_every_prompt_once_an_epoch_within_the_bound(
    tmp_path: Path, rows: list[Any], wrong: dict[str, int]
) -> None:
    streaming = config("tiny_cpu_async", tmp_path, "learner.epochs=2", "schedule.max_staleness=1")
    verdict = chaos.compare(streaming, run(tmp_path / "run", rows), run(tmp_path / "undisturbed", SYNC[:2]))
    nothing = chaos.Verdict(0, 0, None, weights_differ=None, beyond_bound=0, updates_wrong=0)
    assert verdict == replace(nothing, **wrong)
    assert verdict.ok == (not wrong)


AT_5 = {
    "judge": (400.0, 50, 30, 4, 7),
    "raylet": (20.0, 90, 33, 4, 1),
    soak.KEPT: (4.0, 0, 0, 0, 0),
    soak.TOUCHED: (9.0, 0, 0, 0, 0),
}


@pytest.mark.parametrize(
    ("later", "found"),
    [
        ({"judge": (412.0, 50, 30, 4, 7)}, []),  # 3 %
        ({"judge": (412.1, 50, 30, 4, 7)}, ["judge: MiB grew from 400 to 412.1 at 60 minutes"]),
        ({"judge": (400.0, 52, 30, 4, 7)}, ["judge: open files grew from 50 to 52 at 60 minutes"]),
        ({"judge": (400.0, 51, 30, 4, 7)}, []),
        ({"judge": (400.0, 50, 31, 4, 7)}, ["judge: threads grew from 30 to 31 at 60 minutes"]),
        ({"judge": (400.0, 50, 30, soak.MOST_POOL_THREADS, 7)}, []),
        (
            {"judge": (400.0, 50, 30, soak.MOST_POOL_THREADS + 1, 7)},
            [f"judge: gRPC's pools have {soak.MOST_POOL_THREADS + 1} threads at 60 minutes"],
        ),
        ({"judge": (200.0, 20, 10, 4, 8)}, ["judge: is another process at 60 minutes"]),
        ({}, ["judge: was not there at every reading"]),
        ({"judge": AT_5["judge"], "raylet": (20.6, 90, 33, 6, 1)}, []),
        ({"judge": AT_5["judge"], "raylet": (20.7, 90, 33, 6, 1)}, ["raylet: MiB grew from 20 to 20.7 at 60 minutes"]),
        ({"judge": AT_5["judge"], soak.TOUCHED: (11.2, 0, 0, 0, 0)}, []),
        (
            {"judge": AT_5["judge"], soak.TOUCHED: (11.4, 0, 0, 0, 0)},
            [f"{soak.TOUCHED}: MiB grew from 9 to 11.4 at 60 minutes"],
        ),
        (
            {"judge": AT_5["judge"], soak.KEPT: (4.2, 0, 0, 0, 0)},
            [f"{soak.KEPT}: MiB grew from 4 to 4.2 at 60 minutes"],
        ),
    ],
)
def test_what_has_grown_in_an_hour(later: dict[str, Any], found: list[str]) -> None:
    readings = {5.0: AT_5, 60.0: {name: each for name, each in AT_5.items() if name != "judge"} | later}
    named = {mark: {name: soak.Figures(*each) for name, each in reading.items()} for mark, reading in readings.items()}
    assert soak._grown(named, 0.03) == found


def test_an_object_store_that_cannot_be_read_is_not_taken_for_a_flat_one() -> None:
    def sample(location: str, value: float) -> soak.Sample:
        return soak.Sample("ray_object_store_memory", {"Location": location}, value)

    found = [sample("MMAP_SHM", 3.0), sample("MMAP_DISK", 0.0), sample("WORKER_HEAP", 5.0), sample("SPILLED", 7.0)]
    assert soak._in_memory(found) == [3.0, 0.0]
    with pytest.raises(SystemExit, match="do not say what is in the object store"):
        soak._in_memory(found[2:])


def test_the_summary_of_what_was_read() -> None:
    each = [soak.Figures(mib, 50, threads, 4, 7) for mib, threads in ((4.0, 30), (5.0, 30), (9.0, 31), (9.0, 30))]
    assert soak._summary("judge", each) == (9.0, 50, 30, 4, 7)
    in_use = [soak.Figures(mib, 0, 0, 0, 0) for mib in (7.0, 3.5, 3.0, 7.0)]
    assert soak._summary(soak.KEPT, in_use) == (3.0, 0, 0, 0, 0)
    assert soak._summaries({"judge": each, soak.KEPT: 15 * in_use}).keys() == {"judge", soak.KEPT}
    with pytest.raises(SystemExit, match="told what is in its object store 4 times of 60"):
        soak._summaries({"judge": each, soak.KEPT: in_use})


def test_a_run_that_ends_while_it_is_read_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = SimpleNamespace(poll=lambda: None, returncode=1)
    monkeypatch.setattr(soak, "read", lambda run: setattr(run, "poll", lambda: 1) or {})
    with pytest.raises(SystemExit, match=r"ended \(exit code 1\) before the reading at 0 minutes was done"):
        soak._follow(ended, [0])


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("ray::RolloutWorker.generate", "rollout"),
        ("ray::rollout-0:RolloutWorker.__init__", "rollout"),
        ("ray::judge-10:JudgeWorker.__init__", "judge"),
        ("ray::buffer:BufferActor.__init__", "buffer"),
        ("ray::RayTrainWorker", "learner"),
        ("ray::TrainController", "controller"),
        ("VLLM::EngineCore", "engine"),
        ("ray::IDLE", None),
        ("ray::NotRolloutWorker", None),
    ],
)
def test_the_titles_by_which_victims_are_found(title: str, kind: str | None) -> None:
    assert [found for found in (*kills.CLASSES, "engine") if kills.is_title(title, found)] == ([kind] if kind else [])
