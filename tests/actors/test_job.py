"""The whole job as a user runs it, on the shipped tiny models: real Ray, vLLM, PairRM and DeepSpeed.

One run goes through undisturbed; a second one of the same config is interrupted with Ctrl-C in its second iteration and goes
on as a Ray job on a running head, with twice the rollout and judge workers. Both must give the same tables and the same
weights, to the last bit.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import load_dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.actors.job_runs import (
    LIMIT_S,
    PROMPTS,
    ROOT,
    RUNTIME_ENV,
    SLOW,
    listening,
    manifest,
    metrics,
    ray_head,
    shards,
    sppo,
    train,
    unexplained,
    wait_for,
)

pytestmark = pytest.mark.timeout(2 * LIMIT_S)  # the undisturbed run may be made for the same test


def test_the_run_directory_is_complete(whole):
    run_dir, output = whole
    assert "Held-out evaluation, 6 prompts" in output
    assert str(run_dir) in output
    assert "worker died" not in output  # Ray tells of every process that ends unexpectedly
    minutes, seconds = map(int, re.search(r"^this took (\d+) min (\d+) s$", output, re.MULTILINE).groups())
    # The packages' chatter is in the log files; our own progress is a line every ten seconds.
    assert len(output.splitlines()) < 60 + (60 * minutes + seconds) / 10, output
    for name in ("rollout-0", "judge-0", "buffer", "learner-0"):
        assert (run_dir / "logs" / f"{name}.log").stat().st_size > 0
    record = manifest(run_dir)
    assert (record["status"], record["groups_trained"], record["fidelity"]) == ("done", 48, "paper")
    assert record["overrides_of_preset"]["objective.eta"] == {"preset": 1000.0, "used": 10.0}
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["run"]["dir"] == str(run_dir)


def test_metrics(whole):
    lines = metrics(whole[0])
    steps = [line for line in lines if "step" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert {
        "loss",
        "delta_w",
        "delta_l",
        "margin",
        "margin_accuracy",
        "grad_norm",
        "learning_rate",
        "tokens_per_s",
    } <= set(steps[0])
    assert [line["iteration"] for line in lines if line.get("event") == "evaluation"] == [0, 1, 2]
    # At an iteration's first step the policy is its own reference: the log-ratio is zero.
    for line in (steps[0], steps[3]):
        assert abs(line["delta_w"]) < 1e-4
        assert abs(line["delta_l"]) < 1e-4


def test_every_metric_is_explained(whole):
    assert not unexplained(whole[0])


def test_train_table_agrees_with_the_raw_logits(whole):
    generated = load_dataset("parquet", data_files=str(whole[0] / "iter_1/generated.parquet"), split="train")
    trained = load_dataset("parquet", data_files=str(whole[0] / "iter_1/train.parquet"), split="train")
    assert len(generated) == len(trained) == PROMPTS
    for row, pair in zip(generated, trained, strict=True):
        logits = np.array(row["logits"])
        s = (logits - logits.T) / 2
        p = 1 / (1 + np.exp(-s))
        w, l = s.mean(1).argmax(), s.mean(1).argmin()  # noqa: E741
        assert (pair["chosen"], pair["rejected"]) == (row[f"generate_{w}"], row[f"generate_{l}"])
        assert pair["chosen_probs"] == p[w, l]
        assert (pair["chosen_probs_win"], pair["chosen_probs_lose"]) == (p.mean(1)[w], p.mean(1)[l])
        assert np.array(row["probability"]).tolist() == p.tolist()


def test_each_iteration_samples_from_the_policy_of_the_one_before(whole):
    run_dir, _ = whole
    tables = [pq.read_table(run_dir / f"iter_{t}/generated.parquet") for t in (1, 2)]
    assert [set(table["policy_version"].to_pylist()) for table in tables] == [{0}, {1}]
    assert not set(tables[0]["prompt_id"].to_pylist()) & set(tables[1]["prompt_id"].to_pylist())
    # The recorded log-probability is that of pi_1 as transformers computes it from the saved folder.
    model = AutoModelForCausalLM.from_pretrained(run_dir / "iter_1/policy").eval()
    for row in tables[1].slice(0, 3).to_pylist():
        prompt, response = row["prompt_token_ids"], row["response_token_ids"][0]
        with torch.no_grad():
            logps = torch.log_softmax(model(torch.tensor([prompt + response])).logits[0], dim=-1)
        want = sum(float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(response))
        assert row["logprobs"][0] == pytest.approx(want, abs=1e-3)
    assert AutoTokenizer.from_pretrained(run_dir / "iter_1/policy").chat_template


def test_a_finished_run_says_so(whole):
    process = sppo(*train(whole[0]))
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output
    assert "is complete" in output
    assert "Held-out evaluation" in output


def test_another_config_on_the_same_directory_is_refused(whole):
    process = sppo(*train(whole[0]), "objective.eta=5")
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2, output
    assert "objective.eta was 10.0, is 5.0" in output


def test_eval_of_the_saved_policy_gives_the_run_s_own_figures(whole):
    lines = metrics(whole[0])
    process = sppo("eval", *train(whole[0])[1:], "--policy", str(whole[0] / "iter_2/policy"))
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output
    for mode in ("greedy", "sampled"):
        figures = (lines[-1][f"judge_win_vs_base_{mode}"], lines[-1][f"oracle_win_vs_base_{mode}"])
        assert any(mode in row and all(f"{figure:.3f}" in row for figure in figures) for row in output.splitlines())


def test_a_worker_s_own_error_comes_first(tmp_path):
    """The KV cache is too small for one sequence: vLLM says so when the engine starts."""
    process = sppo(*train(tmp_path / "run"), "rollout.kv_cache_mb=8", "cluster.max_restarts=0")
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1, output
    first = output[output.index("failed: ") :]
    assert first.startswith("failed: rollout-0: ")
    assert "KV cache" in first
    record = manifest(tmp_path / "run")
    assert record["status"] == "failed"
    assert record["cause"].startswith("rollout-0: ")
    assert "KV cache" in record["cause"]


@pytest.mark.parametrize("line", ["prompts: ", "Ray dashboard: "])
def test_a_run_that_is_told_to_stop_before_it_works_ends_in_order(tmp_path, line):
    process = sppo(*train(tmp_path / "run"))
    next(said for said in process.stdout if said.startswith(line))
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1, output
    assert "goes on where the run stopped" in output
    assert not psutil.wait_procs(family, timeout=120)[1]


@pytest.fixture(scope="module")
def interrupted(whole, tmp_path_factory) -> Path:
    """A run ended by Ctrl-C while its second iteration is being sampled; leaves no process."""
    run_dir = tmp_path_factory.mktemp("runs") / "interrupted"
    process = sppo(*train(run_dir), *SLOW)
    wait_for(lambda: shards(run_dir, 2) >= 2 or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0]
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 1, output
    assert "goes on where the run stopped" in output
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not alive, alive
    assert manifest(run_dir)["status"] == "interrupted"
    assert (run_dir / "iter_1/policy/model.safetensors").exists()
    assert 0 < shards(run_dir, 2) < PROMPTS
    return run_dir


def test_a_copy_of_a_run_goes_on_elsewhere_taking_turns_on_two_ranks(whole, interrupted, tmp_path):
    """The colocated protocol on the CPU: what was saved is published, rollouts sleep and load, the learner really offloads."""
    script = """
import sys
from pathlib import Path
from rich.console import Console
from actors.train import train
from sppo_ray.config_io import load_config
from sppo_ray.layout import Layout, RoleLayout
from sppo_ray.preflight import preflight
from sppo_ray.run_dir import check_run_dir
config = load_config(Path(sys.argv[1]) / "config.yaml", sys.argv[2:])
check_run_dir(config)
one, two = RoleLayout(workers=1, gpus=0, cpus=0.1), RoleLayout(workers=2, gpus=0, cpus=0.1)
train(config, Layout("colocated", rollout=one, judge=one, learner=two, nodes=1, gpus_per_node=0), preflight(config), Console())
"""
    run_dir = tmp_path / "elsewhere"
    shutil.copytree(interrupted, run_dir)
    changed = (f"run.dir={run_dir}", "learner.num_workers=2", "learner.zero_stage=3", "rollout.in_flight=8")
    process = subprocess.run(
        [sys.executable, "-c", script, str(run_dir), *changed],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    for name in ("generated", "train"):
        one, other = (pq.read_table(folder / f"iter_2/{name}.parquet") for folder in (whole[0], run_dir))
        assert one.equals(other), name
    one, other = (load_file(folder / "iter_2/policy/model.safetensors") for folder in (whole[0], run_dir))
    # Two ranks sum in another order than one, and ZeRO-3 than ZeRO-0; see test_rmsprop_agrees_over_ranks_and_stages.
    found = torch.cat([(tensor - other[name]).abs().flatten() for name, tensor in one.items()])
    assert found.max() < 1e-4
    assert (found > 1e-6).float().mean() < 1e-3
    assert "going on after iteration 1" in process.stdout
    assert (run_dir / "logs/learner-1.log").exists()


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with ray_head(tmp_path_factory.mktemp("h")) as started:
        yield started


def test_a_head_as_the_readme_starts_it_keeps_to_loopback_and_asks_for_the_token(head):
    found = listening(psutil.Process(head.pid).children(recursive=True))
    assert {"gcs_server", "raylet"} <= {name for name, _ in found}
    assert not [entry for entry in found if not ip_address(entry[1]).is_loopback]
    for path in ("/api/jobs/", "/api/v0/actors"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(head.address + path, timeout=120)


def test_a_stopped_job_leaves_no_actor_and_a_resumable_run(interrupted, head):
    slow = ("rollout.in_flight=1", "buffer.flush_s=5")  # so that it is not over before it is stopped
    job = head.submit(*train(interrupted)[1:], *slow, options=(*RUNTIME_ENV, "--no-wait", "--submission-id", "to-stop"))
    assert job.returncode == 0, job.stderr
    wait_for(lambda: manifest(interrupted).get("resumed"))
    wait_for(lambda: head.alive() >= {"RolloutWorker", "JudgeWorker", "LearnerActor", "RayTrainWorker"})
    assert head.job("stop", "to-stop").returncode == 0
    # The learner's controller and ranks neither.
    wait_for(lambda: not head.alive(), timeout=180, found=head.alive)
    assert manifest(interrupted)["status"] == "interrupted"


def test_an_interrupted_run_goes_on_as_a_ray_job_and_ends_the_same(whole, interrupted, head, tmp_path):
    """From its directory alone, in which the end of a file is missing by now; without our runtime env, mirrored from now on."""
    shard = min((interrupted / "iter_2/ledger").glob("shard-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    faster = ("rollout.in_flight=8", "buffer.flush_s=0.2", f"run.mirror=file://{tmp_path}/mirror")
    job = head.submit(
        "--resume", f"run.dir={interrupted}", "rollout.num_workers=2", "judge.num_workers=2", *faster, options=()
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert "going on after iteration 1" in job.stdout
    assert "already in the ledger" in job.stdout
    said = " ".join(job.stdout.split())
    assert f"{shard.name} in" in said
    assert "set aside, its groups are made again" in said
    # Workers take our packages from the submitted directory, though they are installed here too.
    log = (interrupted / "logs/rollout-1.log").read_text()
    assert re.search(r"rollout-1: sppo-ray \S+ from \S*_ray_pkg_", log), log
    namespace = re.search(r"namespace (\S+)\)", job.stdout).group(1)
    named = {a["name"]: a["repr_name"] for a in head.actors() if a["ray_namespace"] == namespace}
    assert named["rollout-0"] == "RolloutWorker(rollout-0, cpu, v1)"
    assert named["judge-0"] == "JudgeWorker(judge-0, cpu)"
    assert named["learner"] == "LearnerActor(learner, 1 ranks on cpu)"
    assert {"buffer", "weights", "rollout-1", "judge-1"} <= set(named)
    for t in (1, 2):
        for name in ("generated", "train", "reference"):
            one, other = (pq.read_table(folder / f"iter_{t}/{name}.parquet") for folder in (whole[0], interrupted))
            assert one.equals(other), (t, name)
        weights = [(f / f"iter_{t}/policy/model.safetensors").read_bytes() for f in (whole[0], interrupted)]
        assert weights[0] == weights[1]
    for name in (
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "iter_2/train.parquet",
        "iter_2/policy/model.safetensors",
    ):
        assert (tmp_path / "mirror" / name).read_bytes() == (interrupted / name).read_bytes()
    assert "worker died" not in job.stdout + job.stderr  # Ray tells of every process that ends unexpectedly
    wait_for(lambda: not head.alive(), timeout=180, found=head.alive)
