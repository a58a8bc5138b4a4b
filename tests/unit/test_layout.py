"""Layouts for 0 to 16 GPUs, and what is refused."""

from __future__ import annotations

import pytest

from sppo_ray.config import Config
from sppo_ray.errors import ConfigError
from sppo_ray.layout import Assignment, PlacementError, Role, check_placement, compute_layout
from tests.unit.gpu_configs import gpu_config


def at(role: Role, gpu: str, node: str = "a") -> Assignment:
    return Assignment(role, f"{role}-on-{node}{gpu}", node, (gpu,))


def test_on_cpu_many_workers_fit_two_cores() -> None:
    layout = compute_layout(gpu_config(0, (3, 2, 2)))
    assert layout.kind == "cpu"
    assert not layout.takes_turns
    asks = [layout.of(role) for role in layout.creation_order]
    assert all(ask.gpus == 0 for ask in asks)
    assert sum(ask.workers * ask.cpus for ask in asks) < 1
    assert layout.seats() == ()


@pytest.mark.parametrize(
    ("gpus", "per_node", "nodes"), [(1, 8, 1), (2, 8, 1), (4, 8, 1), (8, 8, 1), (16, 8, 2), (8, 4, 2)]
)
def test_colocated_fills_every_gpu_exactly(gpus: int, per_node: int, nodes: int) -> None:
    layout = compute_layout(gpu_config(gpus, gpus_per_node=per_node))
    assert layout.kind == "colocated"
    assert layout.takes_turns
    assert (layout.nodes, layout.gpus) == (nodes, gpus)
    assert [layout.of(role).workers for role in layout.creation_order] == [gpus] * 3
    assert sum(layout.of(role).gpus for role in layout.creation_order) == pytest.approx(1.0)
    assert layout.seats()[gpus - 1] == tuple((role, gpus - 1) for role in layout.creation_order)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_each_share_leaves_one_place_per_gpu_to_the_next_role(gpus: int) -> None:
    """On a GPU, and in the sum over a node's GPUs, by which Ray deals a placement group's bundles to nodes."""
    layout = compute_layout(gpu_config(gpus))
    free = 1.0
    for role in layout.creation_order:
        share = layout.of(role).gpus
        assert int(free / share + 1e-9) == 1, role
        assert int(gpus * free / share + 1e-9) == gpus, role
        free -= share


def test_without_a_learner_a_gpu_still_has_room_for_one_judge_only() -> None:
    layout = compute_layout(gpu_config(8)).without_learner()
    assert layout.rollout.gpus + layout.judge.gpus == pytest.approx(1.0)
    assert layout.judge.gpus == 0.1
    apart = compute_layout(gpu_config(8, (3, 4, 1), layout="disaggregated"))
    assert apart.without_learner() == apart


def test_fewer_judges_than_gpus() -> None:
    seats = compute_layout(gpu_config(4, (4, 4, 1))).seats()
    assert seats[0] == (("rollout", 0), ("learner", 0), ("judge", 0))
    assert seats[3] == (("rollout", 3), ("learner", 3))


def test_disaggregated_gives_whole_gpus() -> None:
    layout = compute_layout(gpu_config(8, (3, 4, 1), layout="disaggregated"))
    assert not layout.takes_turns
    assert {layout.of(role).gpus for role in layout.creation_order} == {1.0}
    seats = layout.seats()
    assert seats[0] == (("rollout", 0),)
    assert seats[3] == (("learner", 0),)
    assert seats[7] == (("judge", 0),)


def test_disaggregated_over_two_nodes_may_leave_gpus_idle() -> None:
    layout = compute_layout(gpu_config(16, (6, 8, 1), layout="disaggregated"))
    assert layout.nodes == 2
    assert layout.seats()[15] == ()


def test_auto_follows_the_schedule() -> None:
    config = gpu_config(8, (3, 4, 1))
    asynchronous = config.model_copy(update={"schedule": config.schedule.model_copy(update={"mode": "async"})})
    assert compute_layout(asynchronous).kind == "disaggregated"
    assert compute_layout(gpu_config(8)).kind == "colocated"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (gpu_config(8, (4, 8, 8)), ["rollout.num_workers=4", "set rollout.num_workers=8"]),
        (gpu_config(8, (8, 4, 8)), ["learner.num_workers=4", "set learner.num_workers=8"]),
        (gpu_config(2, (2, 2, 3)), ["judge.num_workers=3", "set judge.num_workers=2"]),
        (gpu_config(32, gpus_per_node=16), ["cluster.gpus_per_node=16", "up to 8"]),
        (
            gpu_config(8, sections={"learner": {"zero_stage": 2}}),
            ["learner.zero_stage=2", "set learner.zero_stage=3"],
        ),
        (gpu_config(12), ["cluster.gpus=12", "cluster.gpus_per_node=8", "cluster.gpus=8"]),
        (gpu_config(2, (2, 1, 1), layout="disaggregated"), ["rollout.num_workers=2 leaves 0", "learner.num_workers=1"]),
        (gpu_config(4, (1, 3, 2), layout="disaggregated"), ["judge.num_workers=2", "set judge.num_workers=1"]),
        (gpu_config(1, (1, 1, 1), layout="disaggregated"), ["cluster.gpus=1", "cluster.layout=colocated"]),
    ],
)
def test_refusals_name_key_value_and_remedy(config: Config, named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        compute_layout(config)
    for part in named:
        assert part in str(error.value)


def test_check_placement_accepts_one_of_each_per_gpu() -> None:
    layout = compute_layout(gpu_config(2))
    roles: tuple[Role, ...] = ("rollout", "learner", "judge")
    check_placement(layout, [at(role, gpu) for role in roles for gpu in "01"])
    check_placement(layout, [at("rollout", "0"), at("rollout", "0", node="b")])  # same number, another node


def test_check_placement_catches_two_of_a_role() -> None:
    layout = compute_layout(gpu_config(2))
    with pytest.raises(PlacementError, match=r"GPU 1 of node a carries learner-on-a1, learner-on-a1"):
        check_placement(layout, [at("learner", "1"), at("learner", "1")])


def test_check_placement_catches_a_worker_without_its_gpu() -> None:
    layout = compute_layout(gpu_config(2))
    with pytest.raises(PlacementError, match=r"judge-0 on node a was given GPUs none"):
        check_placement(layout, [Assignment("judge", "judge-0", "a", ())])


def test_check_placement_catches_roles_that_do_not_meet() -> None:
    layout = compute_layout(gpu_config(2))
    rollouts = [at("rollout", gpu) for gpu in "01"]
    with pytest.raises(PlacementError, match=r"over 4 GPUs, but the run has 2"):
        check_placement(layout, rollouts + [at("learner", gpu) for gpu in "23"])


def test_check_placement_wants_whole_gpus_when_disaggregated() -> None:
    layout = compute_layout(gpu_config(8, (3, 4, 1), layout="disaggregated"))
    check_placement(layout, [at("rollout", "0"), at("learner", "1"), at("judge", "2")])
    with pytest.raises(PlacementError, match="one worker on each"):
        check_placement(layout, [at("rollout", "0"), at("judge", "0")])


def test_check_placement_has_nothing_to_say_on_cpu() -> None:
    check_placement(compute_layout(gpu_config(0, (1, 2, 1))), [Assignment("rollout", "rollout-0", "a", ())])


def test_judges_sit_beside_rollouts_where_there_are_too_few_gpus() -> None:
    layout = compute_layout(gpu_config(2, (1, 1, 1), layout="disaggregated"))
    assert (layout.rollout.gpus, layout.learner.gpus, layout.judge.gpus) == (0.9, 1.0, 0.1)
    assert layout.seats() == ((("rollout", 0), ("judge", 0)), (("learner", 0),))
    check_placement(layout, [at("rollout", "0"), at("learner", "1"), at("judge", "0")])
    with pytest.raises(PlacementError, match="a judge may sit beside a rollout"):
        check_placement(layout, [at("rollout", "0"), at("learner", "0"), at("judge", "1")])
    assert not compute_layout(gpu_config(8, (3, 4, 1), layout="disaggregated")).judges_share
