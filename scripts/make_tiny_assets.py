"""Make the embedded tiny policy, judge and prompts: `python scripts/make_tiny_assets.py` writes sppo_ray/assets/.

Seeded and single-threaded, so the same machine makes the same bytes. About 20 minutes; `--quick` makes an untrained
set of the same shape in seconds, for tests.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sppo_ray.tiny import judge_training, models, oracle, training
from sppo_ray.tiny.domain import Question, Split, split_questions

ASSETS = Path(__file__).resolve().parent.parent / "sppo_ray" / "assets"


@dataclass(frozen=True)
class Effort:
    policy_steps: int
    reading_steps: int
    judge_steps: int
    measured_prompts: int
    measured_pairs: int


FULL = Effort(policy_steps=1300, reading_steps=350, judge_steps=2200, measured_prompts=256, measured_pairs=2000)
QUICK = Effort(policy_steps=2, reading_steps=2, judge_steps=2, measured_prompts=2, measured_pairs=8)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two training steps only: the right files, useless models")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)  # the order of a threaded sum, hence the bytes, would depend on the machine's load
    effort = QUICK if args.quick else FULL
    split = split_questions(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    write_prompts(split.train, "train", args.out)
    write_prompts(split.heldout, "heldout", args.out)
    corpus = make_corpus(split, args.seed)
    numbers = make_policy(split, corpus, effort, args.seed, args.out / "policy")
    numbers |= make_judge(split, corpus, effort, args.seed, args.out / "judge")
    write_readme(numbers, split, args.out / "README.md")
    for name, value in numbers.items():
        print(f"{name}: {value}")


def write_prompts(questions: Sequence[Question], part: str, out: Path) -> None:
    rows = [{"prompt_id": f"tiny/{part}/{i:04d}", "prompt": q.prompt} for i, q in enumerate(questions, start=1)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (out / f"prompts_{part}.jsonl").write_text(text, encoding="utf-8")


def make_corpus(split: Split, seed: int) -> list[str]:
    """Text of the toy world, from which both tokenizers learn their merges."""
    rng = random.Random(f"corpus-{seed}")
    questions = split.train + split.spare
    return [q.prompt for q in questions] + [training.base_answer(q.fact, rng) for q in questions]


def make_policy(split: Split, corpus: list[str], effort: Effort, seed: int, out: Path) -> dict[str, float]:
    torch.manual_seed(seed)
    tokenizer = models.build_policy_tokenizer(corpus)
    model = models.build_policy(tokenizer)
    training.train_policy(model, tokenizer, split.train + split.spare, effort.policy_steps, seed, progress())
    models.save_policy(model, tokenizer, out)
    return measure_policy(model, tokenizer, split.heldout[: effort.measured_prompts], seed)


def measure_policy(
    model: models.LlamaForCausalLM, tokenizer: models.PreTrainedTokenizerFast, asked: Sequence[Question], seed: int
) -> dict[str, float]:
    """The base policy on held-out prompts, five answers each at temperature 1."""
    prompts = [q.prompt for q in asked]
    groups = training.sample_answers(model, tokenizer, prompts, k=5, seed=seed)
    answers = [(prompt, answer) for prompt, group in zip(prompts, groups, strict=True) for answer in group]
    lengths = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for _, answer in answers]
    return {
        "policy parameters": model.num_parameters(),
        "policy: share of right facts": mean([oracle.is_right(*answer) for answer in answers]),
        "policy: unique answers of 5": mean([len(set(group)) for group in groups]),
        "policy: mean oracle score": mean([oracle.score(*answer) for answer in answers]),
        "policy: junk rate": mean([oracle.is_junk(*answer) for answer in answers]),
        "policy: mean tokens": mean(lengths),
    }


def make_judge(split: Split, corpus: list[str], effort: Effort, seed: int, out: Path) -> dict[str, float]:
    torch.manual_seed(seed)
    tokenizer = models.build_judge_tokenizer(corpus)
    model = models.build_judge(tokenizer)
    questions, report = split.train + split.spare, progress()
    judge_training.pretrain_judge(model, tokenizer, questions, effort.reading_steps, seed, report)
    judge_training.train_judge(model, tokenizer, questions, effort.judge_steps, seed, report)
    models.save_judge(model, tokenizer, out)
    quality = judge_training.measure_judge(model, tokenizer, split.heldout, effort.measured_pairs, seed)
    return {
        "judge parameters": model.num_parameters(),
        "judge: held-out accuracy": round(quality.accuracy, 3),
        "judge: held-out accuracy, right against wrong fact": round(quality.fact_accuracy, 3),
        "judge: order consistency": round(quality.order_consistency, 3),
    }


def mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 3)


def progress() -> training.Report:
    start = time.monotonic()
    return lambda message: print(f"[{time.monotonic() - start:5.0f} s] {message}", flush=True)


def write_readme(numbers: dict[str, float], split: Split, path: Path) -> None:
    table = "\n".join(f"| {name} | {value} |" for name, value in numbers.items())
    path.write_text(README.format(table=table, train=len(split.train), heldout=len(split.heldout)), encoding="utf-8")


README = """\
# The embedded tiny default

A toy world in which the whole of SPPO runs in minutes on two CPU cores. Written by `scripts/make_tiny_assets.py`; the
world and the rule by which its answers are good or bad are in `sppo_ray/tiny/`. Licence: Apache-2.0, as the project.
Everything here was made from scratch; no outside model or data set went in.

- `policy/`: a Llama-architecture chat policy with its own byte-level BPE tokenizer and chat template.
- `judge/`: a PairRM-architecture judge (DeBERTa-v2). Loads as `DebertaV2PairRM` and with llm-blender's `Blender`.
- `prompts_train.jsonl`: {train} prompts, 28 wordings of each of 73 facts.
- `prompts_heldout.jsonl`: {heldout} prompts, 4 other wordings of each fact, in no training data.

Measured on the held-out prompts. Policy: five answers a prompt at temperature 1. Judge: fresh pairs labelled by the
oracle, both orders counted; a right against a wrong fact may be dressed differently, and the oracle's total decides.

| | |
|---|---|
{table}

## Honest limits
- Held-out prompts are new wordings of *seen* facts. The world tests the machinery and the direction of learning, and
  says nothing about general ability.
- The base policy is mediocre on purpose: about 40 % of its answers are right, and for half the facts it prefers a
  misconception to the truth.
- The oracle rewards a polite opener, a reason and a closing, so better answers tend to be longer: read win rates
  together with lengths.
- The judge imitates the oracle and is not it. Report both, and the junk rate: a policy can please only one.
- The judge reads the raw prompt (`judge.source: raw`), never a chat template.
- Text from outside the toy world encodes without loss, byte by byte, but the models make nothing of it.
"""


if __name__ == "__main__":
    main()
