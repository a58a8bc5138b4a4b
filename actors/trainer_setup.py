"""How DeepSpeed and the policy are set up for training: settings, optimizer, model, gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sppo_ray.config import Config
from sppo_ray.logprobs import PolicyLogps, switch_off_dropout


def compile_nothing() -> None:
    """Keep DeepSpeed from compiling its C++ extension for sums over shared memory between ranks on CPU: a minute, and a
    compiler, for what gloo does as well."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def deepspeed_config(config: Config, world: int) -> dict[str, Any]:
    """DeepSpeed's settings for `world` ranks."""
    learner = config.learner
    half = learner.dtype == "bfloat16"
    settings: dict[str, Any] = {
        "train_batch_size": learner.micro_batch_size * world,
        "train_micro_batch_size_per_gpu": learner.micro_batch_size,
        # The number of micro-batches differs between batches (the last of an epoch is short), so DeepSpeed must not
        # count them: engine.step() is the boundary, and the mean over the global batch is taken in the loss.
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": {"stage": learner.zero_stage},
        "zero_allow_untested_optimizer": True,  # torch's RMSprop is not on DeepSpeed's list; our tests cover it
        "bf16": {"enabled": half},
        # At stage 0 `GradNorm` clips, since DeepSpeed would not report the norm there.
        "gradient_clipping": (learner.max_grad_norm or 0.0) if learner.zero_stage else 0.0,
    }
    if half and learner.zero_stage:  # stage 0 has no other choice than bfloat16
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def build_optimizer(config: Config, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    learner = config.learner
    if learner.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=learner.learning_rate, alpha=0.99, eps=1e-8)
    return torch.optim.AdamW(parameters, lr=learner.learning_rate, weight_decay=0.0)


def load_policy(config: Config, folder: str) -> PolicyLogps:
    """The policy in the learner's precision on the CPU, dropout off, ready to train."""
    remote = config.policy.trust_remote_code
    hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=remote)
    # Of transformers' attentions the eager one honours Gemma-2's cap on attention logits; SDPA leaves it out silently.
    capped = getattr(hf_config, "attn_logit_softcapping", None) is not None
    lm = AutoModelForCausalLM.from_pretrained(
        folder,
        config=hf_config,
        dtype=getattr(torch, config.learner.dtype),
        attn_implementation="eager" if capped else None,
        trust_remote_code=remote,
        use_safetensors=True,
    )
    lm.config.use_cache = False
    switch_off_dropout(lm)
    lm.train()  # Hugging Face models recompute activations in training mode only
    if config.learner.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return PolicyLogps(lm, config.learner.logprob_chunk)


@dataclass(slots=True)
class GradNorm:
    """Step pre-hook for ZeRO stage 0, where DeepSpeed neither reports the norm (float32) nor leaves it to be asked for
    between reduction and update: measures the reduced gradients, then clips them."""

    limit: float | None
    last: float = math.nan

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.last = float(nn.utils.clip_grad_norm_(parameters, self.limit or math.inf))
