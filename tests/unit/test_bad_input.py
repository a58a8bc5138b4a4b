"""What becomes of odd prompts and numbers on their way; responses are in test_bad_responses.py. A test for each line of
docs/bad_data.md that no other file has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from groups import config as small_config
from groups import judged
from test_evaluation import PROMPTS, Fakes
from test_preflight import config_of
from tokenizer_factory import FAMILIES, chatml, mistral
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import sppo_ray
from sppo_ray.buffer import TrainingBuffer
from sppo_ray.errors import ConfigError, JudgeError
from sppo_ray.evaluation import HeldOutEvaluator
from sppo_ray.pairrm import load_pairrm
from sppo_ray.preflight import preflight
from sppo_ray.prompts import PreparedPrompts, encode_prompts, load_texts, read_prompts
from sppo_ray.templating import encoder_of

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
