"""The protocol of an engine, and what every vLLM engine shares: requests from seeds, updates, sleep.

What an update does with running groups is `weights.pause` (see pause.py). No KV cache outlives the weights that filled
it, and every token's version is known.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from vllm import RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind

from actors.pause import Gate, Pause, Room
from sppo_ray.errors import SppoError, WeightSyncError
from sppo_ray.types import Sampling
from sppo_ray.weight_chunks import WeightChunk

logger = logging.getLogger(__name__)

# A fresh pass at every call, over all chunks or over what tells the engine's processes how to receive a broadcast.
Chunks = Callable[[], AsyncIterator[WeightChunk] | AsyncIterator[Mapping[str, Any]]]


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
    version: int  # of the weights; of the oldest ones when token_versions is given
    token_versions: np.ndarray | None = None  # int32 [T]; None: all tokens have one version


class Engine(Protocol):
    """One model being served."""

    version: int
    refusal: str | None  # why generate refuses (asleep, half-updated weights); None while it serves

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, protected: bool = False) -> list[RawOutput]:
        """One output per seed, in their order. Raises WeightSyncError when it must not serve, EngineDied, ValueError,
        and under `weights.pause=abort` GroupAborted when an update ended it: never if `protected`."""
        ...

    async def score(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> np.ndarray:
        """float32 [T], nats: log-probability of each response token (T >= 1) given what is before it, full softmax at
        temperature 1, under the weights served. Raises as generate does, but is never aborted."""
        ...

    async def update_weights(self, version: int, chunks: Chunks) -> None:
        """Serve other weights; wakes a sleeping engine. If it raises, kept groups end with WeightSyncError, and
        generate refuses until an update succeeds."""
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


class VllmEngine(ABC):
    """What both engines share: the gate, requests from seeds, scoring, the update protocol, sleep."""

    def __init__(self, version: int, can_sleep: bool, stop_ids: Sequence[int], pause: Pause, places: int) -> None:
        """stop_ids: tokens that end a turn, beside the model's EOS. places: sequences handed to vLLM at once."""
        self.version = version
        self.pause: Pause = pause
        self.refusal: str | None = None
        self._first_version = version
        self._stop_ids = stop_ids
        self._can_sleep = can_sleep
        self._asleep: set[str] = set()  # vLLM's memory tags
        self._gate = Gate()
        self._room = Room(places)
        self._ids = itertools.count()

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, protected: bool = False) -> list[RawOutput]:
        params = requests(sampling, self._stop_ids)
        # Under `keep` there is nothing to be protected from: the group goes on.
        must_finish = protected and self.pause != "keep"
        async with self._room.of(len(sampling.seeds)):
            finished = await self._gate.run(self._all(list(token_ids), params), must_finish)
        return [_raw(output, self._first_version) for request in finished for output in request.outputs]

    async def score(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> np.ndarray:
        if not len(prompt_ids) or not len(response_ids):
            raise ValueError("scoring needs a prompt and a response of at least one token each")
        ids, last = [*prompt_ids, *response_ids][:-1], int(response_ids[-1])
        # The last token is asked for as the one to be sampled: a prompt as long as the context would be refused.
        # vLLM does not read its prefix cache for such a request. It must finish: half of it under other weights is
        # nobody's log-probability.
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, logprob_token_ids=[last])
        (output,) = await self._gate.run(self._all(ids, [params]), must_finish=True)
        before = zip(ids[len(prompt_ids) :], output.prompt_logprobs[len(prompt_ids) :], strict=True)
        each = [choices[token].logprob for token, choices in before]
        return np.asarray([*each, output.outputs[0].logprobs[0][last].logprob], dtype=np.float32)

    async def _all(self, prompt: list[int], params: list[SamplingParams]) -> list[RequestOutput]:
        if self.refusal is not None:
            raise WeightSyncError(self.refusal)
        tasks = [asyncio.ensure_future(self._request(prompt, one, f"r{next(self._ids)}")) for one in params]
        try:
            return await asyncio.gather(*tasks)
        finally:  # when one fails, the others must not run on outside the gate
            for task in tasks:
                if not task.cancelling():  # a second one would cut short its taking the request out of vLLM
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def update_weights(self, version: int, chunks: Chunks) -> None:
        async with self._gate.closed(self.pause):
            self.refusal = f"an update to weights version {version} was interrupted: load a published version"
            try:
                await self._before_update()
                await self._transfer_or_repeat(version, chunks)
                await self._after_update(version)
            except BaseException:  # cancelled too: what was kept must not wait for weights that may never come
                self._gate.end_all(WeightSyncError(self.refusal))
                raise
            self.version, self.refusal = version, None

    async def _transfer_or_repeat(self, version: int, chunks: Chunks) -> None:
        try:
            await self._transfer(chunks)
        except EngineDied:
            raise
        except Exception:  # whatever it was, half-updated layers must be loaded whole before anything runs
            logger.exception("update to version %d failed half-way; trying once more", version)
            await self._transfer(chunks)

    async def _transfer(self, chunks: Chunks) -> None:
        await self._rpc("abandon_weight_update")
        await self._rpc("start_weight_update")
        async for part in chunks():
            if isinstance(part, WeightChunk):
                await self._send(part)
            else:
                await self._rpc("update_weights", update_info=part)
        await self._rpc("finish_weight_update")

    async def sleep(self) -> None:
        if not self._can_sleep or self._asleep:
            return
        async with self._gate.closed("finish"):
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


def _raw(output: Any, first_version: int) -> RawOutput:
    """first_version: of the weights the engine was started with, which vLLM calls "default"."""
    tokens = tuple(output.token_ids)
    each = [choices[token].logprob for token, choices in zip(tokens, output.logprobs, strict=True)]
    logprobs = np.asarray(each, dtype=np.float32)
    versions = np.empty(len(tokens), dtype=np.int32)
    for span in output.weight_versions:
        versions[span.start : span.end] = first_version if span.version == "default" else int(span.version)
    oldest = int(versions.min())
    return RawOutput(
        token_ids=tokens,
        text=output.text,
        finish_reason=output.finish_reason,
        logprob=output.cumulative_logprob,
        token_logprobs=logprobs,
        version=oldest,
        token_versions=None if oldest == versions.max() else versions,
    )
