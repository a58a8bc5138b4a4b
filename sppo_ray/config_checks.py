"""Checks across the sections of a config: what cannot both hold is refused with the keys, the values and the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sppo_ray.config import Config


def refuse_contradictions(config: Config) -> None:
    """Raise ValueError, naming keys, values and the remedy, where two values cannot both hold."""
    data, learner, objective, cluster = config.data, config.learner, config.objective, config.cluster
    (_refuse_for_async if config.schedule.mode == "async" else _refuse_for_sync)(config)
    if data.splits is not None and len(data.splits) != config.schedule.iterations:
        raise ValueError(
            f"data.splits names {len(data.splits)} splits but schedule.iterations is {config.schedule.iterations}: "
            "give one split per iteration, or set data.splits=null to cut one set of prompts by seed."
        )
    if config.selection.rule == "all" and objective.loss != "sppo":
        raise ValueError(
            f"selection.rule=all keeps all K responses but objective.loss={objective.loss} compares two: "
            "set objective.loss=sppo or selection.rule=best_worst."
        )
    if learner.max_prompt_length >= learner.max_length:
        raise ValueError(
            f"learner.max_prompt_length={learner.max_prompt_length} leaves no room for a response within "
            f"learner.max_length={learner.max_length}: lower the first or raise the second."
        )
    if learner.schedule_epochs is not None and learner.schedule_epochs < learner.epochs:
        raise ValueError(
            f"learner.schedule_epochs={learner.schedule_epochs} ends before learner.epochs={learner.epochs}: "
            "the learning rate would be zero; raise learner.schedule_epochs or set it to null."
        )
    for key, dtype in (("policy.dtype", config.policy.dtype), ("judge.dtype", config.judge.dtype)):
        if cluster.gpus == 0 and dtype == "float16":
            raise ValueError(f"{key}=float16 needs a GPU but cluster.gpus=0: set {key}=float32.")
    if cluster.gpus == 0 and cluster.layout != "auto":
        raise ValueError(
            f"cluster.layout={cluster.layout} says how roles share GPUs but cluster.gpus=0: set cluster.layout=auto."
        )
    if config.run.storage_patience_s >= learner.timeout_s:
        raise ValueError(
            f"run.storage_patience_s={config.run.storage_patience_s:g} is not below learner.timeout_s={learner.timeout_s:g}: "
            "a learner that waits for its disk would be taken for hung; lower the first or raise the second."
        )
    if learner.num_workers > learner.batch_size:
        raise ValueError(
            f"learner.num_workers={learner.num_workers} exceeds learner.batch_size={learner.batch_size}: "
            "some ranks would have nothing to train on; lower learner.num_workers."
        )


def _refuse_for_sync(config: Config) -> None:
    for key, value in (
        ("weights.publish_every", config.weights.publish_every),
        ("objective.snapshot_every", config.objective.snapshot_every),
    ):
        if value not in (None, "slice"):
            raise ValueError(
                f"{key}={value} but schedule.mode=sync trains a whole slice from one policy: set {key}=slice, or "
                "schedule.mode=async."
            )
    if config.weights.channel == "nccl":
        raise ValueError(
            "weights.channel=nccl needs GPUs that only the learner uses, but schedule.mode=sync: set weights.channel=ray "
            "or schedule.mode=async."
        )


def _refuse_for_async(config: Config) -> None:
    schedule, weights, learner, cluster = config.schedule, config.weights, config.learner, config.cluster
    every = config.publish_every
    if cluster.layout == "colocated":
        raise ValueError(
            "cluster.layout=colocated lets rollouts and learner take turns, but schedule.mode=async runs them at once: set "
            "cluster.layout=disaggregated or schedule.mode=sync."
        )
    if schedule.batch_order == "slice" and every != "slice":
        raise ValueError(
            f"weights.publish_every={every} breaks the staleness bound under schedule.batch_order=slice: a slice is complete "
            "before its first update, so its groups would become older with every publish. Set weights.publish_every=slice "
            "or schedule.batch_order=ready."
        )
    if config.rollout.seeds == "reference" and learner.epochs > 1 and schedule.batch_order == "ready":
        raise ValueError(
            f"rollout.seeds=reference gives every pass over a slice the same noise, but schedule.batch_order=ready samples each "
            f"of learner.epochs={learner.epochs} anew: set rollout.seeds=derived, or learner.epochs=1."
        )
    if every != "slice" and learner.checkpoint_every % every:
        raise ValueError(
            f"learner.checkpoint_every={learner.checkpoint_every} is not a multiple of weights.publish_every={every}: a run "
            "that goes on from such a checkpoint could not serve the version its groups were sampled from. Set "
            f"learner.checkpoint_every={-(-learner.checkpoint_every // every) * every} or 0."
        )
    if weights.channel == "nccl" and cluster.gpus == 0:
        raise ValueError("weights.channel=nccl needs GPUs but cluster.gpus=0: set weights.channel=ray.")
    if weights.channel == "nccl" and weights.at_once < 1:
        raise ValueError(
            f"weights.at_once={weights.at_once} but weights.channel=nccl sends to all rollout workers together: set "
            "weights.at_once=1 or weights.channel=ray."
        )
