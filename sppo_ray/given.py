"""What users give: paths made fit to be looked up, and values fit to be shown in a message."""

from __future__ import annotations

import reprlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from sppo_ray.errors import ConfigError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 160
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """`value` as Python writes it, in one line of bounded length, however large or deep it is."""
    return _SHORT.repr(value)


def user_path(text: str | Path) -> Path:
    """`text` with ~ expanded. Once this returns, asking whether the path exists, and what it is, does not raise.

    Raises ConfigError for what cannot be a path: a NUL, half a surrogate pair, an unknown ~user, a name too long, a
    circle of links, a folder that may not be searched.
    """
    try:
        path = Path(text).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{shown(str(text))} cannot be used as a path ({why}): correct it.") from error
    return path


def is_unicode(text: str) -> bool:
    """False for lone surrogates: JSON and YAML can spell them, but no tokenizer, file or network can carry them."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
