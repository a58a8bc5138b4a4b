"""Texts -> token ids of all ordered pairs of a group: three segments, encoded apart and joined. No torch here.

    [CLS]<|source|>x[SEP][CLS]<|candidate1|>a[SEP][CLS]<|candidate2|>b[SEP]

The limits are llm-blender's (pair_ranker/collator.py CrossCompareCollator, blender/blender_utils.py tokenize_pair),
computed for this group alone: the source is cut to S tokens, each candidate to C + (S - len(source)) // 2, with the
special tokens counted.

Departures from llm-blender:
1. Data cannot forge structure. llm-blender looks for `<|candidate1|>` and the like inside the texts too, so a response
   could write itself a second candidate (and `[SEP]` is turned into a space). Here texts go through a tokenizer that
   knows no added tokens: such strings are plain characters. For texts without them the ids are llm-blender's, which is
   checked on a few probes whenever a tokenizer is loaded.
2. Lone surrogates become U+FFFD (tokenizers refuse them), and so does the noncharacter U+FDD0, used below.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sppo_ray.errors import ConfigError
from sppo_ray.pairrm.checkpoint import (
    MIN_TOKENS,
    PREFIX_TOKENS,
    PairRMInfo,
    base_folder,
    check_tokenizer_files,
    refusal,
    refuse,
)
from sppo_ray.tokenizer_errors import tokenizer_errors

_UNREACHABLE = "\ufdd0"  # a Unicode noncharacter, "intended for process-internal use"; never left in a text
_PROBES = (
    "",
    "hello",
    "Two words, 1 + 1 = 2.",
    " leading",
    "trailing \n",
    "a\n\n b\tc  d",
    "café 日本語 🙂",
    "<b>&[x]|",
)


@dataclass(frozen=True, slots=True)
class Markers:
    """Token ids of the structure."""

    cls: int
    sep: int
    pad: int
    source: int
    candidate1: int
    candidate2: int
    candidate: int  # llm-blender's placeholder before it knows left from right; never in our input


class PairEncoder:
    """Encodes groups for one checkpoint."""

    def __init__(self, tokenizer: Any, folder: Path, source_max_tokens: int, candidate_max_tokens: int) -> None:
        """`tokenizer`: a transformers tokenizer that has the four prefix tokens."""
        self.markers = _markers(tokenizer, folder)
        self.source_max_tokens = source_max_tokens
        self.candidate_max_tokens = candidate_max_tokens
        self._texts = _plain_text_tokenizer(tokenizer)
        self._check_tokenizer(tokenizer, folder)

    def pairs(self, source: str, candidates: Sequence[str]) -> list[list[int]]:
        """Token ids of the K(K-1) ordered pairs (left i, right j), i != j, by i then j."""
        m = self.markers
        prompt = self._segment(m.source, source, self.source_max_tokens)
        limit = self._candidate_limit(prompt)
        left = [self._segment(m.candidate1, text, limit) for text in candidates]
        right = [[m.cls, m.candidate2, *ids[2:]] for ids in left]
        indices = range(len(candidates))
        return [prompt + left[i] + right[j] for i in indices for j in indices if i != j]

    def cut_sources(self, sources: Sequence[str]) -> int:
        """How many of the texts are longer than the source may be, and are read up to the limit."""
        return self._longer(sources, self.source_max_tokens)

    def cut_candidates(self, source: str, candidates: Sequence[str]) -> int:
        """How many of the candidates are longer than they may be beside this source."""
        prompt = self._segment(self.markers.source, source, self.source_max_tokens)
        return self._longer(candidates, self._candidate_limit(prompt))

    def _candidate_limit(self, prompt: list[int]) -> int:
        """A short source leaves its room to the two candidates."""
        return self.candidate_max_tokens + (self.source_max_tokens - len(prompt)) // 2

    def _longer(self, texts: Sequence[str], limit: int) -> int:
        """How many texts `_segment` would cut."""
        encoded = self._texts.encode_batch([_clean(text) for text in texts], add_special_tokens=False)
        return sum(len(one.ids) > limit - MIN_TOKENS + 1 for one in encoded)

    def _segment(self, marker: int, text: str, limit: int) -> list[int]:
        """[CLS] marker text [SEP], the text's end cut so that all is at most `limit` tokens."""
        ids = self._texts.encode(_clean(text), add_special_tokens=False).ids
        return [self.markers.cls, marker, *ids[: limit - MIN_TOKENS + 1], self.markers.sep]

    def _check_tokenizer(self, tokenizer: Any, folder: Path) -> None:
        """Our ids equal the tokenizer's own, and no special token can be written in plain text."""
        for probe in _PROBES:
            ours = self._segment(self.markers.source, probe, limit=1_000)
            theirs = tokenizer.encode("<|source|>" + probe)
            if ours != theirs:
                found = (
                    f"its tokenizer encodes '<|source|>' + {probe!r} as {theirs}, not [CLS] prefix text [SEP]: {ours}"
                )
                refuse(folder, found, "Use the tokenizer of the checkpoint")
        special = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
        special.pop(tokenizer.unk_token_id, None)
        for text in special.values():
            if not special.keys().isdisjoint(self._texts.encode(text, add_special_tokens=False).ids):
                found = f"its tokenizer's vocabulary turns the plain text {text!r} into a special token"
                refuse(folder, found, "Train the tokenizer on text without special tokens")


def load_encoder(
    info: PairRMInfo, source_max_tokens: int | None = None, candidate_max_tokens: int | None = None
) -> PairEncoder:
    """The encoder of a PairRM folder; limits instead of the checkpoint's. Raises NotAPairRM for a tokenizer that does not
    load or is not the checkpoint's.

    hf: the folder's tokenizer. blender: the backbone's, with the prefix tokens added in llm-blender's order.
    """
    from transformers import AutoTokenizer

    base = base_folder(info)
    check_tokenizer_files(base)

    def refused(why: str) -> ConfigError:
        found = f"its tokenizer does not load ({why})"
        return refusal(info.folder, found, "Copy the tokenizer's files again from their origin")

    source, candidate = source_max_tokens or info.source_max_tokens, candidate_max_tokens or info.candidate_max_tokens
    with tokenizer_errors(refused):
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        if not tokenizer.is_fast:
            refuse(info.folder, "its tokenizer has no fast (Rust) backend", "Save it once with tokenizer.json")
        if info.kind == "blender":
            tokenizer.add_tokens(list(PREFIX_TOKENS))
        return PairEncoder(tokenizer, info.folder, source, candidate)


def _markers(tokenizer: Any, folder: Path) -> Markers:
    vocabulary = tokenizer.get_vocab()
    ids = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]
    ids += [vocabulary.get(token) for token in PREFIX_TOKENS]
    if None in ids:
        names = ["cls_token", "sep_token", "pad_token", *PREFIX_TOKENS]
        absent = ", ".join(name for name, index in zip(names, ids, strict=True) if index is None)
        refuse(folder, f"its tokenizer has no {absent}", "Use the tokenizer of the checkpoint")
    return Markers(*ids)


def _plain_text_tokenizer(tokenizer: Any) -> Tokenizer:
    """The tokenizer without its added tokens: it gives for a text what the original gives after a prefix token."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"] for token in state["added_tokens"]}
    state |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    if state["model"]["type"] == "Unigram":  # matches any piece of its vocabulary, [SEP] of DeBERTa-v3 included
        state["model"]["vocab"] = [
            [f"{_UNREACHABLE}{index}" if piece in added else piece, score]
            for index, (piece, score) in enumerate(state["model"]["vocab"])
        ]
    _never_first(state["pre_tokenizer"])
    return Tokenizer.from_str(json.dumps(state))


def _never_first(pre_tokenizer: dict[str, Any] | None) -> None:
    """A text follows its prefix token, so Metaspace's "add a space to the first piece only" must not apply to it."""
    if pre_tokenizer is None:
        return
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"


def _clean(text: str) -> str:
    """Lone surrogates and the reserved noncharacter as U+FFFD; surrogate pairs as their character."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").replace(_UNREACHABLE, "\ufffd")
