"""What is counted of texts, against Python's own tables of Unicode and emoji written down by hand."""

from __future__ import annotations

import unicodedata

import pytest

from sppo_ray.odd_text import holds_emoji, holds_right_to_left


def test_right_to_left_is_what_unicode_says() -> None:
    """All characters that Python's tables know (they may be older) of the planes that hold scripts."""
    known = [char for char in map(chr, range(0x20000)) if unicodedata.category(char) not in ("Cn", "Cs")]
    expected = [char for char in known if unicodedata.bidirectional(char) in {"R", "AL", "RLE", "RLO", "RLI"}]
    assert len(expected) > 2000
    assert [char for char in known if holds_right_to_left(char)] == expected


@pytest.mark.parametrize("text", ["so 😀", "🇩🇪", "1\ufe0f\u20e3", "👩\u200d👧", "❤\ufe0f", "©\ufe0f"])
def test_emoji(text: str) -> None:
    assert holds_emoji(text)


@pytest.mark.parametrize("text", ["", "1 # *", "©™", "❤", "→ ✓ ∑", "日本語", "e\u0301", "a\ufe0f"])
def test_no_emoji(text: str) -> None:
    """Digits, signs and arrows are shown as text unless what follows says otherwise."""
    assert not holds_emoji(text)
