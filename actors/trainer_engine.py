"""DeepSpeed around one policy: reference log-probabilities, optimizer steps, consolidated weights, checkpoints.

Every method is collective: all ranks call it, with the same arguments.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from torch import Tensor

from actors.ranks import Ranks
from actors.trainer_setup import GradNorm, build_optimizer, deepspeed_config, load_policy
from sppo_ray.batching import PADDING, MicroBatch, collate, projection_chunks, split, truncate
from sppo_ray.config import Config
from sppo_ray.errors import LearnerError
from sppo_ray.losses import LOSSES, winner_and_loser
from sppo_ray.lr_schedule import learning_rate
from sppo_ray.types import TrainingExample, TrainTask

CHECKPOINT_TAG = "state"


class TrainingEngine:
    """One rank's share of the learner. Needs torch.distributed to be initialised."""

    def __init__(self, config: Config, policy_dir: str, ranks: Ranks, takes_turns: bool = False) -> None:
        """takes_turns: rollouts use the same GPU, so `offload` must free it (ZeRO-3: the layout sees to that)."""
        self.config = config
        self.ranks = ranks
        self.takes_turns = takes_turns
        if config.cluster.gpus > 0:
            # DeepSpeed takes the device from LOCAL_RANK; Ray Train has already set it from the GPU ids it was granted.
            os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
        module = load_policy(config, policy_dir)
        self.pad_id = module.lm.config.pad_token_id or 0
        self.grad_norm = GradNorm(config.learner.max_grad_norm)
        optimizer = build_optimizer(config, module.parameters())
        if config.learner.zero_stage == 0:
            optimizer.register_step_pre_hook(self.grad_norm)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config(config, ranks.world)
        )

    def reference(self, examples: Sequence[TrainingExample]) -> list[tuple[float, ...]]:
        """Log-probabilities (nats) of all examples' responses under the current weights, as truncated for training."""
        self.round_weights()
        kept, _ = self._truncate(examples)
        mine: list[tuple[int, tuple[float, ...]]] = []
        with torch.no_grad():
            for rows, batch, chunks in self._micro_batches(kept):
                logps = self._logps(batch, chunks).tolist()
                mine += [(int(row), tuple(values)) for row, values in zip(rows, logps, strict=True) if row != PADDING]
        found = dict(pair for part in self.ranks.gather(mine) for pair in part)
        return [found[row] for row in range(len(examples))]

    def step(self, task: TrainTask) -> dict[str, float]:
        """One update on one global batch; the metrics are exact over it.

        Raises LearnerError on every rank when a loss (before the weights change) or the gradient is not finite.
        """
        started = time.perf_counter()
        if task.step_in_iteration == 0:
            self.restart_optimizer()
        rate = self._set_learning_rate(task)
        examples, truncated = self._truncate(task.examples)
        tally, not_finite = self._backward(examples)
        parts = self.ranks.gather((tally, not_finite))
        self._refuse_not_finite(task, sorted({prompt_id for _, ids in parts for prompt_id in ids}))
        self.engine.step()
        return {
            "step": task.step + 1,
            "iteration": task.iteration,
            **{name: sum(part[name] for part, _ in parts) / len(examples) for name in tally},
            **_length_metrics(examples, time.perf_counter() - started),
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
        saved = getattr(torch, self.config.policy.dtype)
        with torch.no_grad():
            for parameter in self.engine.module.parameters():
                # Under ZeRO-3 ds_tensor is this rank's part; `data` is empty, or whole for small, always-gathered ones.
                for part in (parameter.data, getattr(parameter, "ds_tensor", parameter.data)):
                    part.copy_(part.to(saved))

    def consolidated_state(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor on the CPU in the saved precision) on rank 0; tied weights come once.

        The other ranks get nothing but must exhaust it too: under ZeRO-3 each layer is gathered by all.
        """
        saved = getattr(torch, self.config.policy.dtype)
        named = [(name.removeprefix("lm."), p) for name, p in self.engine.module.named_parameters()]
        for _, layer in groupby(named, key=lambda item: _layer_of(item[0])):
            members = list(layer)
            zero3 = self.config.learner.zero_stage == 3
            with deepspeed.zero.GatheredParameters([p for _, p in members], enabled=zero3):
                whole = [(name, p.detach().to("cpu", saved, copy=True)) for name, p in members if self.ranks.first]
            yield from whole

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

    @property
    def state_kind(self) -> str:
        """What a DeepSpeed checkpoint of this engine can be loaded by."""
        return f"{self.ranks.world} ranks, ZeRO {self.config.learner.zero_stage}"

    def save_checkpoint(self, folder: Path) -> None:
        """DeepSpeed's state of this rank, weights included, to resume within an iteration on as many ranks."""
        self.engine.save_checkpoint(str(folder), tag=CHECKPOINT_TAG)

    def load_checkpoint(self, folder: Path) -> None:
        """Raises LearnerError when the folder holds no such state."""
        found, _ = self.engine.load_checkpoint(str(folder), tag=CHECKPOINT_TAG)
        if found is None:
            raise LearnerError(f"{folder} holds no DeepSpeed state to resume from: remove it to restart the iteration.")

    # Inside.

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        """torch's own, inside DeepSpeed's; at stage 0 in float32 there is no other."""
        base: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return base

    def _backward(self, examples: Sequence[TrainingExample]) -> tuple[dict[str, float], list[str]]:
        """Accumulate the gradient of the batch's mean loss; this rank's sums of the metrics, and the prompt ids of its
        non-finite losses."""
        loss_of, eta = LOSSES[self.config.objective.loss], self.config.objective.eta
        tally: defaultdict[str, float] = defaultdict(float)
        not_finite: list[str] = []
        for rows, batch, chunks in self._micro_batches(examples):
            arrays = (batch.reference, batch.p_hat, batch.p_pair, batch.weight)
            reference, p_hat, p_pair, weight = (self._tensor(a) for a in arrays)
            loss, metrics = loss_of(self._logps(batch, chunks) - reference, p_hat, p_pair, eta)
            # DeepSpeed averages gradients over ranks; times `world` that is their sum, and over the real number of
            # examples the mean over the global batch, however it was dealt. Padding rows weigh 0.
            self.engine.backward((loss * weight).sum() * (self.ranks.world / len(examples)))
            loss = loss.detach()
            for name, values in ({"loss": loss} | metrics).items():
                tally[name] += (values * weight).double().sum().item()
            bad = (~torch.isfinite(loss) & (weight > 0)).cpu().numpy()
            not_finite += [examples[row].prompt_id for row in rows[bad]]
        return dict(tally), not_finite

    def _truncate(self, examples: Sequence[TrainingExample]) -> tuple[list[TrainingExample], int]:
        """(examples as trained, how many of them were cut)."""
        limits = self.config.learner.max_length, self.config.learner.max_prompt_length
        cut = [truncate(example, *limits) for example in examples]
        return [example for example, _ in cut], sum(truncation.any for _, truncation in cut)

    def _micro_batches(self, examples: Sequence[TrainingExample]) -> Iterator[tuple[np.ndarray, MicroBatch, int]]:
        """This rank's (indices [R] into the batch or PADDING, arrays, projections), equally many on all ranks."""
        responses = len(examples[0].response_ids)
        tokens = [sum(map(len, e.response_ids)) for e in examples]
        longest = [len(e.prompt_ids) + max(map(len, e.response_ids)) for e in examples]
        dealt = split(longest, self.ranks.world, self.config.learner.micro_batch_size)
        chunks = projection_chunks(dealt, tokens, responses, self.config.learner.logprob_chunk)
        for rows, count in zip(dealt[:, self.ranks.rank], chunks, strict=True):
            picked = [None if row == PADDING else examples[row] for row in rows]
            yield rows, collate(picked, responses, self.pad_id), count

    def _logps(self, batch: MicroBatch, chunks: int) -> Tensor:
        """float32 [R, M]."""
        arrays = [self._tensor(a) for a in (batch.input_ids, batch.attention_mask, batch.response_mask)]
        logps: Tensor = self.engine(*arrays, chunks=chunks)
        return logps.view(batch.p_hat.shape)

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


def _layer_of(name: str) -> str:
    """ "model.layers.3.mlp.up_proj.weight" -> "model.layers.3": what is gathered together."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match.group() if match else name


def _length_metrics(examples: Sequence[TrainingExample], seconds: float) -> dict[str, float]:
    lengths = [[len(ids) for ids in e.response_ids] for e in examples]
    ends = [winner_and_loser(e.p_hat) for e in examples]
    tokens = sum(len(e.prompt_ids) * len(ids) + sum(ids) for e, ids in zip(examples, lengths, strict=True))
    return {
        "tokens_per_s": tokens / seconds,
        "mean_length_w": float(np.mean([ids[w] for ids, (w, _) in zip(lengths, ends, strict=True)])),
        "mean_length_l": float(np.mean([ids[l] for ids, (_, l) in zip(lengths, ends, strict=True)])),  # noqa: E741
    }
