"""Makes llm-blender 0.0.2 importable under transformers 5.

llm-blender 0.0.2, the last release, was written for transformers 4. Two names it needs are gone from transformers 5:

1. `transformers.utils.hub.TRANSFORMERS_CACHE` (imported by `blender/blender.py`, `blender/blender_utils.py`): set to
   the hub cache folder, which is what it was.
2. `PreTrainedTokenizerBase.batch_encode_plus` (called by `pair_ranker/collator.py`): forwards to the tokenizer's call.

A third hazard is a side effect: `blender/blender.py` imports vllm whenever it is installed (it generates candidates
with it). A judge has no use for that, so vllm is hidden during the import, unless the process has it already.

Nothing else is changed. Another version of llm-blender, or another major version of transformers, is refused: what is right for
it has not been tried. Tried with transformers 5.19.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from sppo_ray.errors import ConfigError

LLM_BLENDER_VERSION = "0.0.2"
TRANSFORMERS_MAJOR = 5


def import_llm_blender() -> ModuleType:
    """The `llm_blender` module, after the compatibility names are in place. Safe to call again."""
    check_versions()
    _add_missing_names()
    with _vllm_hidden():
        return importlib.import_module("llm_blender")


def pairrm_class() -> Any:
    """llm-blender's own PairRM network, `DebertaV2PairRM` (llm_blender/pair_ranker/pairrm.py)."""
    import_llm_blender()
    return importlib.import_module("llm_blender.pair_ranker.pairrm").DebertaV2PairRM


def check_versions() -> None:
    """Raises ConfigError unless llm-blender 0.0.2 and transformers 5 are installed. Imports neither."""
    blender, transformers = _installed("llm-blender"), _installed("transformers")
    found = f"found llm-blender {blender or 'not installed'} and transformers {transformers or 'not installed'}"
    if blender != LLM_BLENDER_VERSION:
        raise ConfigError(
            f"PairRM needs llm-blender {LLM_BLENDER_VERSION}: {found}. Install it with `pip install "
            f"llm-blender=={LLM_BLENDER_VERSION}`, or adapt sppo_ray/llm_blender_compat.py to this version."
        )
    if transformers is None or transformers.split(".")[0] != str(TRANSFORMERS_MAJOR):
        raise ConfigError(
            f"PairRM needs transformers {TRANSFORMERS_MAJOR}.x: {found}. Install it with `pip install "
            f"'transformers>={TRANSFORMERS_MAJOR},<{TRANSFORMERS_MAJOR + 1}'`, or adapt "
            "sppo_ray/llm_blender_compat.py to this version."
        )


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _add_missing_names() -> None:
    import transformers.utils.hub as hub
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers import PreTrainedTokenizerBase

    if not hasattr(hub, "TRANSFORMERS_CACHE"):
        hub.TRANSFORMERS_CACHE = HF_HUB_CACHE
    if not hasattr(PreTrainedTokenizerBase, "batch_encode_plus"):
        PreTrainedTokenizerBase.batch_encode_plus = _batch_encode_plus


def _batch_encode_plus(tokenizer: Any, texts: list[str], **options: Any) -> Any:
    return tokenizer(texts, **options)


@contextmanager
def _vllm_hidden() -> Iterator[None]:
    """`import vllm` raises ImportError inside, as if it were not installed; a vllm already imported stays visible."""
    if "vllm" in sys.modules or "llm_blender" in sys.modules:
        yield
        return
    sys.modules["vllm"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["vllm"]
