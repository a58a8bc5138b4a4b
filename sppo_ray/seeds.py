"""Seeds: every random choice is a pure function of names, never of order, worker or time."""

from __future__ import annotations

import hashlib

from sppo_ray.config import Config
from sppo_ray.types import Prompt, Sampling

REFERENCE_SPACING = 50  # the authors' scripts/generate.sh: one seed per response, 0, 50, 100, ...


def derive(*names: object) -> int:
    """A seed in [0, 2**31) from any printable names; different names give seeds that have nothing to do with each other."""
    digest = hashlib.blake2b("\x1f".join(str(name) for name in names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**31


def sampling_seeds(
    mode: str, run_seed: int, iteration: int, prompt_id: str, k: int, epoch: int = 0
) -> tuple[int, ...]:  # fmt: skip
    """One seed per response. `derived`: k consecutive seeds (the engine's n = K); `reference`: 0, 50, 100, ...

    epoch: pass over the slice, where each is sampled anew.
    """
    if mode == "reference":
        return tuple(REFERENCE_SPACING * i for i in range(k))
    again = (epoch,) if epoch else ()
    first = (
        derive("sample", run_seed, iteration, prompt_id, *again) // 1024 * 1024
    )  # room for K: ranges never half-overlap
    return tuple(first + i for i in range(k))


def sampling_of(prompt: Prompt, config: Config, iteration: int, epoch: int = 0) -> Sampling:
    """How the prompt is sampled in a pass over its slice; the first is the same in sync and async."""
    rollout, k = config.rollout, config.rollout.responses_per_prompt
    seeds = sampling_seeds(rollout.seeds, config.run.seed, iteration, prompt.prompt_id, k, epoch)
    return Sampling(rollout.temperature, rollout.top_p, rollout.max_new_tokens, seeds)
