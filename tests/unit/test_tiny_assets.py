"""The embedded tiny default: what is shipped loads, is what it says, and can be made again to the byte."""

import hashlib
import json
import random
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sppo_ray.tiny import judge_training, models, oracle, training
from sppo_ray.tiny.domain import FACTS, Part, normalise, parse_answer, split_questions

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "sppo_ray" / "assets"
CAPITAL = "Hello! What is the capital of France?"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run faster on one thread; the script sets it too, and other tests must not inherit it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shipped_prompts(part: str) -> list[dict[str, str]]:
    lines = (ASSETS / f"prompts_{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------- prompts


def test_train_and_heldout_prompts_are_disjoint_and_unique():
    train, heldout = shipped_prompts("train"), shipped_prompts("heldout")
    assert len(train) >= 1536
    assert len(heldout) >= 200
    texts = [normalise(row["prompt"]) for row in train + heldout]
    assert len(set(texts)) == len(texts)
    ids = [row["prompt_id"] for row in train + heldout]
    assert len(set(ids)) == len(ids)
    assert train[0]["prompt_id"] == "tiny/train/0001"


def test_shipped_prompts_are_the_generated_ones_and_heldout_asks_every_fact():
    split = split_questions(seed=0)
    assert [row["prompt"] for row in shipped_prompts("train")] == [q.prompt for q in split.train]
    assert [row["prompt"] for row in shipped_prompts("heldout")] == [q.prompt for q in split.heldout]
    assert {q.fact for q in split.heldout} == set(FACTS)
    assert len(FACTS) == 73


# ---------------------------------------------------------------- oracle


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("The capital of France is Paris.", 3.0),
        ("The answer is Paris.", 3.0),
        ("the  capital of france is PARIS.", 3.0),
        ("The capital of France is Rome.", -1.5),
        ("The capital of Italy is Rome.", -1.5),  # true, but not what was asked
        ("The answer is Paris. This is because the government of France meets in Paris.", 3.0 + 1.5),
        ("The answer is Paris. This is because the government of France meets in Rome.", 3.0 - 0.5),
        (
            "Good question! The answer is Paris. This is because the government of France meets in Paris. "
            "I hope this helps!",
            0.8 + 3.0 + 1.5 + 0.6,
        ),
        ("Look it up yourself. I am not sure. The answer is Rome. I had soup for lunch.", -1.5 - 1.2 - 1.5 - 0.8),
        ("The answer is Paris. The answer is Paris.", 3.0 - 1.0),
        ("Good question! Happy to help! The answer is Paris.", 0.8 - 1.0 + 3.0),
        ("The answer is Rome. The answer is Paris.", -1.5 + 3.0),
        ("The answer is Paris. Blue seven ladder.", 3.0 - 0.4 - 1.5),  # half of it is outside the grammar: junk
        ("Good question! The answer is Paris. Blue seven ladder.", 0.8 + 3.0 - 0.4),
        ("Happy to help!", 0.8 - 1.0),  # states nothing
        ("blue seven ladder", -0.4 - 1.0 - 1.5),
        ("", -1.0 - 1.5),
    ],
)
def test_oracle_scores_hand_computed_examples(response: str, expected: float):
    assert oracle.score(CAPITAL, response) == pytest.approx(expected)


def test_oracle_orders_right_above_wrong_above_junk():
    right, wrong, junk = ("The answer is woof.", "The answer is moo.", "woof moo lemon the")
    scores = [oracle.score("What does a dog say?", response) for response in (right, wrong, junk)]
    assert scores == sorted(scores, reverse=True)
    assert [oracle.is_junk("What does a dog say?", r) for r in (right, wrong, junk, " ")] == [False, False, True, True]
    assert oracle.is_right("What does a dog say?", right)
    assert not oracle.is_right("What does a dog say?", right + " " + wrong)


def test_answers_are_parsed_sentence_by_sentence_and_unknown_prompts_have_no_right_answer():
    answer = "Happy to help! I am not sure. The reverse of hot is cold. Have a nice day!"
    assert parse_answer("What is the opposite of hot?", answer) == [Part.POLITE, Part.HEDGE, Part.RIGHT, Part.CLOSING]
    assert parse_answer("Who are you?", "The answer is cold.") == [Part.WRONG]


def test_every_composed_answer_lies_inside_the_grammar():
    rng = random.Random(1)
    for question in split_questions(seed=0).heldout:
        assert Part.EXTRA not in parse_answer(question.prompt, training.base_answer(question.fact, rng))


# ---------------------------------------------------------------- shipped files


def test_shipped_files_are_small_and_hold_no_pickle():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".jsonl", ".md"}
    assert sum(path.stat().st_size for path in files) <= 20 * 2**20


@pytest.mark.parametrize("folder", ["policy", "judge"])
def test_tokenizers_round_trip_any_unicode(folder: str):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / folder)
    for text in ("plain", "  two  spaces\n\ttab ", "naïve café ,.!", "日本語 русский عربى", "🎉👩‍👩‍👧 \x00\x7f\u200b"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_chat_template_emits_bos_once_and_eos_after_the_answer():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "policy")
    turns = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert prompt == "<s><|user|>Hi<|assistant|>"
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"].count(tokenizer.bos_token_id) == 1
    turns.append({"role": "assistant", "content": "Hello"})
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<s><|user|>Hi<|assistant|>Hello</s>"
    assert tokenizer.bos_token_id not in tokenizer("Hi", add_special_tokens=False)["input_ids"]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_policy_loads_with_matching_special_tokens_and_room_for_long_prompts():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "policy")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "policy")
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.max_position_embeddings == 4096
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size


def test_judge_config_serves_both_loaders():
    config = json.loads((ASSETS / "judge" / "config.json").read_text(encoding="utf-8"))
    assert config["ranker_type"] == "pairranker"
    assert config["model_name"] is None
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "judge")
    assert config["source_prefix_id"] == tokenizer.convert_tokens_to_ids("<|source|>")
    assert config["cand1_prefix_id"] == tokenizer.convert_tokens_to_ids("<|candidate1|>")
    assert config["cand2_prefix_id"] == tokenizer.convert_tokens_to_ids("<|candidate2|>")
    assert config["sep_token_id"] == tokenizer.sep_token_id
    ids = tokenizer("<|source|>Hi")["input_ids"]
    assert [ids[0], ids[1], ids[-1]] == [tokenizer.cls_token_id, config["source_prefix_id"], config["sep_token_id"]]


# ---------------------------------------------------------------- what the models can do


def test_judge_agrees_with_the_oracle_on_fresh_heldout_pairs():
    judge, tokenizer = models.load_judge(ASSETS / "judge")
    quality = judge_training.measure_judge(judge, tokenizer, split_questions(seed=0).heldout, count=250, seed=20261121)
    assert quality.accuracy >= 0.90
    assert quality.order_consistency >= 0.90


def test_base_policy_is_mediocre_and_varied():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "policy")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "policy")
    prompts = [q.prompt for q in split_questions(seed=0).heldout[:64]]
    groups = training.sample_answers(model, tokenizer, prompts, k=5, seed=1)
    right = [oracle.is_right(prompt, answer) for prompt, group in zip(prompts, groups, strict=True) for answer in group]
    assert 0.3 <= sum(right) / len(right) <= 0.5
    assert sum(len(set(group)) for group in groups) / len(groups) >= 4.0


def test_quick_script_is_deterministic(tmp_path: Path):
    main = runpy.run_path(str(ROOT / "scripts" / "make_tiny_assets.py"))["main"]
    digests = []
    for name in ("first", "second"):
        main(["--quick", "--out", str(tmp_path / name)])
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        digests.append({str(f.relative_to(tmp_path / name)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    assert digests[0] == digests[1]
    shipped = {str(path.relative_to(ASSETS)) for path in ASSETS.rglob("*") if path.is_file()}
    assert set(digests[0]) == shipped
