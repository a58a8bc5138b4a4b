"""A judge that gives NaN: the data is to blame, not the worker."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import ray
from safetensors.numpy import load_file, save_file

from actors.judge import JudgeWorker
from actors.pool import JudgePool
from sppo_ray.config import Config
from sppo_ray.errors import WorkerFailed
from sppo_ray.protocols import Handle
from sppo_ray.types import Prompt, Receipt, Response, ResponseGroup
from tests.actors.conftest import ASSETS
from tests.actors.job_runs import LIMIT_S, manifest, metrics, sppo, train, unexplained

EMBEDDING = "pretrained_model.embeddings.word_embeddings.weight"


def poisoned_judge(folder: Path, token_text: str) -> Path:
    """The embedded judge with a NaN in the embedding of a token: whoever writes it gets NaN logits."""
    shutil.copytree(ASSETS / "judge", folder)
    token = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"][token_text]
    state = load_file(folder / "model.safetensors")
    state[EMBEDDING][token] = np.nan
    save_file(state, folder / "model.safetensors")
    return folder


def group(prompt_id: str, text: str, *texts: str) -> Handle:
    prompt = Prompt(prompt_id, text, text, np.zeros(2, np.int32))
    answers = [Response(np.ones(1, np.int32), a, "stop", -1.0, -np.ones(1, np.float32), 0) for a in texts]
    return Handle(
        ray.put(ResponseGroup(prompt, 1, tuple(answers), 0, 0, "rollout-0")), Receipt(prompt_id, "r", 2, 0, 0)
    )


async def test_nan_logits_name_the_prompt_and_leave_the_judge_alive(
    ray_local: None, actor_config: Config, tmp_path: Path
) -> None:
    model = str(poisoned_judge(tmp_path / "judge", "#"))
    config = actor_config.model_copy(update={"judge": actor_config.judge.model_copy(update={"model": model})})
    worker = ray.remote(JudgeWorker).options(num_cpus=0.01, max_restarts=0).remote("judge-0", config)
    try:
        pool = JudgePool(config, {"judge-0": worker})
        before = ray.get(worker.stats.remote())["pid"]
        with pytest.raises(WorkerFailed, match=r"^judge-0: JudgeError: prompt 'poisoned': PairRM .* NaN") as failure:
            await pool.judge(group("poisoned", "is # a letter?", "yes", "no"))
        assert type(failure.value) is WorkerFailed  # not taken for a death, which is tried again
        judged = await (await pool.judge(group("fine", "is a a letter?", "yes", "no " * 2000))).ref
        assert np.isfinite(judged.logits).all()
        assert judged.cut == 1
        after = ray.get(worker.stats.remote())
        assert (after["pid"], after["groups"]) == (before, 1)
    finally:
        ray.kill(worker)


def test_a_run_whose_judge_gives_nan_ends_with_the_prompt_on_record(tmp_path: Path) -> None:
    """In the manifest, and in the metrics where it happened: after the first slice's prompts, before any update."""
    judge = poisoned_judge(tmp_path / "judge", "<|source|>")  # every question begins with it
    process = sppo(*train(tmp_path / "run"), f"judge.model={judge}")
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1, output
    record, lines = manifest(tmp_path / "run"), metrics(tmp_path / "run")
    told = re.match(r"judge-\d: JudgeError: prompt '.+': PairRM", record["cause"])
    assert told is not None
    assert f"failed: {told[0]}" in output
    assert "20 NaN or infinite logits" in record["cause"]
    assert "\x1b" not in record["cause"]  # Ray's colours
    assert not any(record["restarts"].values())
    assert not any("step" in line for line in lines)
    assert [line["cause"] for line in lines if line.get("event") == "failed"] == [record["cause"]]
    assert not unexplained(tmp_path / "run")
