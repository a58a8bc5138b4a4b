"""An update of the weights in the middle of running groups, under each `weights.pause`, in real engines of both kinds.

What the engines recorded is compared with transformers: every token's log-probability under the weights of its version.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.engine_base import RawOutput
from actors.engines import AsyncEngine, InProcessEngine, engine_arguments
from actors.pause import Gate
from actors.process import environment
from sppo_ray.config import Config
from sppo_ray.errors import GroupAborted, WeightSyncError
from sppo_ray.templating import encoder_of
from sppo_ray.types import Prompt, Sampling
from sppo_ray.weight_chunks import WeightChunk, pack

GREEDY = Sampling(0.0, 1.0, 400, (0,))  # so long that even a held-up test meets them in the middle
Weights = dict[str, torch.Tensor]
AnyEngine = InProcessEngine | AsyncEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")  # an engine belongs to one event loop


def sampled(i: int) -> Sampling:
    return Sampling(1.3, 0.9, 400, tuple(range(100 * i, 100 * i + 3)))


class Versions:
    """Weights by version, each with a transformers model: 0 is the embedded policy, the others are noise on it, and
    hardly ever stop before the token limit."""

    def __init__(self, folder: Path, base: Weights, stop_ids: tuple[int, ...]) -> None:
        self.folder, self.base, self.stop_ids = folder, base, stop_ids
        self.models: dict[int, Any] = {}
        self.newest = 0

    def weights(self, version: int) -> Weights:
        generator = torch.Generator().manual_seed(version)
        made = {n: w + 0.05 * torch.randn(w.shape, generator=generator) for n, w in self.base.items()}
        made["model.embed_tokens.weight"][list(self.stop_ids)] = 0  # tied: the logit of stopping is 0
        return made

    def chunks(self, version: int) -> AsyncIterator[WeightChunk]:
        async def every() -> AsyncIterator[WeightChunk]:
            for chunk in pack(self.weights(version).items(), 300_000):
                yield chunk

        return every()

    def logps(self, version: int, prompt: Prompt, tokens: np.ndarray) -> torch.Tensor:
        """float32 [T, V]: what comes before each token of the response, in log-probabilities."""
        if version not in self.models:
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
            model.load_state_dict(self.weights(version), strict=False)  # tied: no output layer of its own
            self.models[version] = model
        ids = torch.from_numpy(np.concatenate([prompt.token_ids, tokens])).long()
        with torch.no_grad():
            return self.models[version](ids[None]).logits[0, -len(tokens) - 1 : -1].log_softmax(-1)

    async def load_next(self, engine: AnyEngine) -> int:
        self.newest += 1
        await engine.update_weights(self.newest, lambda: self.chunks(self.newest))
        return self.newest


@pytest.fixture(scope="module")
def versions(policy: Path, base_weights: Weights) -> Versions:
    stops = json.loads((policy / "generation_config.json").read_text())["eos_token_id"]
    return Versions(policy, base_weights, tuple(stops))


@pytest.fixture(scope="module", params=[InProcessEngine, AsyncEngine])
async def engine(
    request: pytest.FixtureRequest, versions: Versions, policy: Path, actor_config: Config
) -> AsyncIterator[AnyEngine]:
    """Serving weights that babble. At most 8 sequences at once: of many groups some wait in vLLM's queue."""
    rollout = actor_config.rollout.model_copy(update={"max_num_seqs": 8, "max_model_len": 512})
    arguments = engine_arguments(actor_config.model_copy(update={"rollout": rollout}), str(policy))
    stop_ids = encoder_of(AutoTokenizer.from_pretrained(policy)).stop_ids
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(gpus=False, threads=1).items():
            patch.setenv(name, value)
        made = request.param(arguments, 0, can_sleep=False, stop_ids=stop_ids)
        await versions.load_next(made)
        yield made
        await made.shutdown()


async def in_the_middle(engine: AnyEngine, groups: list[asyncio.Task[Any]]) -> None:
    """Returns when the first responses have some tokens."""
    states = engine._llm.output_processor.request_states
    while not any(state.detokenizer.num_output_tokens() >= 20 for state in list(states.values())):
        assert not all(group.done() for group in groups), "the responses were too short to be met in the middle"
        await asyncio.sleep(0.001)


def started(groups: list[Coroutine[Any, Any, list[RawOutput]]]) -> list[asyncio.Task[list[RawOutput]]]:
    return [asyncio.create_task(group) for group in groups]


def token_versions(output: RawOutput) -> np.ndarray:
    return np.full(len(output.token_ids), output.version) if output.token_versions is None else output.token_versions


def check_logprobs(versions: Versions, prompt: Prompt, output: RawOutput, greedy: bool) -> None:
    """Each token's log-probability, and if greedy its choice, is that of the weights of its version."""
    tokens, each = np.asarray(output.token_ids), token_versions(output)
    assert len(tokens) == len(output.token_logprobs) == len(each)
    assert output.token_logprobs.sum(dtype=np.float64) == pytest.approx(output.logprob, abs=1e-3)
    for version in set(each.tolist()):
        logps = versions.logps(version, prompt, tokens).numpy()[each == version]
        taken = np.take_along_axis(logps, tokens[each == version][:, None], 1)[:, 0]
        np.testing.assert_allclose(output.token_logprobs[each == version], taken, atol=1e-4)
        if greedy:
            assert (logps.max(1) - taken < 1e-4).all()


async def check_serves(engine: AnyEngine, versions: Versions, prompts: list[Prompt]) -> None:
    """Nothing of earlier requests is left, and greedy decoding is that of the newest weights alone."""
    assert not engine._llm.output_processor.has_unfinished_requests()
    if isinstance(engine, InProcessEngine):
        assert engine._llm.engine_core.engine_core.scheduler.get_num_unfinished_requests() == 0
    for group, prompt in zip(
        await asyncio.gather(*(engine.generate(p.token_ids.tolist(), GREEDY) for p in prompts)), prompts, strict=True
    ):
        (output,) = group
        assert (output.version, output.token_versions) == (versions.newest, None)
        check_logprobs(versions, prompt, output, greedy=True)


async def test_finish(engine: AnyEngine, versions: Versions, prompts: list[Prompt]) -> None:
    engine.pause = "finish"
    old = versions.newest
    early = started([engine.generate(p.token_ids.tolist(), sampled(i)) for i, p in enumerate(prompts[:5])])
    await in_the_middle(engine, early)
    update = asyncio.create_task(versions.load_next(engine))
    await asyncio.sleep(0)
    late = started([engine.generate(p.token_ids.tolist(), sampled(i)) for i, p in enumerate(prompts[:5])])
    await update
    for tasks, version in ((early, old), (late, old + 1)):
        for prompt, group in zip(prompts, await asyncio.gather(*tasks), strict=False):
            assert {(output.version, output.token_versions) for output in group} == {(version, None)}
            for output in group:
                check_logprobs(versions, prompt, output, greedy=False)
    await check_serves(engine, versions, prompts[:2])


async def test_keep(engine: AnyEngine, versions: Versions, prompts: list[Prompt]) -> None:
    engine.pause = "keep"
    old = versions.newest
    asked = [GREEDY if i < 4 else sampled(i) for i in range(10)]  # 4 + 6 x 3 responses for 8 places
    groups = started([engine.generate(p.token_ids.tolist(), s) for p, s in zip(prompts, asked, strict=False)])
    await in_the_middle(engine, groups)
    await versions.load_next(engine)
    mixed = {"greedy": 0, "sampled": 0}
    for prompt, sampling, task in zip(prompts, asked, groups, strict=False):
        for output in await task:
            check_logprobs(versions, prompt, output, greedy=sampling is GREEDY)
            each = token_versions(output)
            assert set(each.tolist()) <= {old, old + 1}
            assert (np.diff(each) >= 0).all()  # from old to new, once
            assert output.version == each[0]
            if output.token_versions is not None:
                assert output.token_versions.dtype == np.int32
                assert each[0] != each[-1]
                mixed["greedy" if sampling is GREEDY else "sampled"] += 1
    assert min(mixed.values()) >= 1
    last = await groups[-1]
    assert {output.version for output in last} == {old + 1}  # begun before the update, but sampled after it
    await check_serves(engine, versions, prompts[:2])


async def test_abort(engine: AnyEngine, versions: Versions, prompts: list[Prompt]) -> None:
    engine.pause = "abort"
    old = versions.newest
    protected = {0, 9}
    groups = started(
        [engine.generate(p.token_ids.tolist(), GREEDY, i in protected) for i, p in enumerate(prompts[:10])]
    )
    await in_the_middle(engine, groups)
    await versions.load_next(engine)
    assert all(task.done() for task in groups)  # the update waited for the protected ones
    for i, (prompt, task) in enumerate(zip(prompts, groups, strict=False)):
        if i in protected:
            (output,) = await task
            assert (output.version, output.token_versions) == (old, None)
            check_logprobs(versions, prompt, output, greedy=True)
        else:
            with pytest.raises(GroupAborted):
                await task
    await check_serves(engine, versions, prompts[:2])


async def test_a_failed_update_ends_what_was_kept(engine: AnyEngine, versions: Versions, prompts: list[Prompt]) -> None:
    engine.pause = "keep"
    groups = started([engine.generate(p.token_ids.tolist(), GREEDY) for p in prompts[:10]])
    await in_the_middle(engine, groups)

    async def broken() -> AsyncIterator[WeightChunk]:
        async for chunk in versions.chunks(versions.newest):
            yield chunk
            raise OSError("no more chunks")

    with pytest.raises(OSError, match="no more chunks"):
        await engine.update_weights(10**6, broken)
    for task in groups:
        with pytest.raises(WeightSyncError, match="version 1000000 was interrupted"):
            await task
    await versions.load_next(engine)
    await check_serves(engine, versions, prompts[:2])


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.8), (1.3, 1.0)])
async def test_recorded_and_scored_log_probabilities(
    engine: AnyEngine, versions: Versions, prompts: list[Prompt], temperature: float, top_p: float
) -> None:
    """Both are of the full softmax at temperature 1, up to a context that is full."""
    for i, prompt in enumerate(prompts[:3]):
        room = 512 - len(prompt.token_ids)
        outputs = await engine.generate(prompt.token_ids.tolist(), Sampling(temperature, top_p, room, (7, 8)))
        for output in outputs:
            check_logprobs(versions, prompt, output, greedy=False)
            scores = await engine.score(prompt.token_ids.tolist(), output.token_ids)
            assert scores.dtype == np.float32
            np.testing.assert_allclose(scores, output.token_logprobs, atol=1e-4)
        full = np.random.default_rng(i).integers(3, 800, room).astype(np.int32)  # words nobody would sample
        for response in (full, full[:1]):
            logps = versions.logps(versions.newest, prompt, response).numpy()
            expected = np.take_along_axis(logps, response[:, None].astype(np.int64), 1)[:, 0]
            scores = await engine.score(prompt.token_ids.tolist(), response.tolist())
            np.testing.assert_allclose(scores, expected, atol=1e-4)


async def test_what_must_finish_is_waited_for_under_every_policy() -> None:
    for pause in ("finish", "keep", "abort"):
        gate, may_end = Gate(), asyncio.Event()

        async def work(may_end: asyncio.Event = may_end) -> str:
            await may_end.wait()
            return "whole"

        async def update(gate: Gate = gate, pause: Any = pause) -> None:
            async with gate.closed(pause):
                pass

        running = asyncio.create_task(gate.run(work(), must_finish=True))
        await asyncio.sleep(0)
        updating = asyncio.create_task(update())
        assert await asyncio.wait([updating], timeout=0.01) == (set(), {updating})
        may_end.set()
        await updating
        assert await running == "whole"


async def test_a_cancelled_caller_is_not_told_that_its_group_was_aborted() -> None:
    gate = Gate()
    running = asyncio.create_task(gate.run(asyncio.sleep(10)))
    await asyncio.sleep(0)
    gate.end_all(GroupAborted("by an update"))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_work_that_is_ended_twice_has_the_time_to_leave() -> None:
    gate, left = Gate(), []

    async def work() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.sleep(0.05)  # as vLLM takes a request out
            left.append(True)

    running = asyncio.create_task(gate.run(work()))
    await asyncio.sleep(0.01)
    for which in ("first", "second"):
        gate.end_all(GroupAborted(f"by the {which} update"))
        await asyncio.sleep(0.01)
    with pytest.raises(GroupAborted, match="first"):
        await running
    assert left
