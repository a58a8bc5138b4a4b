"""Everything that can refuse a run, before any actor starts, cheap things first. Writes nothing to the run directory.

The order: run directory, texts (no tokenizer), files of the policy, files of the judge, tokenizer and chat template,
prompt lengths, the judge's tokenizer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sppo_ray.config import Config
from sppo_ray.errors import ConfigError
from sppo_ray.llm_blender_compat import check_versions
from sppo_ray.model_folder import PolicyInfo, inspect_policy, load_tokenizer
from sppo_ray.pairrm import PairRMInfo, inspect_pairrm
from sppo_ray.pairrm.checkpoint import check_limits
from sppo_ray.pairrm.encoding import load_encoder
from sppo_ray.prompts import PreparedPrompts, RawPrompts, encode_prompts, read_prompts
from sppo_ray.templating import PromptEncoder, encoder_of


@dataclass(frozen=True, slots=True)
class Preflight:
    """What the checks found out on their way, so that the run need not do it again."""

    policy: PolicyInfo
    judge: PairRMInfo
    prompts: PreparedPrompts
    warnings: tuple[str, ...]  # odd, but allowed


def preflight(config: Config, base_dir: Path | None = None) -> Preflight:
    """Run every check. Raises ConfigError at the first that fails; it names what was given and the remedy."""
    _refuse_unusable_run_dir(Path(config.run.dir))
    raw = read_prompts(config, base_dir)
    policy = inspect_policy(config.policy.model, config.policy.trust_remote_code)
    context = _context(config, policy)
    check_versions()
    judge = inspect_pairrm(config.judge.model, allow_pickle=config.judge.allow_pickle, download=True)
    source, candidate = config.judge.source_max_tokens, config.judge.candidate_max_tokens
    check_limits(judge.folder, judge.config, source or judge.source_max_tokens, candidate or judge.candidate_max_tokens)
    tokenizer = load_tokenizer(policy, config.policy.trust_remote_code)
    prompts = encode_prompts(config, tokenizer, context, raw)
    _refuse_foreign_tokenizer(prompts, policy)
    _refuse_cut_prompts(config, prompts)
    prompts.report.cut_for_judge = load_encoder(judge, source, candidate).cut_sources(_judged(config, prompts))
    return Preflight(
        policy=policy,
        judge=judge,
        prompts=prompts,
        warnings=tuple(_warnings(config, raw, prompts, encoder_of(tokenizer))),
    )


def _refuse_unusable_run_dir(root: Path) -> None:
    """What is there of the run directory's path must be a folder that can be written to."""
    there = next(place for place in (root, *root.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ConfigError(f"run.dir={root} cannot be made: {there} is a file. Name another directory.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"run.dir={root} cannot be made: {there} may not be written to. Name another directory.")


def _context(config: Config, policy: PolicyInfo) -> int:
    asked, own = config.rollout.max_model_len, policy.context_length
    if asked is not None and own is not None and asked > own:
        raise ConfigError(
            f"rollout.max_model_len={asked} exceeds the {own} tokens that policy.model={policy.model} was made for: "
            f"lower it to {own} or set it to null."
        )
    if asked is None and own is None:
        raise ConfigError(
            f"The config.json of policy.model={policy.model} does not say how long its context is: set "
            "rollout.max_model_len."
        )
    return asked or own or 0


def _judged(config: Config, prompts: PreparedPrompts) -> list[str]:
    """The prompts as the judge reads them."""
    every = (prompt for part in [*prompts.slices, prompts.heldout] for prompt in part)
    return [prompt.templated if config.judge.source == "templated" else prompt.text for prompt in every]


def _refuse_foreign_tokenizer(prompts: PreparedPrompts, policy: PolicyInfo) -> None:
    """An id beyond the embedding kills the engine with an index error deep inside, long after the start."""
    if policy.vocab_size is None:
        return
    for prompt in (prompt for part in [*prompts.slices, prompts.heldout] for prompt in part):
        if (largest := int(prompt.token_ids.max())) >= policy.vocab_size:
            raise ConfigError(
                f"policy.model={policy.model}: prompt {prompt.prompt_id!r} has token id {largest}, but the model's "
                "vocabulary "
                f"ends at {policy.vocab_size - 1}: tokenizer and weights are of different models; copy both from one."
            )


def _refuse_cut_prompts(config: Config, prompts: PreparedPrompts) -> None:
    """What was recorded at sampling is conditioned on the whole prompt, so a prompt may not be cut for training."""
    limit = config.learner.max_prompt_length
    long = [prompt for part in prompts.slices for prompt in part if len(prompt.token_ids) > limit]
    if config.reference == "behavior" and long:
        raise ConfigError(
            f"objective.reference=behavior: {len(long)} prompts, e.g. {long[0].prompt_id!r} with "
            f"{len(long[0].token_ids)} tokens, exceed learner.max_prompt_length={limit} and may be cut for training, but their "
            "recorded log-probabilities are of responses to the whole prompt. Raise learner.max_prompt_length (and "
            "learner.max_length), or set objective.reference=snapshot."
        )


def _warnings(config: Config, raw: RawPrompts, prompts: PreparedPrompts, encoder: PromptEncoder) -> list[str]:
    """Settings that work and are probably not meant."""
    found = []
    usable = sum(map(len, raw.slices))
    if config.data.limit and usable < config.data.limit:
        found.append(
            f"data.limit={config.data.limit}, but {config.data.prompts} gives {usable} usable prompts: all are taken."
        )
    smallest, batch = min(map(len, prompts.slices)), config.learner.batch_size
    if smallest < batch:
        found.append(
            f"An iteration has {smallest} prompts but learner.batch_size={batch}: each epoch is a single, smaller "
            "update."
        )
    if smallest < config.learner.num_workers:
        found.append(
            f"An iteration has {smallest} prompts for learner.num_workers={config.learner.num_workers}: "
            "some ranks have nothing to train on."
        )
    dropped = raw.report.overlong_dropped + raw.report.overlong_cut
    if dropped * 10 > raw.report.prompts + raw.report.overlong_dropped:
        found.append(f"{dropped} prompts were longer than the context allows (data.overlong={config.data.overlong}).")
    if raw.report.imitations:
        found.append(
            f"{raw.report.imitations} prompts hold {encoder.plain_turn_end!r}, with which the chat template ends the "
            "user's turn in plain text: the policy cannot tell the two apart."
        )
    return found
