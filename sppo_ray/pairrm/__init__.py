"""PairRM scoring: the judge of SPPO (Jiang et al. 2023, `llm-blender/PairRM`), from the checkpoint.

    inspect_pairrm(path)            cheap pre-flight of a folder, no torch
    load_pairrm(path).logits(x, ys) K x K logits of one group

`checkpoint.py` says what a PairRM folder is, `encoding.py` turns texts into token ids, `scorer.py` runs the network.
The last imports torch, so its names are loaded on first use: a config can be checked without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sppo_ray.pairrm.checkpoint import NotAPairRM, PairRMInfo, inspect_pairrm, is_hub_name

if TYPE_CHECKING:
    from sppo_ray.pairrm.scorer import PairRM, load_pairrm

__all__ = ["NotAPairRM", "PairRM", "PairRMInfo", "inspect_pairrm", "is_hub_name", "load_pairrm"]


def __getattr__(name: str) -> Any:
    if name in ("PairRM", "load_pairrm"):
        from sppo_ray.pairrm import scorer

        return getattr(scorer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
