"""The protocol of an engine, and what every vLLM engine shares: requests from seeds, updates, sleep.

A group is sampled under one version of the weights: an update waits until the groups inside are done and keeps later
ones out (`_Gate`), so a group is never a mixture, and no KV cache outlives the weights that filled it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from vllm import RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind

from sppo_ray.errors import SppoError, WeightSyncError
from sppo_ray.types import Sampling
from sppo_ray.weight_chunks import WeightChunk

logger = logging.getLogger(__name__)

Chunks = Callable[[], AsyncIterator[WeightChunk]]  # a fresh pass over all chunks at every call


class EngineDied(SppoError):
    """The engine cannot go on; its process must be replaced."""


@dataclass(frozen=True, slots=True)
class RawOutput:
    """One sampled sequence as vLLM gives it."""

    token_ids: tuple[int, ...]  # T, with the stop token when finish_reason is "stop"
    text: str  # special tokens stripped
    finish_reason: str
    logprob: float  # nats, sum over T, full softmax at temperature 1
    token_logprobs: np.ndarray  # float32 [T], its summands
    version: int  # of the weights


class Engine(Protocol):
    """One model being served."""

    version: int
    refusal: str | None  # why generate refuses (asleep, half-updated weights); None while it serves

    async def generate(self, token_ids: Sequence[int], sampling: Sampling) -> list[RawOutput]:
        """One output per seed, in their order. Raises WeightSyncError when it must not serve, EngineDied, ValueError."""
        ...

    async def update_weights(self, version: int, chunks: Chunks) -> None:
        """Serve other weights; wakes a sleeping engine. If it raises, generate refuses until an update succeeds."""
        ...

    async def sleep(self) -> None:
        """Free the GPU's memory, weights included, until the next update. On CPU nothing: vLLM has no sleep there."""
        ...

    async def shutdown(self) -> None:
        """End the engine and its processes."""
        ...


def requests(sampling: Sampling, stop_ids: Sequence[int] = ()) -> list[SamplingParams]:
    """vLLM requests that give one response per seed, in order. stop_ids: tokens that end a turn, beside the model's EOS.

    vLLM gives child i of a request with n = K the seed s + i, so K consecutive seeds are one request; others are K.
    """
    seeds = sampling.seeds
    if sampling.temperature == 0 and len(seeds) != 1:
        raise ValueError(f"greedy sampling gives one response, but {len(seeds)} seeds were given")
    common: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(stop_ids),
        "logprobs": 0,  # the sampled token's only
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    if seeds == tuple(range(seeds[0], seeds[0] + len(seeds))):
        return [SamplingParams(n=len(seeds), seed=seeds[0], **common)]
    return [SamplingParams(seed=seed, **common) for seed in seeds]


class _Gate:
    """Many groups pass at once, or one update with nobody inside. An update that waits keeps new groups out."""

    def __init__(self) -> None:
        self._one_update = asyncio.Lock()
        self._open = asyncio.Event()
        self._open.set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._inside = 0

    @contextlib.asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        while not self._open.is_set():  # a second update may have closed it before this task woke
            await self._open.wait()
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if self._inside == 0:
                self._empty.set()

    @contextlib.asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        async with self._one_update:
            self._open.clear()
            try:
                await self._empty.wait()
                yield
            finally:
                self._open.set()


class VllmEngine(ABC):
    """What both engines share: the gate, requests from seeds, the update protocol, sleep."""

    def __init__(self, version: int, can_sleep: bool, stop_ids: Sequence[int] = ()) -> None:
        self.version = version
        self._stop_ids = stop_ids
        self.refusal: str | None = None
        self._can_sleep = can_sleep
        self._asleep: set[str] = set()  # vLLM's memory tags
        self._gate = _Gate()
        self._ids = itertools.count()

    async def generate(self, token_ids: Sequence[int], sampling: Sampling) -> list[RawOutput]:
        params = requests(sampling, self._stop_ids)
        async with self._gate.passing():
            if self.refusal is not None:
                raise WeightSyncError(self.refusal)
            prompt = list(token_ids)
            tasks = [asyncio.ensure_future(self._request(prompt, one, f"r{next(self._ids)}")) for one in params]
            try:
                finished = await asyncio.gather(*tasks)
            finally:  # when one fails, the others must not run on outside the gate
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            return [_raw(output, self.version) for request in finished for output in request.outputs]

    async def update_weights(self, version: int, chunks: Chunks) -> None:
        async with self._gate.closed():
            self.refusal = f"an update to weights version {version} was interrupted: load a published version"
            await self._before_update()
            try:
                await self._transfer(chunks)
            except EngineDied:
                raise
            except Exception:  # whatever it was, half-updated layers must be loaded whole before anything runs
                logger.exception("update to version %d failed half-way; trying once more", version)
                await self._transfer(chunks)
            await self._after_update(version)
            self.version, self.refusal = version, None

    async def _transfer(self, chunks: Chunks) -> None:
        await self._rpc("abandon_weight_update")
        await self._rpc("start_weight_update")
        async for chunk in chunks():
            await self._send(chunk)
        await self._rpc("finish_weight_update")

    async def sleep(self) -> None:
        if not self._can_sleep or self._asleep:
            return
        async with self._gate.closed():
            self.refusal = "the engine sleeps and holds no weights: load a published version first"
            await self._sleep()  # level 2 drops the weights: new ones follow anyway, and host memory stays free
            self._asleep = {"weights", "kv_cache"}

    async def _wake(self, tag: str) -> None:
        """Map the memory of one tag again; mapping twice would be an error, and a repeated update comes here twice."""
        if tag in self._asleep:
            await self._wake_up([tag])
            self._asleep.discard(tag)

    @abstractmethod
    async def _request(self, prompt: list[int], params: SamplingParams, request_id: str) -> RequestOutput: ...
    @abstractmethod
    async def _rpc(self, method: str, **kwargs: Any) -> None: ...
    @abstractmethod
    async def _send(self, chunk: WeightChunk) -> None: ...
    @abstractmethod
    async def _before_update(self) -> None: ...
    @abstractmethod
    async def _after_update(self, version: int) -> None: ...
    @abstractmethod
    async def _sleep(self) -> None: ...
    @abstractmethod
    async def _wake_up(self, tags: list[str]) -> None: ...


def _raw(output: Any, version: int) -> RawOutput:
    tokens = tuple(output.token_ids)
    each = [choices[token].logprob for token, choices in zip(tokens, output.logprobs, strict=True)]
    logprobs = np.asarray(each, dtype=np.float32)
    return RawOutput(tokens, output.text, output.finish_reason, output.cumulative_logprob, logprobs, version)
