"""A judge worker: PairRM in one actor. A group is judged as one batch, so its logits do not depend on the worker.

The methods are async and never wait, so that Ray runs them one after another, whatever max_concurrency the actor has:
threads of one process would only compete for its cores.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
import ray
import torch

from actors.process import assignment, begin
from actors.stacks import Place, here
from sppo_ray.config import Config
from sppo_ray.errors import JudgeError
from sppo_ray.layout import Assignment
from sppo_ray.pairrm import load_pairrm
from sppo_ray.types import JudgedGroup, Prompt, Receipt, ResponseGroup

logger = logging.getLogger(__name__)


class JudgeWorker:
    """Create with `ray.remote(JudgeWorker).options(…)`; on a GPU if Ray assigned one."""

    def __init__(self, name: str, config: Config) -> None:
        # First what __repr__ reads: Ray asks for it also when this fails, and would report that failure in its place.
        # Ray shows an actor only the GPUs it was given, so the first visible one is ours. A machine may also pretend to
        # have GPUs (`ray start --num-gpus`), hence the second question.
        self.name = name
        self._device = "cuda:0" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
        begin(config.run.dir, name)
        torch.set_num_threads(config.cluster.threads)
        self._templated = config.judge.source == "templated"
        self._groups = 0
        self._pairrm = load_pairrm(
            config.judge.model,
            self._device,
            config.judge.dtype,
            source_max_tokens=config.judge.source_max_tokens,
            candidate_max_tokens=config.judge.candidate_max_tokens,
            allow_pickle=config.judge.allow_pickle,
        )
        logger.info("%s judges with %s on %s", name, config.judge.model, self._device)

    def __repr__(self) -> str:
        return f"JudgeWorker({self.name}, {self._device})"

    async def judge(self, group: ResponseGroup, receipt: Receipt) -> tuple[JudgedGroup, Receipt]:
        """Add the logits. Call with num_returns=2. Raises JudgeError naming the prompt."""
        source, candidates = self._source(group.prompt), [response.text for response in group.responses]
        try:
            logits = self._pairrm.logits(source, candidates)
        except JudgeError as error:
            raise JudgeError(f"prompt {group.prompt.prompt_id!r}: {error}") from error
        self._groups += 1
        cut = self._pairrm.encoder.cut_candidates(source, candidates)
        return JudgedGroup(group, logits, self.name, cut), receipt

    def _source(self, prompt: Prompt) -> str:
        return prompt.templated if self._templated else prompt.text

    async def score(self, source: str, candidates: list[str]) -> np.ndarray:
        """Float32 [K, K] logits of any texts, for evaluation; `source` as judge.source asks for."""
        return self._pairrm.logits(source, candidates)

    async def ping(self) -> Place:
        """Where its process is, once it serves."""
        return here()

    async def where(self) -> Assignment:
        """The node and GPUs this worker was given."""
        return assignment("judge", self.name)

    async def stats(self) -> dict[str, Any]:
        """Counts since this process started, and the device."""
        return {"name": self.name, "pid": os.getpid(), "device": self._device, "groups": self._groups}
