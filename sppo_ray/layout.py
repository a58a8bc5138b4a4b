"""Who runs where: pure arithmetic from the config to workers and GPU shares. No Ray here.

`colocated`: every GPU carries a rollout worker, a learner rank and a judge; rollout and learner take turns (sleep /
offload). `disaggregated`: each GPU belongs to one role, or, where there are too few, judges sit beside rollout workers.
`cpu`: no GPUs; the roles share the cores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from sppo_ray.config import Config
from sppo_ray.errors import ConfigError, SppoError

Role = Literal["rollout", "learner", "judge"]
Kind = Literal["cpu", "colocated", "disaggregated"]

# Bookkeeping, not memory: Ray enforces no share, and Ray Train makes its own placement group and cannot be told a GPU,
# so arithmetic must leave exactly one place per GPU to the next role. Created in the order of `Layout.creation_order`:
# after 0.9 no second rollout fits; of the 0.1 left no second 0.09 fits; 0.01 is left for one judge. Other orders, or
# equal shares, put two of a kind on one GPU, since Ray fills the GPU with the least room first.
# It must hold for a node's sum as well: a placement group's bundles are first dealt to nodes by the sum of what is free
# there, and a node dealt five bundles for four GPUs refuses them for ever (seen with 0.6, 0.3, 0.1 on two nodes of four:
# 4 x 0.4 / 0.3 = 5). With n GPUs a node, a share s of what is free, f, is safe if n f / s < n + 1; so these are for n <= 8.
COLOCATED_GPUS: dict[Role, float] = {"rollout": 0.9, "learner": 0.09, "judge": 0.01}
MAX_NODE_GPUS = 8
# Disaggregated with judges on the rollouts' GPUs: after 0.9 no second rollout fits, nor a learner rank, which asks for 1.
SHARED_WITH_JUDGE: dict[Role, float] = {"rollout": 0.9, "learner": 1.0, "judge": 0.1}

# Beside GPUs the core counts are bookkeeping only (Ray does not pin processes to cores), and they are kept low so that
# the scarce resource alone decides: 1.75 per GPU, which a machine with two cores per GPU still has.
GPU_CPUS: dict[Role, float] = {"rollout": 1.0, "learner": 0.5, "judge": 0.25}

# Without GPUs the workers share whatever cores there are. Asking for a core each would leave a job of four workers
# waiting for ever on a two-core Ray head; at 0.1 it takes twenty. Real threads are bounded by cluster.threads.
CPU_CPUS = 0.1


class PlacementError(SppoError):
    """Workers did not get the GPUs that the layout means them to have."""


@dataclass(frozen=True, slots=True)
class RoleLayout:
    """The workers of one role and what each asks of Ray."""

    workers: int
    gpus: float  # per worker; a fraction shares a GPU
    cpus: float  # per worker


@dataclass(frozen=True, slots=True)
class Layout:
    kind: Kind
    rollout: RoleLayout
    judge: RoleLayout
    learner: RoleLayout
    nodes: int
    gpus_per_node: int = 0  # GPUs of one node that this run uses; 0 on CPU

    # Not a field: the shares above are right in this order only.
    creation_order: ClassVar[tuple[Role, ...]] = ("rollout", "learner", "judge")

    @property
    def takes_turns(self) -> bool:
        """Whether rollout workers sleep while the learner trains."""
        return self.kind == "colocated"

    @property
    def judges_share(self) -> bool:
        """Whether judges sit on the rollout workers' GPUs."""
        return self.kind != "cpu" and self.judge.gpus < 1

    @property
    def gpus(self) -> int:
        """GPUs of the run over all nodes, idle ones included."""
        return self.nodes * self.gpus_per_node

    def of(self, role: Role) -> RoleLayout:
        return {"rollout": self.rollout, "learner": self.learner, "judge": self.judge}[role]

    def without_learner(self) -> Layout:
        """For evaluation alone: on shared GPUs the judges ask for the learner's share too, else the room it leaves would
        hold several judges, and Ray would put them all on the first GPU."""
        if not self.takes_turns:
            return self
        share = round(self.learner.gpus + self.judge.gpus, 4)  # Ray counts in units of 0.0001
        return replace(self, judge=replace(self.judge, gpus=share))

    def seats(self) -> tuple[tuple[tuple[Role, int], ...], ...]:
        """For each GPU the workers it is meant to carry, e.g. (("rollout", 0), ("learner", 0), ("judge", 0)). The
        numbers are for show: which physical GPU a worker gets is Ray's choice."""
        seats: list[list[tuple[Role, int]]] = [[] for _ in range(self.gpus)]
        next_free = 0
        for role in self.creation_order:
            beside = self.takes_turns or (role == "judge" and self.judges_share)
            start = 0 if beside else next_free
            for index in range(self.of(role).workers if self.gpus else 0):
                seats[start + index].append((role, index))
            next_free += self.of(role).workers
        return tuple(tuple(seat) for seat in seats)


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker found when it started: its node and the GPUs Ray gave it (`ray.get_gpu_ids()`)."""

    role: Role
    name: str
    node: str
    gpus: tuple[str, ...]


def compute_layout(config: Config) -> Layout:
    """The layout of a config; raises ConfigError, naming key, value and remedy, if there is none."""
    kind = layout_kind(config)
    if kind == "cpu":
        nodes, gpus_per_node = 1, 0
    else:
        nodes, gpus_per_node = _nodes(config)
        (_refuse_colocated if kind == "colocated" else _refuse_disaggregated)(config)
    counts: dict[Role, int] = {
        "rollout": config.rollout.num_workers,
        "judge": config.judge.num_workers,
        "learner": config.learner.num_workers,
    }
    shared = kind == "disaggregated" and sum(counts.values()) > config.cluster.gpus
    asks = {role: RoleLayout(count, _gpus(kind, role, shared), _cpus(kind, role)) for role, count in counts.items()}
    return Layout(kind, asks["rollout"], asks["judge"], asks["learner"], nodes, gpus_per_node)


def layout_kind(config: Config) -> Kind:
    """What `cluster.layout` means; `auto` follows the schedule, since only the synchronous one takes turns."""
    if config.cluster.gpus == 0:
        return "cpu"
    if config.cluster.layout != "auto":
        return config.cluster.layout
    return "colocated" if config.schedule.mode == "sync" else "disaggregated"


def check_placement(layout: Layout, assignments: Sequence[Assignment]) -> None:
    """Raise PlacementError unless the workers sit as the layout means: no two of one role on a GPU (`disaggregated`: no
    two workers at all), and no more GPUs than the run has. `assignments`: all placed so far; roles may be missing."""
    if layout.kind == "cpu":
        return
    remedy = f"Let the run have {layout.nodes} node(s) x {layout.gpus_per_node} GPUs to itself and start it again."
    holders: dict[tuple[str, str], list[Assignment]] = defaultdict(list)
    for found in assignments:
        if len(found.gpus) != 1:
            had = ", ".join(found.gpus) or "none"
            raise PlacementError(
                f"{found.name} on node {found.node} was given GPUs {had}, but the layout gives it one."
            )
        holders[found.node, found.gpus[0]].append(found)
    for (node, gpu), there in holders.items():
        roles = [found.role for found in there]
        together = layout.takes_turns or (layout.judges_share and set(roles) <= {"rollout", "judge"})
        if len(roles) > (len(set(roles)) if together else 1):
            names = ", ".join(sorted(found.name for found in there))
            rule = "one worker of each role" if layout.takes_turns else "one worker"
            rule += " (a judge may sit beside a rollout)" if layout.judges_share and not layout.takes_turns else ""
            raise PlacementError(
                f"GPU {gpu} of node {node} carries {names}, but the {layout.kind} layout has {rule} on each. {remedy}"
            )
    if len(holders) > layout.gpus:
        raise PlacementError(
            f"The workers are spread over {len(holders)} GPUs, but the run has {layout.gpus}. {remedy}"
        )


def _gpus(kind: Kind, role: Role, shared: bool) -> float:
    apart = SHARED_WITH_JUDGE[role] if shared else 1.0
    return {"cpu": 0.0, "colocated": COLOCATED_GPUS[role], "disaggregated": apart}[kind]


def _cpus(kind: Kind, role: Role) -> float:
    return CPU_CPUS if kind == "cpu" else GPU_CPUS[role]


def _nodes(config: Config) -> tuple[int, int]:
    """(nodes, GPUs used on each). Several nodes must be whole ones: on part-used nodes Ray would choose the GPUs of
    each role separately, and the roles would not meet."""
    gpus, per_node = config.cluster.gpus, config.cluster.gpus_per_node
    if gpus <= per_node:
        return 1, gpus
    if gpus % per_node:
        raise ConfigError(
            f"cluster.gpus={gpus} is not a multiple of cluster.gpus_per_node={per_node}: use whole nodes, "
            f"e.g. cluster.gpus={gpus - gpus % per_node}, or set cluster.gpus_per_node to what a node has."
        )
    return gpus // per_node, per_node


def _refuse_colocated(config: Config) -> None:
    gpus, per_node = config.cluster.gpus, config.cluster.gpus_per_node
    if gpus > per_node > MAX_NODE_GPUS:
        raise ConfigError(
            f"cluster.gpus_per_node={per_node}: the colocated layout over several nodes is sound for nodes of up to "
            f"{MAX_NODE_GPUS} GPUs; start Ray with fewer per node, or set cluster.layout=disaggregated."
        )
    for key, workers in (
        ("rollout.num_workers", config.rollout.num_workers),
        ("learner.num_workers", config.learner.num_workers),
    ):
        if workers != gpus:
            raise ConfigError(
                f"{key}={workers} but the colocated layout puts one rollout worker and one learner rank on each GPU "
                f"and cluster.gpus={gpus}: set {key}={gpus}, or cluster.layout=disaggregated for GPUs of their own."
            )
    if config.learner.zero_stage != 3:
        raise ConfigError(
            f"learner.zero_stage={config.learner.zero_stage} cannot free the GPU for the rollouts that share it in the "
            "colocated layout: set learner.zero_stage=3, or cluster.layout=disaggregated."
        )
    if config.judge.num_workers > gpus:
        raise ConfigError(
            f"judge.num_workers={config.judge.num_workers} exceeds cluster.gpus={gpus}: the colocated layout has room "
            f"for one judge per GPU; set judge.num_workers={gpus} or less."
        )


def _refuse_disaggregated(config: Config) -> None:
    gpus = config.cluster.gpus
    if gpus < 2:
        raise ConfigError(
            f"cluster.layout=disaggregated needs GPUs of their own for rollout and learner but cluster.gpus={gpus}: "
            "set cluster.layout=colocated (schedule.mode=sync), or use 2 GPUs or more."
        )
    rollouts, learners, judges = config.rollout.num_workers, config.learner.num_workers, config.judge.num_workers
    if rollouts + learners > gpus:
        raise ConfigError(
            f"rollout.num_workers={rollouts} leaves {max(0, gpus - rollouts)} of cluster.gpus={gpus} for "
            f"learner.num_workers={learners} under cluster.layout=disaggregated: lower one of them (8 GPUs: 3 rollouts, 4 "
            "learner ranks, 1 judge; 2 GPUs: 1, 1, and a judge beside the rollout) or raise cluster.gpus."
        )
    if rollouts + learners + judges > gpus and judges > rollouts:
        raise ConfigError(
            f"judge.num_workers={judges} but there is room for one judge beside each of rollout.num_workers={rollouts} "
            f"under cluster.layout=disaggregated with cluster.gpus={gpus}: set judge.num_workers={rollouts} or less."
        )
