"""DeepSpeed around one policy: log-probabilities, optimizer steps, consolidated weights.

Every method is collective: all ranks call it, with the same arguments.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from torch import Tensor

from actors import train_metrics
from actors.consolidate import consolidated
from actors.full_state import FullState
from actors.ranks import Ranks
from actors.snapshot import Snapshot, as_published
from actors.trainer_setup import GradNorm, build_optimizer, compile_nothing, deepspeed_config, load_policy
from sppo_ray.batching import PADDING, MicroBatch, Truncation, collate, deal, truncate
from sppo_ray.config import Config
from sppo_ray.errors import LearnerError
from sppo_ray.losses import LOSSES, lag_weight
from sppo_ray.lr_schedule import learning_rate
from sppo_ray.reference import behavior_logps, refreshes_snapshot
from sppo_ray.types import Probe, TrainingExample, TrainTask

T = TypeVar("T")


class TrainingEngine:
    """One rank's share of the learner. Needs torch.distributed to be initialised."""

    def __init__(self, config: Config, policy_dir: str, ranks: Ranks, takes_turns: bool = False) -> None:
        """takes_turns: rollouts use the same GPU, so `offload` must free it (ZeRO-3: the layout sees to that)."""
        self.config = config
        self.ranks = ranks
        self.takes_turns = takes_turns
        self.saved_dtype: torch.dtype = getattr(torch, config.policy.dtype)
        if config.cluster.gpus > 0:
            # DeepSpeed takes the device from LOCAL_RANK; Ray Train has already set it from the GPU ids it was granted.
            os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
        else:
            compile_nothing()
        module = load_policy(config, policy_dir)
        self.pad_id = module.lm.config.pad_token_id or 0
        self.grad_norm = GradNorm(config.learner.max_grad_norm)
        optimizer = build_optimizer(config, module.parameters())
        if config.learner.zero_stage == 0:
            optimizer.register_step_pre_hook(self.grad_norm)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config(config, ranks.world)
        )
        # torch's own, inside DeepSpeed's; at stage 0 in float32 there is no other.
        self._base_optimizer: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        self.snapshot = Snapshot(self.engine, self.saved_dtype)  # the frozen reference, if one is asked for
        self.state = FullState(self.engine, self.optimizer, self._base_optimizer, self.snapshot, ranks)

    def reference(self, examples: Sequence[TrainingExample]) -> list[tuple[float, ...]]:
        """Log-probabilities (nats) of all examples' responses under the current weights, as truncated for training."""
        self.round_weights()
        return self._all_logps(self._truncate(examples)[0])

    def probe(self, examples: Sequence[TrainingExample]) -> Probe | None:
        """Log-probabilities of every token of all responses under the current weights as they are published (rounded),
        to compare with the rollout engine's. Examples that do not fit in learner.max_length are left out; None if none is
        left."""
        kept = [e for e, cut in zip(examples, self._cut(examples), strict=True) if not cut[1].any]
        if not kept:
            return None
        mine: list[tuple[int, list[np.ndarray]]] = []
        with torch.no_grad(), as_published(self.engine, self.saved_dtype):
            for rows, batch, chunks in self._micro_batches(kept):
                found = self._forward(batch, chunks, per_token=True).cpu().numpy()
                tokens = [values[mask] for values, mask in zip(found, batch.response_mask, strict=True)]
                responses = batch.p_hat.shape[1]
                mine += [
                    (int(row), tokens[r * responses :][:responses]) for r, row in enumerate(rows) if row != PADDING
                ]
        logprobs = self._in_order(mine)
        return Probe(
            prompt_ids=tuple(e.prompt_ids for e in kept for _ in e.response_ids),
            response_ids=tuple(ids for e in kept for ids in e.response_ids),
            logprobs=tuple(values for of_example in logprobs for values in of_example),
        )

    def step(self, task: TrainTask) -> dict[str, float]:
        """One update on one global batch; the metrics are exact over it.

        Raises LearnerError on every rank when a loss (before the weights change) or the gradient is not finite.
        """
        started = time.perf_counter()
        if task.step_in_iteration == 0:
            self.restart_optimizer()
        rate = self._set_learning_rate(task)
        examples, truncated = self._truncate(task.examples)
        examples = self._with_reference(task, examples)
        sums, not_finite = self._backward(examples)
        parts = self.ranks.gather((sums, not_finite))
        self._refuse_not_finite(task, sorted({prompt_id for _, ids in parts for prompt_id in ids}))
        self.ranks.way.at("optimizer step")
        self.engine.step()
        return {
            "step": task.step + 1,
            "iteration": task.iteration,
            **train_metrics.means([part for part, _ in parts], examples),
            **(train_metrics.staleness_metrics(examples) if self._may_be_stale else {}),
            **train_metrics.length_metrics(examples, time.perf_counter() - started),
            "grad_norm": self._finite_grad_norm(task),
            "learning_rate": rate,
            "truncated_share": truncated / len(examples),
            "examples": len(examples),
        }

    def restart_optimizer(self) -> None:
        """Begin an iteration as the authors' code does, which starts a process for each: fresh optimizer state, and
        float32 master weights equal to the saved, rounded ones. So going on equals resuming from the saved folder."""
        self.round_weights()
        for state in self._base_optimizer.state.values():
            for value in state.values():
                value.zero_()  # in place: DeepSpeed keeps views; zeros are how RMSprop and AdamW begin, steps included
        if hasattr(self.optimizer, "refresh_fp32_params"):
            self.optimizer.refresh_fp32_params()

    def round_weights(self) -> None:
        """Round the weights to the precision the policy is saved and served in (nothing where they already have it)."""
        with torch.no_grad():
            for parameter in self.engine.module.parameters():
                # Under ZeRO-3 ds_tensor is this rank's part; `data` is empty, or whole for small, always-gathered ones.
                for part in (parameter.data, getattr(parameter, "ds_tensor", parameter.data)):
                    part.copy_(part.to(self.saved_dtype))

    def consolidated_state(self) -> Iterator[tuple[str, Tensor]]:
        """As `consolidated`, in the saved precision: rank 0 gets the tensors, all ranks must exhaust it."""
        return consolidated(self.engine.module, self.saved_dtype, self.ranks, self.config.learner.zero_stage)

    def offload(self) -> None:
        """Free the GPU until `reload`. Nothing where the learner has the GPU, or the CPU, to itself."""
        if self.takes_turns:
            # DeepSpeed moves optimizer states and master weights for its own FusedAdam only, so those are moved here.
            self._move_optimizer(torch.device("cpu"))
            bulk = (OffloadStateTypeEnum.lp_params, OffloadStateTypeEnum.lp_grads)
            self.engine.offload_states(include=[*bulk, OffloadStateTypeEnum.contiguous_grad_buffer], pin_memory=False)

    def reload(self) -> None:
        """Take the GPU back."""
        if self.takes_turns and self.optimizer.offloaded_states:
            self.engine.reload_states()
            self._move_optimizer(self.engine.device)

    # Inside.

    @property
    def _may_be_stale(self) -> bool:
        return self.config.schedule.mode == "async"

    def _with_reference(self, task: TrainTask, examples: list[TrainingExample]) -> list[TrainingExample]:
        """The (truncated) batch with reference log-probabilities: those of its slice if they were computed beforehand, as
        in sync; else those recorded at sampling, or the frozen copy's."""
        if all(e.reference_logps is not None for e in examples):
            return examples
        if self.config.reference == "behavior":
            return [replace(e, reference_logps=behavior_logps(e)) for e in examples]
        if refreshes_snapshot(task, self.config.objective.snapshot_every):
            self.snapshot.refresh()
        with self.snapshot.in_place():
            logps = self._all_logps(examples)
        return [replace(e, reference_logps=values) for e, values in zip(examples, logps, strict=True)]

    def _all_logps(self, examples: Sequence[TrainingExample]) -> list[tuple[float, ...]]:
        """M log-probabilities (nats) of each example, without gradients, in the examples' order on every rank."""
        mine: list[tuple[int, tuple[float, ...]]] = []
        with torch.no_grad():
            for rows, batch, chunks in self._micro_batches(examples):
                logps = self._logps(batch, chunks).tolist()
                mine += [(int(row), tuple(values)) for row, values in zip(rows, logps, strict=True) if row != PADDING]
        return self._in_order(mine)

    def _in_order(self, mine: list[tuple[int, T]]) -> list[T]:
        """All ranks' (index into the batch, value), as values in the batch's order."""
        found = dict(pair for part in self.ranks.gather(mine) for pair in part)
        return [found[row] for row in range(len(found))]

    def _backward(self, examples: Sequence[TrainingExample]) -> tuple[train_metrics.Sums, list[str]]:
        """Accumulate the gradient of the batch's mean loss; this rank's sums of the metrics, and the prompt ids of its
        non-finite losses."""
        objective = self.config.objective
        sums: train_metrics.Sums = {}
        not_finite: list[str] = []
        for rows, batch, chunks in self._micro_batches(examples):
            arrays = (batch.reference, batch.p_hat, batch.p_pair, batch.weight, batch.staleness)
            reference, p_hat, p_pair, weight, staleness = (self._tensor(a) for a in arrays)
            delta = self._logps(batch, chunks) - reference
            loss, metrics = LOSSES[objective.loss](delta, p_hat, p_pair, objective.eta, objective.target_clip)
            loss = loss * lag_weight(staleness, objective.lag_discount)
            self.ranks.way.at("backward")
            # DeepSpeed averages gradients over ranks; times `world` that is their sum, and over the real number of
            # examples the mean over the global batch, however it was dealt. Padding rows weigh 0.
            self.engine.backward((loss * weight).sum() * (self.ranks.world / len(examples)))
            loss = loss.detach()
            train_metrics.add(sums, {"loss": loss} | metrics, weight, staleness if self._may_be_stale else None)
            bad = (~torch.isfinite(loss) & (weight > 0)).cpu().numpy()
            not_finite += [examples[row].prompt_id for row in rows[bad]]
        return sums, not_finite

    def _truncate(self, examples: Sequence[TrainingExample]) -> tuple[list[TrainingExample], int]:
        """(examples as trained, how many of them were cut)."""
        cut = self._cut(examples)
        return [example for example, _ in cut], sum(truncation.any for _, truncation in cut)

    def _cut(self, examples: Sequence[TrainingExample]) -> list[tuple[TrainingExample, Truncation]]:
        limits = self.config.learner.max_length, self.config.learner.max_prompt_length
        return [truncate(example, *limits) for example in examples]

    def _micro_batches(self, examples: Sequence[TrainingExample]) -> Iterator[tuple[np.ndarray, MicroBatch, int]]:
        """This rank's (indices [R] into the batch or PADDING, arrays, projections), equally many on all ranks."""
        learner = self.config.learner
        dealt, chunks = deal(examples, self.ranks.world, learner.micro_batch_size, learner.logprob_chunk)
        for rows, count in zip(dealt[:, self.ranks.rank], chunks, strict=True):
            picked = [None if row == PADDING else examples[row] for row in rows]
            yield rows, collate(picked, len(examples[0].response_ids), self.pad_id), count

    def _logps(self, batch: MicroBatch, chunks: int) -> Tensor:
        """float32 [R, M]."""
        return self._forward(batch, chunks, per_token=False).view(batch.p_hat.shape)

    def _forward(self, batch: MicroBatch, chunks: int, per_token: bool) -> Tensor:
        """float32 [R*M], or [R*M, T] per token."""
        self.ranks.way.at("forward")
        arrays = [self._tensor(a) for a in (batch.input_ids, batch.attention_mask, batch.response_mask)]
        logps: Tensor = self.engine(*arrays, chunks=chunks, per_token=per_token)
        return logps

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.engine.device)

    def _set_learning_rate(self, task: TrainTask) -> float:
        learner = self.config.learner
        total = task.steps_per_epoch * (learner.schedule_epochs or learner.epochs)
        shape = learner.warmup_ratio, learner.lr_schedule, learner.learning_rate
        rate = learning_rate(task.step_in_iteration, total, *shape)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _finite_grad_norm(self, task: TrainTask) -> float:
        """Norm of the whole gradient before clipping. DeepSpeed skips an update with a non-finite one silently."""
        norm = self.engine.get_global_grad_norm() if self.config.learner.zero_stage else self.grad_norm.last
        if not math.isfinite(norm):
            raise LearnerError(
                f"iteration {task.iteration}, step {task.step + 1}: the gradient is not finite though the losses are; "
                f"prompt ids of the batch: {sorted(e.prompt_id for e in task.examples)}. "
                "Lower learner.learning_rate or set learner.max_grad_norm."
            )
        return float(norm)

    @staticmethod
    def _refuse_not_finite(task: TrainTask, prompt_ids: Sequence[str]) -> None:
        if prompt_ids:
            raise LearnerError(
                f"iteration {task.iteration}, step {task.step + 1}: the loss is not finite for {list(prompt_ids)} "
                "(prompt ids). The weights were not changed. Look at the rows' win rates and reference log-probabilities; if the "
                "weights have diverged, lower learner.learning_rate or set learner.max_grad_norm."
            )

    def _move_optimizer(self, device: torch.device) -> None:
        """Master weights and optimizer states of ZeRO-3; scalars (step counts) stay where torch wants them."""
        states = [value for state in self._base_optimizer.state.values() for value in state.values()]
        for tensor in (*self.optimizer.fp32_partitioned_groups_flat, *states):
            if tensor.dim() > 0:
                tensor.data = tensor.data.to(device)
