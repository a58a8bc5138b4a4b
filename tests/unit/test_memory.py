"""Memory estimates against sums done by hand, written out beside each."""

from __future__ import annotations

from typing import Any

import pytest

from sppo_ray.config import Config
from sppo_ray.layout import compute_layout
from sppo_ray.memory import (
    GIB,
    Memory,
    Part,
    activation_bytes,
    engine_parts,
    estimate_memory,
    judge_pair_tokens,
    judge_parts,
    learner_state,
    learner_work,
    micro_batch_tokens,
)
from sppo_ray.model_shapes import KNOWN
from tests.unit.gpu_configs import MISTRAL, gpu_config

POLICY, JUDGE = KNOWN[MISTRAL], KNOWN["llm-blender/PairRM"]
FITTING: dict[str, Any] = {"rollout": {"gpu_memory_utilization": 0.7}, "judge": {"dtype": "float16"}}


def estimate(config: Config) -> Memory:
    return estimate_memory(config, compute_layout(config), POLICY, JUDGE)


def by_label(parts: tuple[Part, ...]) -> dict[str, float]:
    return {part.label: part.gib for part in parts}


def test_zero_3_shards_of_mistral_on_8_ranks() -> None:
    config = gpu_config(8)
    # 7,241,732,096 / 8 = 905,216,512 parameters a rank; x 2 bytes = 1.686 GiB, x 4 = 3.372 GiB
    state = by_label(learner_state(config, POLICY))
    assert state == pytest.approx({"parameters": 1.686, "fp32 master": 3.372, "rmsprop state": 3.372}, abs=1e-3)
    work = by_label(learner_work(config, POLICY))
    assert work["gradients"] == pytest.approx(3.372, abs=1e-3)  # 7.2417e9 x 4 / 8 / 2^30
    assert work["fp32 gradients at the step"] == pytest.approx(3.372, abs=1e-3)  # one sub-group holds the whole shard
    assert work["DeepSpeed buffers"] == pytest.approx(2 * 1.5e9 / GIB)


def test_adamw_holds_two_moments_and_zero_2_whole_parameters() -> None:
    config = gpu_config(8, sections={"learner": {"optimizer": "adamw", "zero_stage": 2}})
    state = by_label(learner_state(config, POLICY))
    assert state["adamw state"] == pytest.approx(2 * 3.372, abs=2e-3)
    assert state["parameters"] == pytest.approx(13.489, abs=1e-3)  # 7.2417e9 x 2 bytes


def test_zero_0_in_fp32_needs_no_master_copy() -> None:
    config = gpu_config(8, sections={"learner": {"zero_stage": 0, "dtype": "float32"}})
    state = by_label(learner_state(config, POLICY))
    assert state == pytest.approx({"parameters": 26.977, "fp32 master": 0, "rmsprop state": 26.977}, abs=1e-3)
    assert by_label(learner_work(config, POLICY))["fp32 gradients at the step"] == 0


def test_activations_of_mistral() -> None:
    config = gpu_config(8)
    assert micro_batch_tokens(config) == 8 * 2 * 1024  # prompts x pair x tokens
    # a layer, bytes a token: 2 x (6 x 4096 + 2 x 4096 + 2 x 1024 + 4 x 14336) + 2 norms x 4 x 4096 = 217,088
    layer = 217_088
    # checkpointed: two layers' worth, and 32 layer inputs of 4096 x 2 bytes
    assert activation_bytes(config, POLICY) == 16_384 * (2 * layer + 32 * 8192)
    without = gpu_config(8, sections={"learner": {"gradient_checkpointing": False}})
    assert activation_bytes(without, POLICY) == 16_384 * (2 + 32) * layer


def test_gemma_2_holds_attention_scores() -> None:
    gemma = KNOWN["google/gemma-2-9b-it"]
    config = gpu_config(8, sections={"learner": {"micro_batch_size": 4}})
    # 2 x (6 x 3584 + 2 x 4096 + 2 x 2048 + 4 x 14336) + 4 norms x 4 x 3584 + 16 bytes x 16 heads x 1024 = 501,760
    layer = 2 * (21_504 + 8_192 + 4_096 + 57_344) + 57_344 + 262_144
    assert layer == 501_760
    assert activation_bytes(config, gemma) == 8_192 * (2 * layer + 42 * 7_168)


def test_all_k_responses_make_larger_micro_batches_and_few_prompts_smaller_ones() -> None:
    assert micro_batch_tokens(gpu_config(8, sections={"selection": {"rule": "all"}})) == 8 * 5 * 1024
    assert micro_batch_tokens(gpu_config(8, sections={"learner": {"batch_size": 16}})) == 2 * 2 * 1024


def test_log_probability_chunk() -> None:
    # 1024 positions x 32,000 x 16 bytes = 0.488 GiB; hidden states 2 x 16,384 x 4096 x 2 bytes = 0.25 GiB
    assert by_label(learner_work(gpu_config(8), POLICY))["log-probability chunk"] == pytest.approx(0.738, abs=1e-3)


def test_kv_cache_is_what_the_engine_share_leaves() -> None:
    config = gpu_config(8, sections=FITTING)
    parts = by_label(engine_parts(config, POLICY))
    assert parts["vLLM weights"] == pytest.approx(13.489, abs=1e-3)
    assert sum(parts.values()) == pytest.approx(0.7 * 80)
    # 40.42 GiB at 128 KiB a token
    assert estimate(config).kv_tokens == int(parts["KV cache"] * 2**13)


def test_judge_of_one_group_at_full_length() -> None:
    config = gpu_config(8, sections=FITTING)
    assert judge_pair_tokens(config) == 1224 + 2 * 412 == 2048
    parts = by_label(judge_parts(config, JUDGE))
    assert parts["judge weights"] == pytest.approx(436_014_081 * 2 / GIB)
    # 4 matrices x 20 pairs x 16 heads x 2048^2 x 2 bytes = 10 GiB; rows 20 x 2048 x (2 x 4096 + 4 x 1024) x 2 = 0.9375 GiB
    assert parts["judge activations"] == pytest.approx(10.9375)


def test_judge_inputs_are_no_longer_than_the_texts() -> None:
    short = gpu_config(8, sections={"rollout": {"max_model_len": 256, "max_new_tokens": 64}})
    assert judge_pair_tokens(short) == 256 + 2 * 64


def test_mistral_fits_8_gpus_of_80_gib_in_both_phases() -> None:
    memory = estimate(gpu_config(8, sections=FITTING))
    assert memory.fits
    assert [phase.where for phase in memory.phases] == ["every GPU, sampling", "every GPU, training"]
    # sampling: 56 of vLLM + 1 waiting learner + 0.81 + 10.94 + 1 judge
    assert memory.phases[0].gib == pytest.approx(69.75, abs=0.01)


def test_full_precision_judge_beside_a_large_engine_is_refused_with_remedies() -> None:
    memory = estimate(gpu_config(8))  # the defaults: 0.85 x 80 = 68 of vLLM and 23.5 of fp32 judge
    assert not memory.fits
    (problem,) = memory.problems
    for part in ("every GPU, sampling", "cluster.gpu_memory_gb=80", "gpu_memory_utilization", "judge.dtype=float16"):
        assert part in problem


def test_one_gpu_cannot_train_seven_billion_parameters() -> None:
    problems = " ".join(estimate(gpu_config(1, sections=FITTING)).problems)
    assert "every GPU, training" in problems
    assert "learner.num_workers" in problems


def test_kv_cache_must_hold_one_sequence() -> None:
    tight: dict[str, Any] = {"rollout": {"gpu_memory_utilization": 0.2}, "judge": {"dtype": "float16"}}
    memory = estimate(gpu_config(8, sections=tight))  # 16 GiB hold weights and 0.4 GiB of cache
    assert "one sequence may have 32,768" in memory.problems[0]
    tight["rollout"]["max_model_len"] = 2048
    assert estimate(gpu_config(8, sections=tight)).fits


def test_disaggregated_gives_each_role_its_phase() -> None:
    memory = estimate(gpu_config(8, (3, 4, 1), layout="disaggregated"))
    assert [phase.where for phase in memory.phases] == ["rollout GPU", "learner GPU", "judge GPU"]
    assert memory.fits  # even with the fp32 judge
    assert not any("offloaded" in part.label for part in memory.host)


def test_host_memory_of_a_publish_and_of_the_offloaded_learner() -> None:
    host = by_label(estimate(gpu_config(16, sections=FITTING)).host)
    assert host["object store: two versions of the weights"] == pytest.approx(2 * 13.489, abs=2e-3)
    # (2 + 4 + 4) bytes x 7.2417e9 = 67.4 GiB, half of the ranks on each of two nodes
    assert host["learner offloaded while sampling"] == pytest.approx(67.444 / 2, abs=1e-2)


def test_host_memory_of_a_checkpoint() -> None:
    """fp32 weights and RMSprop's second moment: 8 bytes x 7.2417e9 = 53.96 GiB; AdamW has two moments."""
    label = "a checkpoint being written, on the node of learner-0"
    every: dict[str, Any] = {"learner": {"checkpoint_every": 96}}
    assert by_label(estimate(gpu_config(16, sections=FITTING | every)).host)[label] == pytest.approx(53.955, abs=1e-2)
    every["learner"]["optimizer"] = "adamw"
    assert by_label(estimate(gpu_config(16, sections=FITTING | every)).host)[label] == pytest.approx(80.933, abs=1e-2)
    assert label not in by_label(estimate(gpu_config(16, sections=FITTING | {"learner": {"checkpoint_every": 0}})).host)


def test_cpu_has_host_memory_only() -> None:
    config = gpu_config(0, (2, 2, 1), sections={"rollout": {"max_model_len": 256, "kv_cache_mb": 64}})
    memory = estimate(config)
    assert memory.phases == ()
    host = by_label(memory.host)
    assert host["rollout workers"] == pytest.approx(2 * (13.489 + 0.0625), abs=1e-2)
    assert host["5 processes at 0.7 GiB"] == pytest.approx(3.5)
    apart = gpu_config(0, (2, 2, 1), sections={"rollout": {"max_model_len": 256, "engine": "async"}})
    assert "7 processes at 0.7 GiB" in by_label(estimate(apart).host)  # an engine's own beside each rollout worker
    assert memory.kv_tokens == 512  # 64 MiB at 128 KiB


def test_a_frozen_reference_is_counted() -> None:
    """Async with a snapshot holds the local part of the weights once more, in the policy's precision."""
    apart = {"sections": {"schedule": {"mode": "async"}, "objective": {"reference": "snapshot"}}}
    config = gpu_config(8, (3, 4, 1), **apart)
    parts = {part.label: part.gib for part in learner_state(config, POLICY)}
    assert parts["frozen reference"] == pytest.approx(2 * POLICY.parameters / 4 / 2**30)
    assert "frozen reference" not in {part.label for part in learner_state(gpu_config(8), POLICY)}
