"""vLLM behind one protocol: `InProcessEngine` (on CPU; the engine in the actor's own process) and `AsyncEngine` (on GPUs, or
where the config asks for it)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import AutoTokenizer
from vllm import AsyncEngineArgs, EngineArgs, RequestOutput, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine

from actors.engine_base import Engine, EngineDied, VllmEngine
from actors.pause import Pause
from actors.weight_transfer import BACKEND, EXTENSION
from sppo_ray.config import Config
from sppo_ray.templating import encoder_of
from sppo_ray.weight_chunks import WeightChunk

logger = logging.getLogger(__name__)

__all__ = ["AsyncEngine", "Engine", "EngineDied", "InProcessEngine", "engine_arguments", "start_engine"]


def start_engine(config: Config, model_path: str, version: int) -> Engine:
    """The engine `rollout.engine` asks for, serving the folder `model_path` as `version`. Takes seconds to minutes. Raises
    EngineDied if its process was killed meanwhile."""
    on_gpu = config.cluster.gpus > 0
    # vLLM stops at the EOS of generation_config; a template may end a turn with another token (<|eot_id|>, <|im_end|>).
    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=config.policy.trust_remote_code)
    stop_ids = encoder_of(tokenizer).stop_ids
    if config.engine_apart:
        return AsyncEngine(engine_arguments(config, model_path), version, on_gpu, stop_ids, config.weights.pause)
    return InProcessEngine(engine_arguments(config, model_path), version, on_gpu, stop_ids, config.weights.pause)


def engine_arguments(config: Config, model_path: str) -> dict[str, Any]:
    """vLLM's engine arguments."""
    common: dict[str, Any] = {
        "model": model_path,
        "dtype": config.policy.dtype,
        "trust_remote_code": config.policy.trust_remote_code,
        "max_model_len": config.rollout.max_model_len,
        "max_num_seqs": config.rollout.max_num_seqs,
        "logprobs_mode": "raw_logprobs",  # before temperature and top-p: comparable with the learner's
        "worker_extension_cls": EXTENSION,
        "weight_transfer_config": {"backend": BACKEND},
        "disable_log_stats": True,
    }
    if config.cluster.gpus > 0:
        # The K responses share one prefill through the prefix cache; every update clears it.
        return common | {
            "gpu_memory_utilization": config.rollout.gpu_memory_utilization,
            "enable_prefix_caching": True,
            "enable_sleep_mode": True,
        }
    # A seeded request that meets a partial prefill kills vLLM 0.32 on CPU, hence no chunked prefill. No prefix caching:
    # whether a prompt hits the cache depends on what ran before, and a hit computes other shapes and so other last
    # bits; without it the same seeds give the same tokens whatever the history of the worker. Short prompts pay little.
    return common | {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": config.rollout.kv_cache_mb << 20,
    }


def _places(arguments: dict[str, Any]) -> int:
    """Sequences handed to vLLM at once: a group holds its places until its longest response is done, so as many again as
    are decoded together keep it busy."""
    return 2 * int(arguments.get("max_num_seqs", 256))


class InProcessEngine(VllmEngine):
    """LLMEngine driven by one thread of this process. The thread's queue orders requests, steps and updates."""

    def __init__(
        self,
        arguments: dict[str, Any],
        version: int,
        can_sleep: bool = False,
        stop_ids: Sequence[int] = (),
        pause: Pause = "finish",
    ) -> None:
        super().__init__(version, can_sleep, stop_ids, pause, _places(arguments))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._llm: LLMEngine = self._thread.submit(
            lambda: LLMEngine.from_engine_args(EngineArgs(**arguments), enable_multiprocessing=False)
        ).result()
        self._waiting: dict[str, asyncio.Future[RequestOutput]] = {}
        self._stepping: asyncio.Task[None] | None = None
        self._may_step = asyncio.Event()  # not during an update, after which kept requests go on
        self._may_step.set()
        self._died: EngineDied | None = None

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        if self._died is not None:
            raise self._died
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def _request(self, prompt: list[int], params: SamplingParams, request_id: str) -> RequestOutput:
        future: asyncio.Future[RequestOutput] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future  # before add_request: the step after it may already finish the request
        try:
            await self._run(self._llm.add_request, request_id, {"prompt_token_ids": prompt}, params)
            if self._stepping is None or self._stepping.done():
                self._stepping = asyncio.create_task(self._step_while_waited_for())
            return await future
        except asyncio.CancelledError:
            # Shielded: a second cancellation must not leave the request behind in vLLM.
            await asyncio.shield(self._run(self._llm.abort_request, [request_id]))
            raise
        finally:
            self._waiting.pop(request_id, None)

    async def _step_while_waited_for(self) -> None:
        try:
            while self._waiting:
                await self._may_step.wait()
                for output in await self._run(self._llm.step):
                    future = self._waiting.get(output.request_id)
                    if future is not None and not future.done():
                        future.set_result(output)
        except Exception as error:
            # The state of the engine is unknown now, so everyone who waits must learn it.
            logger.exception("vLLM's step failed")
            self._died = EngineDied(f"vLLM's step failed: {type(error).__name__}: {error}")
            self._died.__cause__ = error
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(self._died)

    async def _rpc(self, method: str, **kwargs: Any) -> None:
        await self._run(lambda: self._llm.collective_rpc(method, kwargs=kwargs))

    async def _send(self, chunk: WeightChunk) -> None:
        await self._rpc("update_weights", update_info={"chunk": chunk})

    async def _before_update(self) -> None:
        self._may_step.clear()
        await self._wake("weights")

    async def _after_update(self, version: int) -> None:
        # Kept requests go back to the queue: they prefill what they have so far again, under the new weights.
        await self._run(self._llm.reset_prefix_cache, True)
        await self._run(self._llm.set_weight_version, str(version))
        await self._wake("kv_cache")
        self._may_step.set()

    async def _sleep(self) -> None:
        await self._run(self._llm.sleep, 2)

    async def _wake_up(self, tags: list[str]) -> None:
        await self._run(self._llm.wake_up, tags)

    async def shutdown(self) -> None:
        await self._run(self._llm.engine_core.shutdown)
        self._thread.shutdown(wait=False)


class AsyncEngine(VllmEngine):
    """AsyncLLM: the engine core in a process of its own (and one per tensor-parallel rank), on this host."""

    def __init__(
        self,
        arguments: dict[str, Any],
        version: int,
        can_sleep: bool = True,
        stop_ids: Sequence[int] = (),
        pause: Pause = "finish",
    ) -> None:
        super().__init__(version, can_sleep, stop_ids, pause, _places(arguments))
        with _engine_death():
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    async def _request(self, prompt: list[int], params: SamplingParams, request_id: str) -> RequestOutput:
        with _engine_death():
            async for output in self._llm.generate({"prompt_token_ids": prompt}, params, request_id):
                if output.finished:
                    return output
        raise EngineDied(f"vLLM ended request {request_id} without an output")

    async def _rpc(self, method: str, **kwargs: Any) -> None:
        with _engine_death():
            await self._llm.collective_rpc(method, kwargs=kwargs)

    async def _send(self, chunk: WeightChunk) -> None:
        """Through anonymous shared memory, which the engine's processes open by our descriptor: it has no name, so
        nothing is left behind when we are killed, and the size of /dev/shm is no limit."""
        descriptor = os.memfd_create("sppo-weight-chunk")
        try:
            await asyncio.to_thread(_write, descriptor, chunk)
            header = {"names": list(chunk.names), "dtypes": list(chunk.dtypes), "shapes": list(map(list, chunk.shapes))}
            path = f"/proc/{os.getpid()}/fd/{descriptor}"
            await self._rpc("update_weights", update_info={"path": path, **header})
        finally:
            os.close(descriptor)

    async def _before_update(self) -> None:
        if self._asleep:
            await self._wake("weights")
        else:  # the gate has drained our groups, unless they are kept; clearing makes kept ones prefill again
            with _engine_death():
                await self._llm.pause_generation(mode="keep" if self.pause == "keep" else "wait", clear_cache=True)

    async def _after_update(self, version: int) -> None:
        with _engine_death():
            await self._llm.reset_prefix_cache()
            await self._llm.update_weight_version(str(version))
            await self._wake("kv_cache")
            await self._llm.resume_generation()

    async def _sleep(self) -> None:
        with _engine_death():
            await self._llm.sleep(level=2)

    async def _wake_up(self, tags: list[str]) -> None:
        with _engine_death():
            await self._llm.wake_up(tags)

    async def shutdown(self) -> None:
        self._llm.shutdown()


def _write(descriptor: int, chunk: WeightChunk) -> None:
    with open(descriptor, "wb", closefd=False) as file:
        file.write(chunk.data.data)


@contextlib.contextmanager
def _engine_death() -> Iterator[None]:
    try:
        yield
    except EngineDeadError as error:
        raise EngineDied(f"vLLM's engine process died: {error}") from error
    except RuntimeError as error:
        # vLLM has no type for an engine that does not come up. One that ended by a signal had no error of its own; where vLLM
        # saw the end before the exit code it names none, and a new start shows which it was.
        if not re.search(r"Failed core proc\(s\): \{(\}|.*: -\d)", str(error)):
            raise
        raise EngineDied(f"vLLM's engine process was killed: {error}") from error
