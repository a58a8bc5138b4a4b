"""A rollout worker: one vLLM engine in one actor, which samples groups and takes new weights from the hub.

Create with `ray.remote(RolloutWorker).options(runtime_env={"env_vars": process.environment(…)}, …)`: Ray runs a class with
async methods as an async actor. Never set max_restarts or max_task_retries: the pool decides what is started and tried again.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.policy_folder import read_policy
from actors.process import assignment, begin
from actors.stacks import Place, here
from actors.weights import Published
from sppo_ray.config import Config
from sppo_ray.errors import GroupAborted, SppoError, WeightSyncError
from sppo_ray.layout import Assignment
from sppo_ray.types import FinishReason, Prompt, Receipt, Response, ResponseGroup, Sampling
from sppo_ray.weight_chunks import Checksum, WeightChunk, pack

if TYPE_CHECKING:
    from actors.engine_base import RawOutput

logger = logging.getLogger(__name__)


class RolloutWorker:
    """Serves `model_path` as `version`, or what the hub has published since: one that takes the place of a dead one is built
    from the same arguments, and must never serve the weights that the run began with."""

    def __init__(self, name: str, config: Config, model_path: str, version: int, hub: str) -> None:
        # First what __repr__ reads: Ray asks for it also when this fails, and would report that failure in its place.
        gpus = ray.get_gpu_ids()
        self.name, self._device = name, f"gpu {','.join(map(str, gpus))}" if gpus else "cpu"
        self._first_version = version
        begin(config.run.dir, name)
        # Only now: vllm takes seconds to import, and its log belongs into the redirected file.
        from actors.engines import EngineDied, start_engine

        self._hub = ray.get_actor(hub)
        self._config = config
        newer = self._newer_than(version)
        self._first_version = version if newer is None else newer.version
        self._checksum: str | None = None  # of the weights loaded from the hub; None for the model folder
        self._counts = {"prompts": 0, "responses": 0, "tokens": 0, "truncated": 0}
        self._loading = asyncio.Lock()
        self._behind = newer is not None
        try:
            self._engine = start_engine(config, model_path, version)
        except EngineDied as error:
            self._exit(error)
        logger.info("%s starts from %s at version %d", name, model_path, version)

    def __repr__(self) -> str:
        """Ray reads this once, after __init__: the version is the one that is served first."""
        return f"RolloutWorker({self.name}, {self._device}, v{self._first_version})"

    def _newer_than(self, version: int) -> Published | None:
        try:
            published: Published | None = ray.get(self._hub.current.remote(), timeout=self._config.weights.timeout_s)
        except (RayError, GetTimeoutError) as error:
            raise WeightSyncError(f"{self.name}: the weights hub did not answer at start: {error}") from error
        return published if published is not None and published.version > version else None

    async def generate(
        self, prompt: Prompt, sampling: Sampling, iteration: int, epoch: int = 0, protected: bool = False
    ) -> tuple[ResponseGroup, Receipt]:
        """Sample one group. Call with num_returns=2: the group goes to a judge, the receipt to the driver.

        Raises WeightSyncError when no complete weights are loaded, ValueError for a prompt the engine refuses, and
        GroupAborted when an update ended the group (`weights.pause=abort`): never if `protected`.
        """
        await self._catch_up()
        try:
            outputs = await self._engine.generate(prompt.token_ids.tolist(), sampling, protected)
        except GroupAborted as error:
            raise GroupAborted(f"{self.name}: prompt {prompt.prompt_id!r}: {error}") from error
        except SppoError as error:
            self._exit_if_engine_died(error)
            raise WeightSyncError(f"{self.name}: {error}") from error
        every_token = [_token_versions(output) for output in outputs]
        start, end = min(int(v.min()) for v in every_token), max(int(v.max()) for v in every_token)
        responses = tuple(
            Response(
                token_ids=np.asarray(output.token_ids, dtype=np.int32),
                text=output.text,
                finish_reason=self._finish_reason(output.finish_reason, prompt),
                logprob=float(output.logprob),
                token_logprobs=output.token_logprobs,
                seed=seed,
                token_versions=None if start == end else versions,
            )
            for output, versions, seed in zip(outputs, every_token, sampling.seeds, strict=True)
        )
        group = ResponseGroup(prompt, iteration, responses, start, end, self.name, epoch)
        return group, self._count(group)

    async def score(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> tuple[np.ndarray, int]:
        """float32 [T], nats: log pi(y_t | x, y_<t), full softmax at temperature 1, under the weights served; their version.

        prompt_ids int32 [P], response_ids int32 [T]; together at most the engine's context. Raises as generate does.
        """
        await self._catch_up()
        try:
            return await self._engine.score(prompt_ids.tolist(), response_ids.tolist()), self._engine.version
        except SppoError as error:
            self._exit_if_engine_died(error)
            raise WeightSyncError(f"{self.name}: {error}") from error

    def _finish_reason(self, reason: str, prompt: Prompt) -> FinishReason:
        if reason not in get_args(FinishReason):
            raise RuntimeError(f"{self.name}: vLLM ended a response to prompt {prompt.prompt_id!r} with {reason!r}")
        return reason  # type: ignore[return-value]

    def _count(self, group: ResponseGroup) -> Receipt:
        tokens = sum(len(response.token_ids) for response in group.responses)
        truncated = sum(response.finish_reason == "length" for response in group.responses)
        for key, amount in zip(self._counts, (1, len(group.responses), tokens, truncated), strict=True):
            self._counts[key] += amount
        return Receipt(
            group.prompt.prompt_id, self.name, tokens, truncated, group.version_start, group.iteration, group.epoch
        )

    async def load(self, version: int) -> str:
        """Serve the published `version`; wakes a sleeping engine. Returns the checksum of what was received.

        Raises WeightSyncError naming this worker. Weights are checked before the first byte reaches the model, so a
        damaged publish leaves the worker serving what it served.
        """
        async with self._loading:
            published = await self._published()
            if published is None or published.version != version:
                has = "nothing" if published is None else f"version {published.version}"
                raise WeightSyncError(f"{self.name}: asked to load weights version {version} but the hub has {has}")
            await self._install(published)
            return published.checksum

    async def _catch_up(self) -> None:
        """After a (re)start: load what was published in the meantime, once, before anything is served."""
        if not self._behind:
            return
        async with self._loading:
            if self._behind:
                published = await self._published()
                assert published is not None, "the hub had weights at start"
                await self._install(published)

    async def _published(self) -> Published | None:
        try:
            published: Published | None = await self._hub.current.remote()
        except RayError as error:
            raise WeightSyncError(f"{self.name}: the weights hub does not answer: {error}") from error
        return published

    async def _install(self, published: Published) -> None:
        engine = self._engine
        same = (engine.version, self._checksum) == (published.version, published.checksum)
        if same and engine.refusal is None:
            return
        try:
            broadcast = (published.broadcast or {}).get(self.name)
            if broadcast is not None:  # checked by its receivers, on arrival
                await engine.update_weights(published.version, _once(broadcast))
            else:
                await self._verify(published)
                await engine.update_weights(published.version, lambda: self._chunks(published))
        except WeightSyncError:
            raise
        except Exception as error:  # whatever vLLM or the object store raised, the caller must learn who failed at what
            self._exit_if_engine_died(error)
            raise WeightSyncError(
                f"{self.name}: loading weights version {published.version} failed: {type(error).__name__}: {error}"
            ) from error
        self._checksum, self._behind = published.checksum, False
        logger.info("%s serves version %d, checksum %s", self.name, published.version, published.checksum)

    async def _verify(self, published: Published) -> None:
        """A first pass over the chunks, one in memory at a time."""
        checksum = Checksum()
        async for chunk in self._chunks(published):
            await asyncio.to_thread(checksum.update, chunk)
            del chunk  # before the next one is made
        if checksum.hexdigest() != published.checksum:
            raise WeightSyncError(
                f"{self.name}: weights version {published.version} arrived with checksum {checksum.hexdigest()} but "
                f"were published with {published.checksum}; they are not loaded. Publish them again."
            )

    async def _chunks(self, published: Published) -> AsyncIterator[WeightChunk]:
        """From the object store, or read from the folder: one in memory at a time."""
        for ref in published.chunk_refs:
            yield await ref
        if published.folder is not None:
            packed = pack(read_policy(Path(published.folder)), self._config.weights.chunk_mb << 20)
            while (chunk := await asyncio.to_thread(next, packed, None)) is not None:
                yield chunk
                del chunk

    def _exit_if_engine_died(self, error: BaseException) -> None:
        from actors.engines import EngineDied

        if isinstance(error, EngineDied):
            self._exit(error)

    def _exit(self, error: BaseException) -> NoReturn:
        """End this process, so that the pool starts a new one."""
        logger.critical("%s: the engine died; the actor exits", self.name, exc_info=error)
        logging.shutdown()
        os._exit(1)

    async def sleep(self) -> None:
        """Free the GPU, weights included, until the next `load`. Waits for running groups. Nothing on CPU."""
        try:
            await self._engine.sleep()
        except SppoError as error:
            self._exit_if_engine_died(error)
            raise

    async def ping(self) -> Place:
        """Where its process is, once it serves: one that was started again has then caught up with the hub."""
        await self._catch_up()
        return here()

    async def where(self) -> Assignment:
        """The node and GPUs this worker was given."""
        return assignment("rollout", self.name)

    async def stats(self) -> dict[str, Any]:
        """Counts since this process started, the device, and the version served (checksum null: from the model folder)."""
        served = {"version": self._engine.version, "checksum": self._checksum}
        return {"name": self.name, "pid": os.getpid(), "device": self._device, **served, **self._counts}

    async def shutdown(self) -> None:
        """End the engine and its processes, before the actor is killed."""
        await self._engine.shutdown()


def _token_versions(output: RawOutput) -> np.ndarray:
    """int32 [T]"""
    if output.token_versions is not None:
        return output.token_versions
    return np.full(len(output.token_ids), output.version, dtype=np.int32)


def _once(broadcast: Mapping[str, Any]) -> Callable[[], AsyncIterator[Mapping[str, Any]]]:
    """The passes over a broadcast: there is one, because the learner sends once."""
    passes = [broadcast]

    async def passing() -> AsyncIterator[Mapping[str, Any]]:
        if not passes:
            raise WeightSyncError("the broadcast failed half-way and is not repeated; the worker's log has the error")
        yield passes.pop()

    return passing
