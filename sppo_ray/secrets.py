"""Secrets: what counts as one, and how it stays out of configs, manifests, metrics, messages and what this project logs.

A secret belongs in the environment, where the library that needs it finds it. The config and the manifest lie in the run
directory, which is made to be copied and shown.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

HIDDEN = "***"
SHORTEST = 8  # characters; a shorter value would be found in ordinary words
_NAME = re.compile(
    r"(token|secrets?|passw(or)?ds?|[_-]pass|[_-]pwd|passphrase|credentials?(_json)?|[_-]keys?|[_-]key_(id|base)|api_?keys?|signature"
    r"|connection_string|webhook_url|[_-]pat|[_-]dsn|[_-]auth|auth_config|(^|[_-])jwt)([_-]?\d+)?$",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(?<=://)[^/?#\s]+(?=@)")  # user, user:password, which may hold another @
_IN_QUERY = re.compile(
    r"(?<=[?&])([\w.-]*(?:token|secret|passw(?:or)?d|key|sig|signature|credential))=[^&\s'\"]+", re.IGNORECASE
)  # as in signed URLs of object stores


def names_a_secret(name: str) -> bool:
    """Whether an environment variable or a key of this name holds a secret: HF_TOKEN, WANDB_API_KEY, ..."""
    return bool(_NAME.search(name))


def secrets_of(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that hold a secret. One that names a file, e.g. of credentials, holds none."""
    named = {
        name: environ.get(name, "") for name in list(environ) if names_a_secret(name)
    }  # others may change it meanwhile
    found = {name: value for name, value in named.items() if len(value) >= SHORTEST}
    # Path.exists would raise for a value too long for a path.
    return {name: value for name, value in found.items() if not os.path.exists(value)}


def hide(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """`text` without the secrets of the environment and without credentials inside URLs."""
    for value in sorted(secrets_of(environ).values(), key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, HIDDEN)
    return _IN_QUERY.sub(rf"\1={HIDDEN}", _IN_URL.sub(HIDDEN, text))


def hidden(data: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """Plain data (as of JSON) with `hide` on every text in it."""
    if isinstance(data, str):
        return hide(data, environ)
    if isinstance(data, Mapping):
        return {key: hidden(value, environ) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [hidden(value, environ) for value in data]
    return data


def without_secrets(data: Any) -> Any:
    """Plain data with what stands under a secret's name hidden, whether the environment knows it or not."""
    if isinstance(data, Mapping):
        return {k: HIDDEN if names_a_secret(str(k)) else without_secrets(value) for k, value in data.items()}
    return [without_secrets(value) for value in data] if isinstance(data, list | tuple) else data


class HidingStream(io.TextIOWrapper):
    """Text output without secrets: of prints, warnings and the tracebacks of threads, which no logger sees."""

    def write(self, text: str) -> int:
        super().write(hide(text))
        return len(text)

    @classmethod
    def of(cls, descriptor: int) -> HidingStream:
        """Every line, and what is flushed, is written at once."""
        raw = open(descriptor, "wb", buffering=0, closefd=False)  # noqa: SIM115 - for as long as the process lives
        return cls(io.BufferedWriter(raw), errors="backslashreplace", line_buffering=True)


def hide_in_logs() -> None:
    """From now on no log line of this process holds a secret, whichever library logs it and whichever handler writes it: vLLM and
    DeepSpeed have handlers of their own."""
    before = logging.getLogRecordFactory()
    if not isinstance(before, _HidingFactory):
        logging.setLogRecordFactory(_HidingFactory(before))


class _HidingFactory:
    """Around the factory that was there: vLLM's adds fields that its format asks for."""

    def __init__(self, before: Callable[..., logging.LogRecord]) -> None:
        self._before = before

    def __call__(self, *facts: Any, **more: Any) -> logging.LogRecord:
        record = self._before(*facts, **more)
        record.__class__ = _HidingRecord
        if record.exc_info and record.exc_info[0]:
            record.exc_text = hide(logging.Formatter().formatException(record.exc_info))  # formatters take it as it is
        return record


class _HidingRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return hide(super().getMessage())


def refuse_secrets(config: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError, naming the key and never the value, where a text of a config (nested plain data) holds a secret."""
    known = secrets_of(environ)
    for key, text in _texts(config):
        if _IN_URL.search(text) or _IN_QUERY.search(text):
            raise ValueError(
                f"{key} has credentials inside a URL, and the config is written to the run directory: give the URL without "
                "them and put them into the environment (e.g. HF_TOKEN; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)."
            )
        if name := next((name for name, value in known.items() if value in text), None):
            raise ValueError(
                f"{key} holds the value of the environment variable {name}, and the config is written to the run directory: "
                f"leave it out; what needs {name} reads it from the environment."
            )


def _texts(data: Any, key: str = "") -> list[tuple[str, str]]:
    """(dotted key, text) of every text in nested mappings and lists."""
    if isinstance(data, str):
        return [(key, data)]
    if isinstance(data, Mapping):
        parts = [(f"{key}.{name}" if key else str(name), value) for name, value in data.items()]
    elif isinstance(data, list | tuple):
        parts = [(key, value) for value in data]
    else:
        return []
    return [found for name, value in parts for found in _texts(value, name)]
