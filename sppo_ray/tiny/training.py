"""How the base policy of the toy world learns, and the optimiser that judge training shares.

Everything random is drawn from explicitly seeded generators, so the same machine makes the same bytes.
"""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sppo_ray.tiny.domain import FACTS, Fact, Question, Style, compose_answer
from sppo_ray.tiny.models import padded

Report = Callable[[str], None]

# The base policy is mediocre on purpose: there must be something to learn. It is about as long-winded as a good answer,
# with useless sentences where a good answer has useful ones, so better need not mean much longer.
BASE_STYLE = Style(polite=0.25, rude=0.2, hedge=0.3, duplicate=0.15, reason=0.35, off_topic=0.3, closing=0.3)


def believed_answer(fact: Fact, rng: random.Random) -> str:
    """What the base policy says. It holds one misconception per fact; for every second fact it prefers it to the truth.

    So greedy decoding errs as well as sampling, and learning shows in both.
    """
    index = FACTS.index(fact)
    wrong = fact.wrong_answers()
    misconception = wrong[index % len(wrong)]
    right_share, misconception_share = (0.50, 0.25) if index % 2 else (0.32, 0.45)
    draw = rng.random()
    if draw < right_share:
        return fact.answer
    return misconception if draw < right_share + misconception_share else rng.choice(wrong)


def base_answer(fact: Fact, rng: random.Random) -> str:
    return compose_answer(fact, believed_answer(fact, rng), BASE_STYLE, rng)


def _policy_batch(
    tokenizer: PreTrainedTokenizerFast, chats: Sequence[tuple[str, str]]
) -> tuple[Tensor, Tensor, Tensor]:
    """(prompt, answer) -> input ids, mask, labels, each [chats, tokens]; only answer and EOS are labelled."""
    rows, labels = [], []
    for prompt, answer in chats:
        turns = [{"role": "user", "content": prompt}]
        head = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        tail = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append(head + tail)
        labels.append([-100] * len(head) + tail)
    return padded(rows, tokenizer.pad_token_id), padded([[1] * len(row) for row in rows], 0), padded(labels, -100)


def optimise(
    model: torch.nn.Module, lr: float, steps: int, loss_of_step: Callable[[int], Tensor], name: str, report: Report
) -> None:
    """AdamW with a short warm-up and a cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps + 1, pct_start=0.05)
    model.train()
    recent: list[float] = []
    for step in range(steps):
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if len(recent) == 50 or step == steps - 1:
            report(f"{name}: step {step + 1}/{steps} loss {sum(recent) / len(recent):.3f}")
            recent.clear()
    model.eval()


def train_policy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    steps: int,
    seed: int,
    report: Report,
) -> None:
    """Next-token training on the base policy's answers."""
    rng = random.Random(f"policy-{seed}")

    def loss_of_step(_: int) -> Tensor:
        asked = [rng.choice(questions) for _ in range(64)]
        chats = [(q.prompt, base_answer(q.fact, rng)) for q in asked]
        ids, mask, labels = _policy_batch(tokenizer, chats)
        loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return loss

    optimise(model, 3e-3, steps, loss_of_step, "policy", report)


@torch.no_grad()
def sample_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], k: int, seed: int
) -> list[list[str]]:
    """k answers to each prompt at temperature 1, as text without special tokens."""
    tokenizer.padding_side = "left"
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    batch = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(seed)
    out = model.generate(
        **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=64, num_return_sequences=k
    )
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [texts[i : i + k] for i in range(0, len(texts), k)]
