"""What a run will do and need, before anything starts: no GPU, no download, no Ray. Shown by `sppo plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sppo_ray.config import Config
from sppo_ray.errors import ConfigError
from sppo_ray.layout import Layout, compute_layout
from sppo_ray.memory import MARGIN, Memory, estimate_memory, judge_pair_tokens, kv_bytes_per_token
from sppo_ray.model_shapes import ModelShape, model_shape
from sppo_ray.prompt_sources import is_file
from sppo_ray.prompts import load_texts

# Rows of the published prompt sets by (hub name, split); None: the only split.
SNORKEL = "snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset"
KNOWN_PROMPTS: dict[tuple[str, str | None], int] = {
    (SNORKEL, "train_iteration_1"): 19_766,
    (SNORKEL, "train_iteration_2"): 19_958,
    (SNORKEL, "train_iteration_3"): 19_996,
}
for _t, _rows in enumerate((19_766, 19_958, 19_996), start=1):
    for _split in (None, "train"):
        KNOWN_PROMPTS[f"UCLA-AGI/data-mistral-7b-instruct-sppo-iter{_t}", _split] = _rows


@dataclass(frozen=True, slots=True)
class IterationPlan:
    """Counts of one iteration; all but the first two are None where the number of prompts is not known beforehand."""

    iteration: int
    prompts: int | None
    responses: int | None  # K per prompt
    judge_pairs: int | None  # K(K-1) per prompt: both orders
    steps: int | None  # optimizer updates
    sampled_tokens: int | None  # at most
    judged_tokens: int | None  # at most
    trained_tokens: int | None  # at most, over all epochs


@dataclass(frozen=True, slots=True)
class Plan:
    config: Config
    layout: Layout
    policy: ModelShape
    judge: ModelShape
    iterations: tuple[IterationPlan, ...]
    memory: Memory


def make_plan(config: Config, prompts: int | Sequence[int] | None = None) -> Plan:
    """The plan of a config. `prompts`: how many there are in all, or of each iteration; None: a local file is counted, a
    published set looked up, another hub data set unknown. Raises ConfigError for an impossible layout or an unknown model.
    """
    layout = compute_layout(config)
    policy, judge = model_shape(config.policy.model), model_shape(config.judge.model)
    counts = prompts_per_iteration(config, prompts)
    iterations = tuple(_iteration(config, number, count) for number, count in enumerate(counts, start=1))
    return Plan(config, layout, policy, judge, iterations, estimate_memory(config, layout, policy, judge))


def refuse_unfit(plan: Plan) -> None:
    """Raise ConfigError if something does not fit. Apart from `make_plan`, so that the plan can be shown first."""
    if not plan.memory.fits:
        raise ConfigError("\n".join(plan.memory.problems))


def prompts_per_iteration(config: Config, prompts: int | Sequence[int] | None) -> tuple[int | None, ...]:
    """Prompts of each iteration, cut as `prompts.read_prompts` does: a split's rows, or shares that differ by at most one.

    Rows of published sets are an upper end: a text that comes twice in a slice is trained on once.
    """
    data, iterations = config.data, config.schedule.iterations
    if isinstance(prompts, Sequence):
        return tuple(prompts)
    if data.splits is not None:
        rows = [KNOWN_PROMPTS.get((data.prompts, split)) for split in data.splits]
        limits = [None] * iterations if data.limit is None else _shares(data.limit, iterations)
        return tuple(
            count if limit is None or count is None else min(count, limit)
            for count, limit in zip(rows, limits, strict=True)
        )
    total = _count(config) if prompts is None else prompts
    if total is None:
        return (None,) * iterations
    return tuple(_shares(total if data.limit is None else min(total, data.limit), iterations))


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (index < total % parts) for index in range(parts)]


def _count(config: Config) -> int | None:
    data = config.data
    if is_file(data.prompts):
        return len(load_texts(data.prompts, data.column, data.id_column, limit=data.limit))
    return KNOWN_PROMPTS.get((data.prompts, None))


def _iteration(config: Config, number: int, prompts: int | None) -> IterationPlan:
    if prompts is None:
        return IterationPlan(number, None, None, None, None, None, None, None)
    k, learner = config.rollout.responses_per_prompt, config.learner
    kept = k if config.selection.rule == "all" else 2
    return IterationPlan(
        iteration=number,
        prompts=prompts,
        responses=prompts * k,
        judge_pairs=prompts * k * (k - 1),
        steps=-(-prompts // learner.batch_size) * learner.epochs,
        sampled_tokens=prompts * k * config.rollout.max_new_tokens,
        judged_tokens=prompts * k * (k - 1) * judge_pair_tokens(config),
        trained_tokens=prompts * kept * learner.max_length * learner.epochs,
    )


def render_plan(plan: Plan) -> RenderableType:
    parts: list[RenderableType] = [_models(plan), _placement(plan), _work(plan), _memory(plan), _verdict(plan)]
    if plan.layout.kind == "disaggregated" and plan.config.schedule.mode == "async":
        parts.append(_recommended(plan))
    return Group(*parts)


def _models(plan: Plan) -> Text:
    config = plan.config
    lines = [
        f"Policy    {plan.policy.name}: {_parameters(plan.policy)}, {config.policy.dtype}",
        f"Judge     {plan.judge.name}: {_parameters(plan.judge)}, {config.judge.dtype}",
        f"Prompts   {config.data.prompts}",
        f"Fidelity  {config.fidelity}, schedule {config.schedule.mode}, ZeRO-{config.learner.zero_stage}, "
        f"batch {config.learner.batch_size}",
    ]
    return Text("\n".join(lines))


def _parameters(shape: ModelShape) -> str:
    millions = shape.parameters / 1e6
    return f"{millions / 1e3:.2f} B parameters" if millions >= 1e3 else f"{millions:.2f} M parameters"


def _placement(plan: Plan) -> Table:
    layout = plan.layout
    table = Table(title=f"Placement: {layout.kind}", title_justify="left")
    if layout.kind == "cpu":
        for title in ("role", "workers", "cores asked of Ray, each"):
            table.add_column(title)
        for role in layout.creation_order:
            table.add_row(role, str(layout.of(role).workers), f"{layout.of(role).cpus:g}")
        return table
    for title in ("node", "GPU", "workers and their shares"):
        table.add_column(title)
    for index, seat in enumerate(layout.seats()):
        node, gpu = divmod(index, layout.gpus_per_node)
        names = [f"{role}-{number} {layout.of(role).gpus:g}" for role, number in seat]
        table.add_row(str(node), str(gpu), ", ".join(names) or "idle")
    return table


def _work(plan: Plan) -> Table:
    table = Table(title="Work of iteration t (the last three in tokens, at most)", title_justify="left")
    titles = ("t", "prompts", "responses", "pairs", "steps", "sampled", "judged", "trained")
    for title in titles:
        table.add_column(title, justify="right")
    for it in plan.iterations:
        counts = (it.prompts, it.responses, it.judge_pairs, it.steps)
        tokens = (it.sampled_tokens, it.judged_tokens, it.trained_tokens)
        table.add_row(str(it.iteration), *map(_number, counts), *map(_tokens, tokens))
    return table


def _memory(plan: Plan) -> Table:
    table = Table(title="Memory, GiB (estimated, upper end)", title_justify="left")
    table.add_column("where")
    table.add_column("GiB", justify="right")
    table.add_column("of which")
    for phase in plan.memory.phases:
        table.add_row(
            phase.where, f"{phase.gib:.1f}", ", ".join(f"{part.label} {part.gib:.1f}" for part in phase.parts)
        )
    host = plan.memory.host
    parts = ", ".join(f"{part.label} {part.gib:.1f}" for part in host)
    table.add_row("host, each node", f"{sum(part.gib for part in host):.1f}", parts)
    return table


def _verdict(plan: Plan) -> Text:
    config, memory = plan.config, plan.memory
    per_token = kv_bytes_per_token(config, plan.policy)
    lines = [f"KV cache of a rollout worker: {memory.kv_tokens:,} tokens of {per_token / 1024:.0f} KiB."]
    if any(it.prompts is None for it in plan.iterations):
        lines.append("The number of prompts is unknown until the data set is read: try `sppo train --dry-run`.")
    if memory.problems:
        lines += ["Does not fit:", *(f"  {problem}" for problem in memory.problems)]
    elif memory.phases:
        lines.append(f"Fits {config.cluster.gpu_memory_gb:g} GB GPUs with a margin of {MARGIN:.0%}.")
    return Text("\n".join(lines))


def _recommended(plan: Plan) -> Table:
    """Splits of the config's GPUs by simulated speed, its own among them."""
    # With it the schedules and the buffer, which only this needs.
    from sppo_ray.simulation.layouts import Split, recommend, with_split
    from sppo_ray.simulation.rates import RateCard

    config, policy = plan.config, plan.policy
    kv_bytes = kv_bytes_per_token(config, policy)
    card = RateCard(parameters=policy.parameters, kv_bytes_per_token=kv_bytes)
    own = (config.rollout.num_workers, config.learner.num_workers, config.judge.num_workers)
    title = "Layouts by simulated speed, estimated at an A100's rates; the first that fits is recommended"
    table = Table(title=title, title_justify="left")
    for name in ("rollout", "learner", "judge", "fits", "groups/s", "learner idle", "slowest role"):
        table.add_column(name, justify="right")

    def fits(workers: Split) -> bool:
        split = with_split(config, workers, config.cluster.gpus)
        return estimate_memory(split, compute_layout(split), policy, plan.judge).fits

    for found in recommend(config, card, config.cluster.gpus, include=own, usable=fits):
        of_config = " (this config)" if found.split == own else ""
        known = "yes" if fits(found.split) else "no"
        cells = *map(str, found.split), known, f"{found.groups_per_s:.2f}", f"{found.learner_idle:.0%}"
        table.add_row(*cells, found.rates.slowest + of_config)
    return table


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _tokens(value: int | None) -> str:
    if value is None:
        return "unknown"
    return f"{value / 1e6:,.1f} M" if value >= 1e6 else f"{value:,}"
