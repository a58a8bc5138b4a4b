"""Prompts against the policy's context: templated, counted, refused, dropped or cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_prompts import config_of, write_jsonl
from tokenizer_factory import chatml, mistral

from sppo_ray.config import Config
from sppo_ray.errors import ConfigError
from sppo_ray.prompts import PreparedPrompts, encode_prompts, read_prompts


def prepare(config: Any, tokenizer: Any, context_length: int) -> PreparedPrompts:
    return encode_prompts(config, tokenizer, context_length, read_prompts(config))


def overlong_config(tmp_path: Path, **data: Any) -> Config:
    rows = [
        {"prompt": "short one"},
        {"prompt": "short two"},
        {"prompt": "long " * 80 + "last words", "prompt_id": "giant"},
    ]
    return config_of(write_jsonl(tmp_path / "p.jsonl", rows), data=data)


def test_prompts_are_templated_and_counted(tmp_path: Path) -> None:
    tokenizer = chatml()
    prepared = prepare(overlong_config(tmp_path), tokenizer, 4096)
    assert prepared.report.prompts == 3
    assert prepared.report.heldout == 0
    flat = {prompt.prompt_id: prompt for part in prepared.slices for prompt in part}
    assert flat["row-0"].templated == "<|im_start|>user\nshort one<|im_end|>\n<|im_start|>assistant\n"
    assert flat["row-0"].token_ids.dtype == np.int32
    assert prepared.report.longest == flat["giant"].token_ids.size
    assert prepared.report.summary() == f"3 prompts, 0 held out, longest {prepared.report.longest} tokens"


def test_an_overlong_prompt_is_refused_by_name(tmp_path: Path) -> None:
    tokenizer = chatml()
    tokens = max(p.token_ids.size for s in prepare(overlong_config(tmp_path), tokenizer, 4096).slices for p in s)
    assert prepare(overlong_config(tmp_path), tokenizer, tokens + 16)
    with pytest.raises(
        ConfigError, match=rf"'giant' has {tokens} tokens, more than the {tokens - 1} .*overlong=keep_last"
    ):
        prepare(overlong_config(tmp_path), tokenizer, tokens + 15)


def test_overlong_prompts_can_be_dropped(tmp_path: Path) -> None:
    prepared = prepare(overlong_config(tmp_path, overlong="drop"), chatml(), 64)
    assert sorted(p.prompt_id for part in prepared.slices for p in part) == ["row-0", "row-1"]
    assert prepared.report.overlong_dropped == 1


def test_overlong_prompts_can_keep_their_last_tokens_and_bos(tmp_path: Path) -> None:
    for tokenizer in (chatml(), mistral()):
        whole = {p.prompt_id: p for s in prepare(overlong_config(tmp_path), tokenizer, 4096).slices for p in s}
        prepared = prepare(overlong_config(tmp_path, overlong="keep_last"), tokenizer, 64)
        cut = {p.prompt_id: p for s in prepared.slices for p in s}
        assert prepared.report.overlong_cut == 1
        giant, full = cut["giant"].token_ids, whole["giant"].token_ids
        assert giant.size == 64 - 16
        assert giant.dtype == np.int32
        assert giant[1:].tolist() == full[-47:].tolist()
        assert giant[0] == (full[-48] if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
        assert cut["giant"].templated == whole["giant"].templated


def test_a_context_with_no_room_for_any_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens=16 leaves no room for a prompt in a context of 16"):
        prepare(overlong_config(tmp_path), chatml(), 16)
