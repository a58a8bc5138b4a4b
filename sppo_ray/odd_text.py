"""What is counted of texts that are kept as they are: see docs/bad_data.md."""

from __future__ import annotations

import re

import regex  # knows Unicode's properties

# C0 and C1 controls but for the white space among them.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
# As the chat families and the judge's DeBERTa spell them.
_SPECIAL = re.compile(
    r"<\|[^\s<>|]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]|\[(?:CLS|SEP|PAD|UNK|MASK)\]"
)

# Letters of that direction, and the controls that turn it round.
_RIGHT_TO_LEFT = regex.compile(r"\p{Bidi_Class=R}|\p{Bidi_Class=AL}|[\u202b\u202e\u2067]")
# Shown as one by itself, or because the character after it says so (UTS #51).
_EMOJI = regex.compile(r"\p{Emoji_Presentation}|\p{Emoji}\ufe0f")


def holds_control(text: str) -> bool:
    return _CONTROL.search(text) is not None


def holds_right_to_left(text: str) -> bool:
    return _RIGHT_TO_LEFT.search(text) is not None


def holds_emoji(text: str) -> bool:
    return _EMOJI.search(text) is not None


def looks_special(text: str) -> bool:
    """Whether a string in it is spelt as special tokens are, of whichever model."""
    return _SPECIAL.search(text) is not None


def holds_no_character(text: str) -> bool:
    """U+FFFD: what a detokenizer writes for bytes that are no character."""
    return "\ufffd" in text
