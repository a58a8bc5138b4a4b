"""What is counted of texts that are kept as they are: see docs/bad_data.md."""

from __future__ import annotations

import re

# C0 and C1 controls but for the white space among them.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
# As the chat families and the judge's DeBERTa spell them.
_SPECIAL = re.compile(
    r"<\|[^\s<>|]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]|\[(?:CLS|SEP|PAD|UNK|MASK)\]"
)


def holds_control(text: str) -> bool:
    return _CONTROL.search(text) is not None


def looks_special(text: str) -> bool:
    """Whether a string in it is spelt as special tokens are, of whichever model."""
    return _SPECIAL.search(text) is not None


def holds_no_character(text: str) -> bool:
    """U+FFFD: what a detokenizer writes for bytes that are no character."""
    return "\ufffd" in text
