"""The synchronous schedule: Algorithm 1 of the paper.

    for t = 1..T:
        sample K responses to every prompt of slice t from pi_t      } judging streams
        judge all ordered pairs of each group                         } behind sampling
        seal the slice: win rates, best and worst, shuffled by seed
        train pi_{t+1} from pi_t on it for one epoch, with pi_t as the reference
        publish pi_{t+1} to the rollout workers

Nothing here depends on the order in which groups come back: the same seeds give the same tables and the same weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from sppo_ray.config import Config
from sppo_ray.protocols import System, Watch
from sppo_ray.schedules.supervision import again_if_lost
from sppo_ray.seeds import sampling_of
from sppo_ray.types import Prompt


async def run(system: System, slices: Sequence[Sequence[Prompt]], config: Config, watch: Watch, start: int = 0) -> None:
    """Run the iterations after `start`, the last one whose policy is trained and now served (0: the base policy)."""
    await system.evaluator.evaluate(start)
    for t in range(start + 1, config.schedule.iterations + 1):
        await sample_and_judge(system, slices[t - 1], t, config, watch)
        summary = await system.buffer.seal(t, [prompt.prompt_id for prompt in slices[t - 1]])
        watch.sealed(summary)
        await system.rollout.sleep()
        trained = await system.learner.train(t)
        watch.trained(trained)
        await system.rollout.load(trained.version)
        await system.evaluator.evaluate(t)


async def sample_and_judge(system: System, prompts: Sequence[Prompt], t: int, config: Config, watch: Watch) -> None:
    """Every prompt of the slice, at most `rollout.in_flight` per worker between sampling and disk; held ones are skipped."""
    held = await system.buffer.held(t)
    watch.sampling(t, total=len(prompts), held=sum(prompt.prompt_id in held for prompt in prompts))
    waiting = iter([prompt for prompt in prompts if prompt.prompt_id not in held])

    @again_if_lost
    async def self_play(prompt: Prompt) -> None:
        group = await system.rollout.generate(prompt, sampling_of(prompt, config, t), t)
        watch.sampled(group.receipt)
        judged = await system.judge.judge(group)
        await system.buffer.add(judged)
        watch.judged(judged.receipt)

    async def lane() -> None:
        for prompt in waiting:
            await self_play(prompt)

    async with asyncio.TaskGroup() as lanes:  # the first lane that fails cancels the others and is raised
        for _ in range(config.rollout.in_flight * config.rollout.num_workers):
            lanes.create_task(lane())
