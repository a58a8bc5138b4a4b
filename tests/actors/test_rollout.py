"""Rollout and judge workers with real engines: what is sampled, recorded and handed on."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from serving_factory import Serving, gone, groups, sampled, start_worker, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.judge import JudgeWorker
from actors.pool import JudgePool, RolloutPool
from actors.rollout import RolloutWorker
from sppo_ray.errors import GroupAborted, WorkerFailed
from sppo_ray.types import Prompt, Receipt, ResponseGroup, Sampling

GREEDY = Sampling(0.0, 1.0, 24, (0,))


async def generate(
    worker: Any, prompt: Prompt, sampling: Sampling, iteration: int = 1, epoch: int = 0, protected: bool = False
) -> tuple[ResponseGroup, Receipt]:
    group, receipt = worker.generate.options(num_returns=2).remote(prompt, sampling, iteration, epoch, protected)
    return await group, await receipt


async def test_workers_and_order_do_not_change_the_samples(serving: Serving, prompts: list[Prompt]) -> None:
    one = await groups(serving.pool("rollout-0"), prompts, list(range(len(prompts))))
    two = await groups(serving.pool(), prompts, list(reversed(range(len(prompts)))))
    alone = await (await serving.pool("rollout-1").generate(prompts[3], sampled(3), 1)).ref
    assert [tokens(group) for group in one] == [tokens(group) for group in two]
    assert tokens(alone) == tokens(one[3])
    assert {group.worker for group in two} == {"rollout-0", "rollout-1"}  # the load was shared


async def test_group_and_receipt(serving: Serving, prompts: list[Prompt], policy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    (second,) = tokenizer.encode(" because", add_special_tokens=False)
    pool = serving.pool()
    handles = await asyncio.gather(*(pool.generate(p, sampled(i), 7) for i, p in enumerate(prompts)))
    group, receipt = await generate(serving.workers["rollout-0"], prompts[0], GREEDY, 7, 2)
    assert (group.iteration, group.epoch) == (receipt.iteration, receipt.epoch) == (7, 2)
    last_tokens = set()
    for i, handle in enumerate(handles):
        group = await handle.ref
        assert (group.prompt.prompt_id, group.iteration) == (prompts[i].prompt_id, 7)
        assert group.version_start == group.version_end == serving.version == handle.receipt.version
        assert [r.seed for r in group.responses] == list(sampled(i).seeds)
        assert handle.receipt.tokens == sum(len(r.token_ids) for r in group.responses)
        assert handle.receipt.truncated == sum(r.finish_reason == "length" for r in group.responses)
        for response in group.responses:
            ids = response.token_ids
            assert ids.dtype == np.int32
            stopped = response.finish_reason == "stop"
            assert stopped == (ids[-1] in (2, second))  # the stop token is part of the response
            assert not np.isin(ids[:-1], (2, second)).any()
            body = ids[:-1] if stopped else ids
            assert response.text == tokenizer.decode(body, skip_special_tokens=True)
            response.text.encode()  # no lone surrogates
            last_tokens.add(int(ids[-1]))
    assert {2, second} <= last_tokens  # both kinds of stop were seen


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.8), (1.3, 1.0)])
async def test_recorded_logprobs_are_of_the_full_softmax_at_temperature_one(
    serving: Serving, prompts: list[Prompt], policy: Path, temperature: float, top_p: float
) -> None:
    """Token by token against transformers, and the worker's teacher-forced score of the same response too."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    worker = serving.workers["rollout-0"]
    for prompt in prompts[:4]:
        group, _ = await generate(worker, prompt, Sampling(temperature, top_p, 48, (0, 1, 2)))
        for response in group.responses:
            ids = torch.from_numpy(np.concatenate([prompt.token_ids, response.token_ids])).long()
            with torch.no_grad():
                logps = model(ids[None]).logits[0, :-1].log_softmax(-1)
            taken = logps.gather(1, ids[1:, None])[-len(response.token_ids) :, 0].numpy()
            assert response.token_logprobs.dtype == np.float32
            np.testing.assert_allclose(response.token_logprobs, taken, atol=1e-4)
            assert response.logprob == pytest.approx(taken.sum(dtype=np.float64), abs=1e-4)
            scored, version = await worker.score.remote(prompt.token_ids, response.token_ids)
            np.testing.assert_allclose(scored, taken, atol=1e-4)
            assert version == group.version_start


async def test_a_worker_keeps_or_aborts_groups_as_configured(
    serving: Serving, base_weights: dict[str, torch.Tensor], prompts: list[Prompt], policy: Path
) -> None:
    """New weights arrive while the first of many groups is done and most still wait in vLLM."""
    workers = {}
    for pause in ("keep", "abort"):
        rollout = serving.config.rollout.model_copy(update={"max_num_seqs": 4})
        weights = serving.config.weights.model_copy(update={"pause": pause})
        config = serving.config.model_copy(update={"rollout": rollout, "weights": weights})
        workers[pause] = start_worker(f"rollout-{pause}", config, policy, 0)
    await asyncio.gather(*(worker.ping.remote() for worker in workers.values()))
    old = serving.version
    serving.publish({name: weight + 0.01 for name, weight in base_weights.items()})

    async def update_in_the_middle(pause: str) -> list[tuple[ResponseGroup, Receipt] | BaseException]:
        worker = workers[pause]
        groups = [
            asyncio.create_task(generate(worker, p, Sampling(1.3, 1.0, 200, tuple(range(4))), i, protected=i == 11))
            for i, p in enumerate(prompts)
        ]
        await asyncio.wait(groups, return_when=asyncio.FIRST_COMPLETED)
        await worker.load.remote(serving.version)
        return await asyncio.gather(*groups, return_exceptions=True)

    kept = await update_in_the_middle("keep")
    mixed = 0
    for result in kept:
        assert not isinstance(result, BaseException), result
        group, receipt = result
        assert receipt.version == group.version_start
        if group.version_start == group.version_end:
            assert all(response.token_versions is None for response in group.responses)
            continue
        mixed += 1
        assert (group.version_start, group.version_end) == (old, serving.version)
        every = [response.token_versions for response in group.responses]
        assert [len(v) for v in every] == [len(response.token_ids) for response in group.responses]
        assert {int(v) for v in np.concatenate(every)} == {old, serving.version}
    assert mixed >= 1

    aborted = await update_in_the_middle("abort")
    errors = [(i, result) for i, result in enumerate(aborted) if isinstance(result, BaseException)]
    assert errors
    for i, error in errors:
        assert isinstance(error, GroupAborted)
        assert f"rollout-abort: prompt {prompts[i].prompt_id!r}" in str(error)
    whole = [result[0] for result in aborted if not isinstance(result, BaseException)]
    # Done before the update or protected from it; or still waiting for a place in the engine, and sampled from the new weights.
    assert {(group.version_start, group.version_end) for group in whole} <= {
        (old, old),
        (serving.version, serving.version),
    }
    assert 11 not in {i for i, _ in errors}  # the protected one
    assert whole[-1].prompt.prompt_id == prompts[11].prompt_id  # the protected one, last in the queue
    for worker in workers.values():
        ray.kill(worker)


async def test_what_stops_a_worker_at_its_start_is_what_the_run_reports(serving: Serving) -> None:
    policy = serving.config.policy.model
    orphan = ray.remote(RolloutWorker).options(num_cpus=0.1).remote("orphan", serving.config, policy, 0, "no such hub")
    without_model = serving.config.model_copy(
        update={"judge": serving.config.judge.model_copy(update={"model": "/proc/none"})}
    )
    empty = ray.remote(JudgeWorker).options(num_cpus=0.1).remote("empty", without_model)
    with pytest.raises(
        WorkerFailed, match=r"^orphan: could not start: ValueError: Failed to look up actor with name 'no such hub'"
    ):
        await RolloutPool(serving.config, {"orphan": orphan}, serving.hub).ready()
    with pytest.raises(WorkerFailed, match=r"^empty: could not start: .*/proc/none"):
        await JudgePool(serving.config, {"empty": empty}).ready()


async def test_reference_seeds_are_requests_of_their_own(serving: Serving, prompts: list[Prompt]) -> None:
    async def sample(*seeds: int) -> list[list[int]]:
        group = await (await serving.pool("rollout-0").generate(prompts[0], Sampling(1.0, 1.0, 48, seeds), 1)).ref
        assert [r.seed for r in group.responses] == list(seeds)
        return [r.token_ids.tolist() for r in group.responses]

    spaced = await sample(0, 50, 100, 150, 200)
    assert len({tuple(ids) for ids in spaced}) == 5
    assert spaced[1:2] == await sample(50)
    consecutive = await sample(0, 1, 2)  # one request with n = 3: response i has seed s + i
    assert consecutive[0] == spaced[0]
    assert consecutive[1:2] == await sample(1)


async def test_what_the_engine_refuses_names_the_worker(serving: Serving, prompts: list[Prompt]) -> None:
    too_long = Prompt("long", "", "", np.full(400, 5, dtype=np.int32))
    with pytest.raises(WorkerFailed, match=r"^rollout-0: .*maximum context length is 256"):
        await serving.pool("rollout-0").generate(too_long, GREEDY, 1)
    with pytest.raises(WorkerFailed, match=r"^rollout-0: ValueError: greedy .* 2 seeds"):
        await serving.pool("rollout-0").generate(prompts[0], Sampling(0.0, 1.0, 8, (0, 1)), 1)
    assert (await serving.pool("rollout-0").generate(prompts[0], GREEDY, 1)).receipt.tokens > 0  # and goes on


async def test_groups_go_from_rollout_to_judge(serving: Serving, prompts: list[Prompt]) -> None:
    """And judges that are stopped or killed are replaced, with the same bits."""
    section = serving.config.judge.model_copy(update={"timeout_s": 30.0})  # a group takes milliseconds
    restarts = serving.config.cluster.model_copy(update={"max_restarts": 1})
    config = serving.config.model_copy(update={"judge": section, "cluster": restarts})

    def create(name: str) -> Any:
        return ray.remote(JudgeWorker).options(name=name, num_cpus=0.1).remote(name, config)

    names = ("judge-0", "judge-1")
    judges = {name: create(name) for name in names}
    pool, rollout = JudgePool(config, judges), serving.pool()
    await pool.ready()
    groups = await asyncio.gather(*(rollout.generate(p, sampled(i), 1) for i, p in enumerate(prompts)))
    judged = await asyncio.gather(*(pool.judge(group) for group in groups))
    first = await judged[0].ref
    assert first.logits.shape == (5, 5)
    assert first.logits.dtype == np.float32
    assert not first.logits.diagonal().any()
    assert judged[0].receipt == groups[0].receipt
    assert {(await handle.ref).judge for handle in judged} == set(names)
    again = [await (await JudgePool(config, {n: judges[n]}).judge(groups[0])).ref for n in names]
    assert all(np.array_equal(other.logits, first.logits) for other in again)  # the same bits on any worker
    texts = [response.text for response in first.group.responses]
    assert np.array_equal(await pool.score(prompts[0].text, texts), first.logits)

    ray.kill(judges["judge-1"])
    alone = JudgePool(config, {"judge-0": judges["judge-0"]}, create)
    await alone.ready()
    for end in (signal.SIGSTOP, signal.SIGKILL, signal.SIGKILL):  # more often than max_restarts, with calls in between
        pid = (await alone.stats())["judge-0"]["pid"]
        os.kill(pid, end)
        replaced = await asyncio.gather(*(alone.judge(group) for group in groups))
        assert all(
            [np.array_equal((await a.ref).logits, (await b.ref).logits) for a, b in zip(judged, replaced, strict=True)]
        )
        await gone(pid)
    assert alone.restarts == 3
    assert "judge-0, process" in (Path(config.run.dir) / "logs/judge-0.stacks.txt").read_text()
    ray.kill(ray.get_actor("judge-0"))
