"""What the tokenizers library raises, as a refusal of the files that it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sppo_ray.errors import ConfigError


@contextmanager
def tokenizer_errors(refusal: Callable[[str], ConfigError]) -> Iterator[None]:
    """Raise `refusal(what is wrong)` instead of whatever comes of a tokenizer's files: the library raises bare Exceptions, its
    panics are not even those, and transformers raises what a garbled field leads to."""
    try:
        yield
    except ConfigError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refusal(" ".join(str(error).split()) or type(error).__name__) from error
