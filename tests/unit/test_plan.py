"""The plan: counts by hand, what is known without a download, what is refused, what is shown."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sppo_ray.errors import ConfigError
from sppo_ray.plan import SNORKEL, Plan, make_plan, prompts_per_iteration, refuse_unfit, render_plan
from tests.unit.gpu_configs import gpu_config

FITTING: dict[str, Any] = {"rollout": {"gpu_memory_utilization": 0.7}, "judge": {"dtype": "float16"}}
SPLITS = {"data": {"prompts": SNORKEL, "splits": ["train_iteration_1", "train_iteration_2", "train_iteration_3"]}}


def shown(plan: Plan) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(render_plan(plan))
    return capture.get()


def test_the_papers_run() -> None:
    plan = make_plan(gpu_config(8, sections=FITTING | SPLITS))
    assert [it.prompts for it in plan.iterations] == [19_766, 19_958, 19_996]
    assert [it.steps for it in plan.iterations] == [309, 312, 313]  # 19,766 / 64 = 308.8; the authors' logs have ~309
    first = plan.iterations[0]
    assert first.responses == 19_766 * 5
    assert first.judge_pairs == 19_766 * 20
    assert first.sampled_tokens == 19_766 * 5 * 2048
    assert first.judged_tokens == 19_766 * 20 * 2048
    assert first.trained_tokens == 19_766 * 2 * 1024
    refuse_unfit(plan)


def test_steps_count_a_short_last_batch_and_epochs() -> None:
    sections = {"learner": {"batch_size": 4, "epochs": 3}, "schedule": {"iterations": 2}}
    plan = make_plan(gpu_config(0, (1, 1, 1), sections), prompts=19)
    # slices of 10 and 9: three batches each, three epochs
    assert [(it.prompts, it.steps) for it in plan.iterations] == [(10, 9), (9, 9)]
    assert plan.iterations[0].trained_tokens == 10 * 2 * 1024 * 3


def test_all_responses_are_trained_under_the_all_rule() -> None:
    plan = make_plan(gpu_config(0, (1, 1, 1), {"selection": {"rule": "all"}}), prompts=3)
    assert plan.iterations[0].trained_tokens == 5 * 1024


def test_unknown_number_of_prompts_is_said_to_be_unknown() -> None:
    plan = make_plan(gpu_config(8, sections=FITTING))
    assert plan.iterations[1].prompts is None
    assert plan.iterations[1].steps is None
    assert "unknown until the data set is read" in shown(plan)


def test_prompts_given_per_iteration_are_taken_as_they_are() -> None:
    assert prompts_per_iteration(gpu_config(8), [5, 6, 7]) == (5, 6, 7)


@pytest.mark.parametrize(
    ("data", "counts"),
    [
        ({"prompts": "UCLA-AGI/data-mistral-7b-instruct-sppo-iter2"}, (6653, 6653, 6652)),
        (SPLITS["data"] | {"limit": 100}, (34, 33, 33)),
        (SPLITS["data"] | {"splits": ["train_iteration_1", "test_iteration_1", "x"]}, (19_766, None, None)),
        ({"prompts": "someone/some-prompts", "limit": 10}, (None, None, None)),
    ],
)
def test_prompts_per_iteration(data: dict[str, Any], counts: tuple[int | None, ...]) -> None:
    assert prompts_per_iteration(gpu_config(8, sections={"data": data}), None) == counts


def test_a_local_file_is_counted_as_it_will_be_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    texts = ["a", "b", "b", " ", "c", "d"]  # one twice, one empty
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    config = gpu_config(0, (1, 1, 1), {"data": {"prompts": str(path)}, "schedule": {"iterations": 3}})
    assert prompts_per_iteration(config, None) == (2, 1, 1)


def test_shares_match_the_slices_that_are_made() -> None:
    from sppo_ray.prompts import RawPrompt, slice_prompts

    raw = [RawPrompt(str(index), str(index)) for index in range(20)]
    config = gpu_config(0, (1, 1, 1))
    assert prompts_per_iteration(config, 20) == tuple(map(len, slice_prompts(raw, 3, seed=1)))


def test_layout_and_model_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"learner\.num_workers=4"):
        make_plan(gpu_config(8, (8, 4, 8)))
    with pytest.raises(ConfigError, match="hf download"):
        make_plan(gpu_config(8, sections={"policy": {"model": "someone/unheard-of-7b"}}))


def test_what_does_not_fit_is_shown_and_then_refused() -> None:
    plan = make_plan(gpu_config(1, sections=FITTING))
    assert "Does not fit" in shown(plan)
    with pytest.raises(ConfigError, match="every GPU, training"):
        refuse_unfit(plan)


def test_the_table_names_every_gpu_of_every_node() -> None:
    text = shown(make_plan(gpu_config(16, sections=FITTING)))
    for part in ("rollout-0 0.9, learner-0 0.09, judge-0 0.01", "rollout-15", "7.24 B parameters", "Fits 80 GB GPUs"):
        assert part in text
    assert "idle" in shown(make_plan(gpu_config(8, (3, 3, 1), layout="disaggregated")))


def test_on_cpu_the_table_shows_cores_and_host_memory() -> None:
    text = shown(make_plan(gpu_config(0, (1, 2, 1)), prompts=10))
    assert "cores asked of Ray" in text
    assert "host, each node" in text


def recommended(text: str) -> list[str]:
    """Lines of the table of layouts."""
    return [line for line in text.splitlines() if line.count("\u2502") == 8 and "%" in line]


@pytest.mark.parametrize(("gpus", "own", "others"), [(2, (1, 1, 1), 0), (4, (2, 2, 1), 3)])
def test_layouts_whose_judges_sit_beside_rollouts_are_compared_on_the_gpus_there_are(
    gpus: int, own: tuple[int, int, int], others: int
) -> None:
    """More of those would not do: every one of the table is of so many GPUs."""
    sections = FITTING | {"schedule": {"mode": "async"}, "learner": {"micro_batch_size": 2, "batch_size": 16}}
    rows = recommended(shown(make_plan(gpu_config(gpus, own, sections), prompts=100)))
    found = [tuple(int(cell) for cell in row.split("\u2502")[1:4]) for row in rows]
    assert own in found
    assert len(found) == 1 + others
    assert all(sum(split) == gpus or split[0] + split[1] == gpus for split in found)


def test_an_async_plan_recommends_a_layout_and_shows_its_own_beside_it() -> None:
    sections = FITTING | {"schedule": {"mode": "async"}, "learner": {"micro_batch_size": 2, "batch_size": 16}}
    # Six rollout workers for one learner rank: whatever the rates, the learner is what all wait for.
    text = shown(make_plan(gpu_config(8, (6, 1, 1), sections), prompts=100))
    rows = recommended(text)
    assert "this config" in rows[-1]
    assert "learner" in rows[-1]
    assert len(rows) == 4
    speeds = [float(row.split("\u2502")[5]) for row in rows]
    assert speeds == sorted(speeds, reverse=True)
    assert all(row.split("\u2502")[4].strip() in ("yes", "no") for row in rows)
    assert "recommended" not in shown(make_plan(gpu_config(8, sections=FITTING)))
