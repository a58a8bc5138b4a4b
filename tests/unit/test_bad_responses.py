"""What becomes of odd responses on their way, through the real tiny judge to the tables. A test for each line of
docs/bad_data.md that no other file has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from groups import config as small_config
from groups import judged
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import ASSETS, MARKERS, ODD
from tokenizer_factory import FAMILIES

from sppo_ray.buffer import TrainingBuffer
from sppo_ray.pairrm import PairRM, load_pairrm
from sppo_ray.types import SliceSummary, TrainTask


@pytest.fixture(scope="module")
def judge() -> Iterator[PairRM]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_pairrm(ASSETS / "judge", candidate_max_tokens=64)
    torch.set_num_threads(before)


def sealed(run: Path, judge: PairRM, *texts: str) -> tuple[TrainingBuffer, SliceSummary, dict[str, Any]]:
    """One group with these responses: (buffer, counts, the row of generated.parquet)."""
    group = judged("p", k=len(texts)).group
    group = replace(group, responses=tuple(replace(r, text=t) for r, t in zip(group.responses, texts, strict=True)))
    logits = judge.logits(group.prompt.text, texts)
    assert np.isfinite(logits).all()
    buffer = TrainingBuffer(small_config(run, rollout__responses_per_prompt=len(texts), schedule__iterations=1))
    cut = judge.encoder.cut_candidates(group.prompt.text, texts)
    buffer.add([replace(judged("p", k=len(texts)), group=group, logits=logits, cut=cut)])
    summary = buffer.seal(1, ["p"])
    return buffer, summary, pq.read_table(run / "iter_1/generated.parquet").to_pylist()[0]


def test_an_empty_response_is_kept_and_counted(tmp_path: Path, judge: PairRM) -> None:
    _, summary, row = sealed(tmp_path, judge, "", " \n", "an answer")
    assert (summary.examples, summary.empty_responses) == (1, 2)
    assert [row[f"generate_{k}"][1]["content"] for k in range(3)] == ["", " \n", "an answer"]
    assert json.loads((tmp_path / "iter_1/sealed.json").read_text())["empty_responses"] == 2


def test_identical_responses_are_kept_counted_and_teach_nothing(tmp_path: Path, judge: PairRM) -> None:
    buffer, summary, row = sealed(tmp_path, judge, *["the same"] * 5)
    assert (summary.examples, summary.identical_groups) == (1, 1)
    assert row["p_hat"] == pytest.approx([0.5] * 5, abs=1e-6)  # so the targets, eta * (P_hat - 1/2), are zero
    buffer.release(1)
    buffer.record_reference(1, [(-1.0, -1.0)])
    task = buffer.next_task(0)
    assert isinstance(task, TrainTask)
    assert task.examples[0].p_hat == pytest.approx((0.5, 0.5), abs=1e-6)


def test_a_response_of_20000_characters_is_kept_whole_and_judged_by_its_beginning(
    tmp_path: Path, judge: PairRM
) -> None:
    long = "Because it is so, and that is all there is to say. " * 400
    assert len(long) > 20_000
    _, summary, row = sealed(tmp_path, judge, long, "short", "x" * 20_000)
    assert (summary.cut_responses, row["cut_responses"]) == (2, 2)
    assert row["generate_0"][1]["content"] == long
    other_end = judge.logits("q", [long + "unseen", "short"])
    assert other_end.tobytes() == judge.logits("q", [long + "another end", "short"]).tobytes()


def test_a_response_counts_as_cut_from_the_first_token_that_the_judge_does_not_see(judge: PairRM) -> None:
    """Independently of the count: the ids of a pair stop growing with the text."""
    texts = ["a " * words for words in range(600, 720)]
    lengths = [len(judge.encoder.pairs("q", [text, "b"])[0]) for text in texts]
    limit = lengths.index(max(lengths))  # exactly as long as it may be
    assert 0 < limit < len(texts) - 1
    assert [judge.encoder.cut_candidates("q", [text]) for text in texts] == [int(n > limit) for n in range(len(texts))]


def test_odd_characters_in_responses_reach_the_tables_unchanged_and_are_counted(tmp_path: Path, judge: PairRM) -> None:
    _, summary, _ = sealed(tmp_path, judge, *ODD.values())
    assert (summary.control_responses, summary.broken_responses, summary.special_responses) == (1, 1, 1)
    assert (summary.right_to_left_responses, summary.emoji_responses) == (1, 1)
    row = pq.read_table(tmp_path / "iter_1/generated.parquet").to_pylist()[0]
    assert [row[f"generate_{k}"][1]["content"] for k in range(len(ODD))] == list(ODD.values())
    train = pq.read_table(tmp_path / "iter_1/train.parquet").to_pylist()[0]
    assert {train["chosen"][1]["content"], train["rejected"][1]["content"]} <= set(ODD.values())


TOKENIZERS = {name: make() for name, make in FAMILIES.items()}
bounded = settings(max_examples=60, derandomize=True)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_response_never_holds_a_lone_surrogate(name: str) -> None:
    """Whatever tokens are sampled, bytes that are no character become U+FFFD: Arrow can hold the text."""
    tokenizer = TOKENIZERS[name]

    @bounded
    @given(ids=st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    def check(ids: list[int]) -> None:
        tokenizer.decode(ids, skip_special_tokens=True).encode("utf-8")

    check()


PIECES = st.sampled_from([*MARKERS, "<|candidate|>", "[UNK]", "[MASK]", " ", "a", "\u202e", "\x00", "\ud800", "\ufdd0"])
FORGED = st.lists(PIECES, max_size=6).map("".join)


@bounded
@given(source=FORGED, texts=st.lists(FORGED, min_size=2, max_size=3))
def test_a_response_cannot_forge_the_judges_structure(judge: PairRM, source: str, texts: list[str]) -> None:
    m = judge.encoder.markers
    structure = [m.cls, m.source, m.sep, m.cls, m.candidate1, m.sep, m.cls, m.candidate2, m.sep]
    special = {*structure, m.pad, m.candidate}
    pairs = judge.encoder.pairs(source, texts)
    assert len(pairs) == len(texts) * (len(texts) - 1)
    for ids in pairs:
        assert [token for token in ids if token in special] == structure


def test_training_uses_the_sampled_ids_whatever_the_text_spells(tmp_path: Path, judge: PairRM) -> None:
    texts = [f"{marker} {number} </s>" for number, marker in enumerate(MARKERS)]
    buffer, summary, _ = sealed(tmp_path, judge, *texts)
    assert summary.special_responses == len(texts)
    buffer.release(1)
    buffer.record_reference(1, [(-1.0, -1.0)])
    task = buffer.next_task(0)
    assert isinstance(task, TrainTask)
    sampled = [response.token_ids.tolist() for response in judged("p", k=len(texts)).group.responses]
    (pair,) = pq.read_table(tmp_path / "iter_1/train.parquet").to_pylist()
    picked = [texts.index(pair[which][1]["content"]) for which in ("chosen", "rejected")]
    assert [ids.tolist() for ids in task.examples[0].response_ids] == [sampled[i] for i in picked]
