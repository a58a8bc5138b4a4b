"""How the judge of the toy world learns the oracle's rule, and how well it did.

Like PairRM it starts from an encoder that has read: without the masked-token lesson it never learns which answers are
right, since neither the subject nor the answer alone says so.
"""

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from sppo_ray.tiny import oracle
from sppo_ray.tiny.domain import (
    CLOSINGS,
    FACTS,
    HEDGES,
    OFF_TOPIC,
    POLITE,
    RUDE,
    Fact,
    Question,
    Style,
    compose_answer,
    sentences_of,
)
from sppo_ray.tiny.models import CAND1, CAND2, SOURCE, TinyPairRM, encode_pairs, padded
from sppo_ray.tiny.training import Report, base_answer, optimise

PLAIN = Style(polite=0.0, rude=0.0, hedge=0.0, duplicate=0.0, reason=0.0, off_topic=0.0, closing=0.0)


@dataclass(frozen=True)
class JudgedPair:
    prompt: str
    left: str
    right: str
    left_score: float  # oracle's
    right_score: float


def _random_style(rng: random.Random) -> Style:
    """A style of random quality, from all good sentences to all bad ones: policies in training get better than base."""
    good, bad = rng.random(), rng.random()
    return Style(
        polite=0.8 * good,
        rude=(1 - 0.8 * good) * bad * 0.6,
        hedge=0.6 * bad,
        duplicate=0.3 * bad,
        reason=0.2 + 0.7 * good,
        off_topic=0.6 * bad,
        closing=0.9 * good,
    )


def _corrupted(text: str, rng: random.Random) -> str:
    """Text as a policy that goes astray would write it, so that junk does not look good to the judge."""
    words, sentences = text.split(), sentences_of(text)
    match rng.randrange(6):
        case 0:
            return " ".join(words[: rng.randrange(len(words))])
        case 1:
            rng.shuffle(words)
            return " ".join(words)
        case 2:
            return " ".join(word for word in words if rng.random() < 0.7)
        case 3:
            position = rng.randrange(len(sentences))
            sentences[position:position] = [rng.choice(sentences)] * rng.randint(1, 3)
            return " ".join(sentence.capitalize() for sentence in sentences)
        case 4:
            noise = "".join(rng.choices(string.ascii_letters + "    .,", k=rng.randint(1, 40)))
            position = rng.randrange(len(words) + 1)
            return " ".join([*words[:position], noise, *words[position:]])
        case _:
            other = rng.choice(FACTS)
            return text + " " + compose_answer(other, other.answer, _random_style(rng), rng)


def _judged(prompt: str, left: str, right: str) -> JudgedPair:
    return JudgedPair(prompt, left, right, oracle.score(prompt, left), oracle.score(prompt, right))


def _fact_pair(question: Question, rng: random.Random) -> JudgedPair:
    """A right answer against a wrong one, both plain or both dressed by chance."""
    wrong = rng.choice(question.fact.wrong_answers())
    style = PLAIN if rng.random() < 0.7 else _random_style(rng)
    answers = [compose_answer(question.fact, answer, style, rng) for answer in (question.fact.answer, wrong)]
    rng.shuffle(answers)
    return _judged(question.prompt, *answers)


def _short_pair(question: Question, rng: random.Random) -> JudgedPair:
    """Two single sentences, each a statement or part of an answer's dressing."""
    answers = []
    for _ in range(2):
        if rng.random() < 0.5:
            answer = rng.choice([question.fact.answer, rng.choice(question.fact.wrong_answers())])
            answers.append(compose_answer(question.fact, answer, PLAIN, rng))
        else:
            answers.append(rng.choice(rng.choice([POLITE, RUDE, HEDGES, OFF_TOPIC, CLOSINGS])))
    return _judged(question.prompt, *answers)


def _free_answer(fact: Fact, rng: random.Random) -> str:
    if rng.random() < 0.3:
        text = base_answer(fact, rng)
    else:
        answer = fact.answer if rng.random() < 0.5 else rng.choice(fact.wrong_answers())
        text = compose_answer(fact, answer, _random_style(rng), rng)
    return _corrupted(text, rng) if rng.random() < 0.15 else text


def draw_pair(question: Question, fact_share: float, rng: random.Random) -> JudgedPair:
    """One labelled pair; `fact_share` is the chance that it is about the fact itself."""
    if rng.random() < fact_share:
        return _fact_pair(question, rng)
    return _judged(question.prompt, _free_answer(question.fact, rng), _free_answer(question.fact, rng))


def _masked_batch(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question], rng: random.Random
) -> tuple[Tensor, Tensor, Tensor]:
    """True prompt-answer texts with a quarter of the words hidden: hidden ids, mask, original ids, each [64, tokens]."""
    asked = [rng.choice(questions) for _ in range(64)]
    style = replace(PLAIN, reason=0.3)
    answers = [rng.choice([CAND1, CAND2]) + compose_answer(q.fact, q.fact.answer, style, rng) for q in asked]
    encoded = tokenizer([SOURCE + q.prompt for q in asked] + answers)["input_ids"]
    rows = [encoded[i] + encoded[64 + i] for i in range(64)]
    special = set(tokenizer.all_special_ids)
    words = [token for row in rows for token in row if token not in special]
    hidden_rows = []
    for row in rows:
        hide = [token not in special and rng.random() < 0.25 for token in row]
        # Byte-level BPE never yields [UNK], so it can serve as the mask. Some words are swapped for others instead: a
        # judge must doubt the words that it sees.
        swap = [rng.choice(words) if rng.random() < 0.25 else tokenizer.unk_token_id for _ in row]
        hidden_rows.append([s if h else token for token, h, s in zip(row, hide, swap, strict=True)])
    return padded(hidden_rows, tokenizer.pad_token_id), padded([[1] * len(r) for r in rows], 0), padded(rows, 0)


def pretrain_judge(
    model: TinyPairRM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    steps: int,
    seed: int,
    report: Report,
) -> None:
    """The encoder learns to restore hidden words, hence the facts, before it is asked for preferences."""
    rng = random.Random(f"pretrain-{seed}")
    encoder = model.pretrained_model

    def loss_of_step(_: int) -> Tensor:
        hidden, mask, original = _masked_batch(tokenizer, questions, rng)
        at = (hidden != original) & (mask == 1)
        states = encoder(input_ids=hidden, attention_mask=mask).last_hidden_state[at]  # [hidden words, hidden size]
        return functional.cross_entropy(states @ encoder.embeddings.word_embeddings.weight.T, original[at])

    optimise(model, 2e-3, steps, loss_of_step, "judge, reading", report)


def _judge_batches(questions: Sequence[Question], steps: int, rng: random.Random) -> Iterator[list[JudgedPair]]:
    """Batches of 48 pairs, four at a time sorted by length: a batch of mixed lengths would be nearly half padding.

    Single sentences and facts come first: on whole answers the judge finds out only slowly which words belong to which
    candidate, and style, which is easy, would drown the facts.
    """
    for step in range(0, steps, 4):
        short_share, fact_share = (0.3, 0.9) if step < 0.25 * steps else (0.05, 0.15)
        pool = []
        for _ in range(4 * 48):
            question = rng.choice(questions)
            short = rng.random() < short_share
            pool.append(_short_pair(question, rng) if short else draw_pair(question, fact_share, rng))
        pool.sort(key=lambda pair: len(pair.prompt + pair.left + pair.right))
        batches = [pool[i : i + 48] for i in range(0, len(pool), 48)]
        rng.shuffle(batches)
        yield from batches


def train_judge(
    model: TinyPairRM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    steps: int,
    seed: int,
    report: Report,
) -> None:
    """Imitate the oracle: the pair's logit its preference, and each head its score, which steadies the training."""
    batches = _judge_batches(questions, steps, random.Random(f"judge-{seed}"))

    def loss_of_step(_: int) -> Tensor:
        pairs = next(batches)
        left, right = model(*encode_pairs(tokenizer, [(p.prompt, p.left, p.right) for p in pairs]))
        left_true = torch.tensor([p.left_score for p in pairs])
        right_true = torch.tensor([p.right_score for p in pairs])
        preference = functional.binary_cross_entropy_with_logits(left - right, torch.sigmoid(left_true - right_true))
        scores = functional.smooth_l1_loss(left, left_true) + functional.smooth_l1_loss(right, right_true)
        return preference + 0.3 * scores

    optimise(model, 1e-3, steps, loss_of_step, "judge, preferences", report)


@torch.no_grad()
def pair_logits(model: TinyPairRM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str, str]]) -> Tensor:
    """PairRM's logits of (prompt, left, right) triples: [pairs], positive where left is preferred."""
    chunks = [pairs[i : i + 64] for i in range(0, len(pairs), 64)]
    scores = [model(*encode_pairs(tokenizer, chunk)) for chunk in chunks]
    return torch.cat([left - right for left, right in scores])


@dataclass(frozen=True)
class JudgeQuality:
    accuracy: float  # share of pairs on which judge and oracle prefer the same answer
    fact_accuracy: float  # the same on pairs of a right and a wrong answer
    order_consistency: float  # share of pairs with the same preference when left and right are swapped


def measure_judge(
    model: TinyPairRM, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question], count: int, seed: int
) -> JudgeQuality:
    """On fresh pairs that the oracle does not call equal, both orders counted, so that a side bias is an error."""
    rng = random.Random(f"measure-{seed}")

    def measured(fact_share: float) -> tuple[float, float]:
        drawn = [draw_pair(rng.choice(questions), fact_share, rng) for _ in range(count)]
        pairs = [p for p in drawn if abs(p.left_score - p.right_score) > 1e-6]
        truth = torch.tensor([p.left_score > p.right_score for p in pairs])
        forward = pair_logits(model, tokenizer, [(p.prompt, p.left, p.right) for p in pairs]) > 0
        backward = pair_logits(model, tokenizer, [(p.prompt, p.right, p.left) for p in pairs]) < 0
        hits = torch.cat([forward == truth, backward == truth])
        return hits.float().mean().item(), (forward == backward).float().mean().item()

    accuracy, consistency = measured(fact_share=0.0)
    return JudgeQuality(accuracy, measured(fact_share=1.0)[0], consistency)
