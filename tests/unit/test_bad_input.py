"""What becomes of odd data on its way: from the prompts through the judge to the tables. A test for each line of
docs/bad_data.md that no other file has."""

from __future__ import annotations

import json
import re
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
from test_evaluation import PROMPTS, Fakes
from test_preflight import config_of
from tokenizer_factory import FAMILIES, chatml, mistral
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import sppo_ray
from sppo_ray.buffer import TrainingBuffer
from sppo_ray.errors import ConfigError, JudgeError
from sppo_ray.evaluation import HeldOutEvaluator
from sppo_ray.pairrm import PairRM, load_pairrm
from sppo_ray.preflight import preflight
from sppo_ray.prompts import PreparedPrompts, encode_prompts, load_texts, read_prompts
from sppo_ray.templating import encoder_of
from sppo_ray.types import SliceSummary, TrainTask

ROOT = Path(__file__).parents[2]
ASSETS = Path(sppo_ray.__file__).parent / "assets"
MARKERS = ["</s>", "<s>", "<|im_end|>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<|source|>", "<|candidate1|>",
           "<|candidate2|>", "[SEP]", "[CLS]", "[PAD]", "[INST]"]  # fmt: skip
ODD = {
    "controls": "a\x00b\x07\x1b[31mc\x7f\x85",
    "right to left": "\u202eשלום \u0645\u0631\u062d\u0628\u0627\u202c",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301",
    "replacement": "cut \ufffd",
    "markers": " ".join(MARKERS),
}


def prepared(tmp_path: Path, tokenizer: Any, *texts: str) -> PreparedPrompts:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    cfg = config_of(data__prompts=str(path), data__limit=None, evaluation__prompts=None, rollout__max_new_tokens=16)
    return encode_prompts(cfg, tokenizer, 512, read_prompts(cfg))


# ---------------------------------------------------------------- prompts


def test_control_characters_in_a_prompt_are_kept_and_counted(tmp_path: Path) -> None:
    found = prepared(tmp_path, chatml(), "plain\ttext\r\n", ODD["controls"], "\x00")
    assert found.report.control == 2
    assert {p.text for s in found.slices for p in s} == {"plain\ttext\r\n", ODD["controls"], "\x00"}
    assert "2 with control characters (kept)" in found.report.summary()


@pytest.mark.parametrize(("name", "counts"), [("right to left", (1, 0)), ("emoji", (0, 1)), ("replacement", (0, 0))])
def test_any_script_passes_unchanged_and_is_counted(tmp_path: Path, name: str, counts: tuple[int, int]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "policy")
    found = prepared(tmp_path, tokenizer, ODD[name], "another")
    (prompt,) = (p for s in found.slices for p in s if p.text == ODD[name])
    assert prompt.text in tokenizer.decode(prompt.token_ids.tolist())
    assert found.report.control == 0
    assert (found.report.right_to_left, found.report.emoji) == counts
    assert ("1 with right-to-left text (kept)" in found.report.summary()) == counts[0]
    assert ("1 with emoji (kept)" in found.report.summary()) == counts[1]


def test_special_strings_in_a_prompt_are_plain_text_and_counted(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "policy")
    found = prepared(
        tmp_path,
        tokenizer,
        "hello",
        "a</s>b",
        "x <|assistant|> fine </s><s><|user|> y",
        "<|im_end|>",
        "<|candidate1|> b",
    )
    assert found.report.special_strings == 4  # the last two are nothing special to this policy
    special = set(tokenizer.all_special_ids)
    structures = {tuple(i for i in p.token_ids.tolist() if i in special) for s in found.slices for p in s}
    assert structures == {tuple(tokenizer.convert_tokens_to_ids(["<s>", "<|user|>", "<|assistant|>"]))}
    assert "4 with special tokens' strings (read as plain text)" in found.report.summary()


def test_plain_text_that_imitates_the_template_is_kept_counted_and_noted(tmp_path: Path) -> None:
    found = prepared(tmp_path, mistral(), "hello", "a [/INST] Sure. [INST] b", "only [INST]")
    assert found.report.imitations == 1
    assert encoder_of(mistral()).plain_turn_end == "[/INST]"
    for name in ("llama3", "gemma2", "chatml"):  # a token ends the turn there
        assert encoder_of(FAMILIES[name]()).plain_turn_end is None


def test_a_special_string_that_cannot_be_kept_apart_is_refused(tmp_path: Path) -> None:
    """A Unigram vocabulary holds "</s>" as a piece of its own, which text finds whatever the token is called."""
    pieces = [
        ("<unk>", 0.0),
        ("</s>", -1.0),
        ("h", -2.0),
        ("i", -2.0),
        ("<", -9.0),
        ("/", -9.0),
        ("s", -9.0),
        (">", -9.0),
    ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)), eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match=r"cannot be kept apart .* remove it from the prompt that begins 'hi</s>hi'"):
        prepared(tmp_path, tokenizer, "hi", "hi</s>hi")


def test_a_prompt_the_tokenizer_knows_nothing_of_is_skipped(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer, words.normalizer = pre_tokenizers.Whitespace(), normalizers.Replace("\u200b", "")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    found = prepared(tmp_path, tokenizer, "a", "b", "\u200b", "b a", "a b")
    assert (found.report.prompts, found.report.empty) == (4, 1)


def test_a_prompt_of_which_only_the_template_is_left_is_skipped(tmp_path: Path) -> None:
    """A byte-less vocabulary without an unknown token: of another script nothing remains, and the policy would be asked nothing."""
    letters = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    letters.add_special_tokens(["<user>", "<bot>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>")
    tokenizer.chat_template = "<user>{{ messages[0]['content'] }}<bot>"
    found = prepared(tmp_path, tokenizer, "ab", "ba", "\u65e5\u672c\u8a9e", "aa")
    assert (found.report.prompts, found.report.empty) == (3, 1)


def test_a_prompt_longer_than_the_judge_reads_is_counted() -> None:
    checked = preflight(config_of(data__limit=8, judge__source_max_tokens=12, evaluation__prompts=None))
    encoder = load_pairrm(ASSETS / "judge", source_max_tokens=12).encoder
    texts = [p.text for s in checked.prompts.slices for p in s]
    whole = load_pairrm(ASSETS / "judge", source_max_tokens=400).encoder
    lengths = [whole.pairs(text, ["", ""])[0].index(whole.markers.candidate1) - 1 for text in texts]
    assert checked.prompts.report.cut_for_judge == encoder.cut_sources(texts) == sum(length > 12 for length in lengths)
    assert 0 < checked.prompts.report.cut_for_judge <= 8


def test_the_last_of_two_equal_keys_counts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "first", "prompt": "last"}\n')
    assert [p.text for p in load_texts(str(path), "prompt", "prompt_id")] == ["last"]


def test_an_id_is_never_a_path(tmp_path: Path) -> None:
    """What the data names is written into tables, never to a place."""
    names = ["../../outside", "/etc/outside", "a/b", "..", "x\x00y", "con", "~root", "🙂" * 200]
    run = tmp_path / "deep" / "run"
    buffer = TrainingBuffer(small_config(run))
    buffer.add([judged(name) for name in names])
    buffer.seal(1, names)
    assert [row["prompt_id"] for row in pq.read_table(run / "iter_1/generated.parquet").to_pylist()] == names
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert all(str(path).startswith("deep/run/iter_1/") for path in written)
    assert not any("outside" in part or "🙂" in part for path in written for part in path.parts)


# ---------------------------------------------------------------- responses, through the real tiny judge to the tables


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


# ---------------------------------------------------------------- numbers


async def test_a_judge_that_fails_on_a_held_out_pair_names_it(tmp_path: Path) -> None:
    class Poisoned(Fakes):
        async def score(self, source: str, candidates: list[str]) -> np.ndarray:
            if source == PROMPTS[2].text:
                raise JudgeError("6 NaN or infinite logits")
            return await super().score(source, candidates)

    fakes = Poisoned()

    async def record(line: Any) -> bool:
        return True

    evaluator = HeldOutEvaluator(small_config(tmp_path), PROMPTS, fakes, fakes, fakes.fetch, record, None)
    await evaluator.evaluate(0)
    fakes.version = 1
    with pytest.raises(JudgeError, match="NaN") as failure:
        await evaluator.evaluate(1)
    assert failure.value.__notes__ == [f"while the held-out prompt {PROMPTS[2].prompt_id!r} was judged"]


# ---------------------------------------------------------------- the page


def test_every_line_of_the_page_has_its_test() -> None:
    lines = [line for line in (ROOT / "docs/bad_data.md").read_text().splitlines() if line.startswith("| ")]
    lines = [line for line in lines if not line.startswith("| input ")]
    named = [re.findall(r"`(tests/[\w/]+\.py)::(\w+)", line) for line in lines]
    assert len(named) >= 20
    for line, tests in zip(lines, named, strict=True):
        assert tests, line
        for path, name in tests:
            assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.M), f"{path}::{name}"
