"""The asynchronous schedule: three tasks at once, each with a name; the buffer says what each may do.

    sampling     whenever the staleness bound allows it: sample K responses to the next prompt, judge them, hand them in
    training     the learner pulls its batches; when all groups of slice t are in, seal it; wait until its policy is saved
    publishing   whenever the hub holds newer weights: let the rollout workers load them; evaluate the policy of each slice

What is sampled when, and what a batch holds, is `sppo_ray.admission`; here is only who waits for whom. With
`max_staleness: 0`, one publish per slice and `batch_order: slice` the three wait for each other exactly as in
`synchronous`, and the result is the same to the last bit.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from sppo_ray.config import Config
from sppo_ray.errors import GroupAborted
from sppo_ray.mismatch import compare
from sppo_ray.protocols import System, Watch
from sppo_ray.schedules.supervision import InFlight, again_if_lost, supervised
from sppo_ray.seeds import sampling_of
from sppo_ray.types import Prompt, Publication, Ticket

Slices = Sequence[Sequence[Prompt]]


async def run(
    system: System, slices: Slices, config: Config, watch: Watch, start: int = 0, version: int = 0
) -> None:  # fmt: skip
    """Run the iterations after `start`, the last one whose policy is trained; it is served as `version` now."""
    await evaluate(system, start)
    await supervised(
        sampling=sampling(system, slices, config, watch),
        training=training(system, slices, watch, start),
        publishing=publishing(system, config, watch, start, version),
    )


async def sampling(system: System, slices: Slices, config: Config, watch: Watch) -> bool:
    """Ends when every group of the run is in a batch."""
    async with InFlight() as groups:
        while tickets := await system.buffer.admit(await groups.room(lambda: system.rollout.slots)):
            for ticket in tickets:
                groups.start(self_play(system, slices[ticket.iteration - 1][ticket.index], ticket, config, watch))
    return True


@again_if_lost
async def self_play(system: System, prompt: Prompt, ticket: Ticket, config: Config, watch: Watch) -> None:
    """One group, from prompt to disk."""
    sampling = sampling_of(prompt, config, ticket.iteration, ticket.epoch)
    try:
        group = await system.rollout.generate(prompt, sampling, ticket.iteration, ticket.epoch, ticket.protected)
    except GroupAborted:
        await system.buffer.resample(ticket)
        return
    watch.sampled(group.receipt)
    judged = await system.judge.judge(group)
    await system.buffer.add(judged)
    watch.judged(judged.receipt)


async def training(system: System, slices: Slices, watch: Watch, start: int) -> bool:
    """Ends with the last iteration."""
    for t, prompts in enumerate(slices[start:], start=start + 1):
        await system.buffer.collected(t)
        watch.sealed(await system.buffer.seal(t, [prompt.prompt_id for prompt in prompts]))
        watch.trained(await system.learner.train(t))
    return True


async def publishing(system: System, config: Config, watch: Watch, start: int, version: int) -> bool:
    """Ends when the last iteration's policy is served and evaluated."""
    while start < config.schedule.iterations:
        publication = await system.buffer.publication(after=version)
        workers = await system.rollout.load(publication.version)
        await system.buffer.serving(publication.version)
        # The learner may have published again while the workers took turns: those that came later serve the newer one.
        same = all(worker["version"] == publication.version for worker in workers.values())
        figures = await mismatch(system, publication, config, watch) if same else {}
        await system.buffer.record_publish(publication, {"workers": workers, **figures})
        version = publication.version
        if publication.ends_iteration:
            start = publication.iteration
            await evaluate(system, start)
    return True


async def evaluate(system: System, iteration: int) -> None:
    """The policy that is served; nothing newer is published before the buffer is told."""
    await system.evaluator.evaluate(iteration)
    await system.buffer.evaluated(iteration)


async def mismatch(system: System, publication: Publication, config: Config, watch: Watch) -> dict[str, object]:
    """The engine's log-probabilities against the learner's, for the same weights and sequences."""
    if (probe := publication.probe) is None:
        return {}
    pairs = zip(probe.prompt_ids, probe.response_ids, strict=True)
    scored = await asyncio.gather(*(system.rollout.score(prompt, response) for prompt, response in pairs))
    if any(version != publication.version for _, version in scored):
        return {}  # by a worker that was started again, with what the hub holds by now
    found = compare(probe, [logprobs for logprobs, _ in scored])
    alarm = not found["mean_abs_per_token"] <= config.objective.mismatch_alarm  # NaN alarms too
    if alarm:
        watch.alarm(
            f"version {publication.version}: the rollout workers' log-probabilities differ from the learner's by "
            f"{found['mean_abs_per_token']:.3g} nats a token on average; objective.mismatch_alarm is "
            f"{config.objective.mismatch_alarm:g}"
        )
    figures = {name: value if math.isfinite(value) else None for name, value in found.items()}  # JSON has no NaN
    return {"mismatch": figures, "mismatch_alarm": alarm}
