"""PairRM's logits for a group: llm-blender's network (`DebertaV2PairRM`), our own tokenisation and batching.

llm-blender's `Blender.rank(batch_size=1)` runs K(K-1) forward passes of one pair per prompt, and with larger batches
its scores depend on what else is in the batch (the candidate limit follows the batch's longest source). Here the pairs of
one group go through the network together (in several passes if they are long; how many depends on the group alone) and
nothing of another group ever does. So a group's logits are the same bits whatever else is judged, in whatever order, by
whichever worker (of the same device kind, dtype, thread count and `max_pairs_per_forward`), and they equal the
single-pair passes to about 1e-6 in fp32.

Departures from llm-blender (beside those in `encoding.py`):
1. Padding is always on the right. llm-blender pads left when the checkpoint's *path* contains `llama` or `alpaca`.
2. In half precision the head runs in fp32: a logit is the difference of two outputs, and bf16 has steps of 1/64 at 2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sppo_ray.errors import ConfigError, JudgeError
from sppo_ray.llm_blender_compat import pairrm_class
from sppo_ray.pairrm.checkpoint import (
    EMBEDDING,
    PairRMInfo,
    base_folder,
    check_limits,
    inspect_pairrm,
    refuse,
)
from sppo_ray.pairrm.encoding import Markers, PairEncoder, load_encoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Saved by transformers before 4.31, a buffer outside the state dict since (yuchenlin/LLM-Blender#10).
_IGNORED_KEYS = ("pretrained_model.embeddings.position_ids",)
# Pairs x tokens^2 in one pass: attention holds some six tensors of this size x heads. On a GPU that is 1 GiB each for
# PairRM in bf16 (all 20 pairs of K = 5 up to 1,295 tokens); on a CPU, long pairs are no faster together than apart.
_CPU_BUDGET, _GPU_BUDGET = 2**22, 2**25


class PairRM:
    """A loaded judge. Make one with `load_pairrm`."""

    def __init__(
        self, info: PairRMInfo, network: torch.nn.Module, encoder: PairEncoder, max_pairs_per_forward: int | None
    ) -> None:
        self.info = info
        self.network = network
        self.encoder = encoder
        self.max_pairs_per_forward = max_pairs_per_forward

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def logits(self, source: str, candidates: Sequence[str]) -> np.ndarray:
        """[K, K] float32: PairRM's logit with candidate i on the left and j on the right, > 0 when it prefers i.

        The diagonal is zero. Not antisymmetric: L[i, j] and -L[j, i] differ, since the network sees the order.
        """
        k = len(candidates)
        matrix = np.zeros((k, k), dtype=np.float32)
        if k < 2:
            return matrix
        pairs = self.encoder.pairs(source, candidates)
        longest = max(map(len, pairs))
        budget = _CPU_BUDGET if self.device.type == "cpu" else _GPU_BUDGET
        step = self.max_pairs_per_forward or max(1, budget // longest**2)
        values = np.concatenate([self._forward(pairs[start : start + step]) for start in range(0, len(pairs), step)])
        matrix[~np.eye(k, dtype=bool)] = values
        self._check_finite(matrix, longest)
        return matrix

    @torch.inference_mode()
    def _forward(self, pairs: list[list[int]]) -> np.ndarray:
        """[P] float32 logits of P pairs in one pass, padded on the right to the longest."""
        lengths = np.array([len(ids) for ids in pairs])
        mask = np.arange(lengths.max()) < lengths[:, None]  # [P, T]
        ids = np.full(mask.shape, self.encoder.markers.pad, dtype=np.int64)
        ids[mask] = np.concatenate(pairs)
        output = self.network(
            input_ids=torch.from_numpy(ids).to(self.device),
            attention_mask=torch.from_numpy(mask.astype(np.int64)).to(self.device),
            return_dict=True,
        )
        logits: np.ndarray = output.logits.float().cpu().numpy()
        return logits

    def _check_finite(self, matrix: np.ndarray, longest: int) -> None:
        bad = np.argwhere(~np.isfinite(matrix))
        if len(bad):
            dtype = str(next(self.network.parameters()).dtype).removeprefix("torch.")
            raise JudgeError(
                f"PairRM at {self.info.folder} gave {len(bad)} NaN or infinite logits, the first for candidates "
                f"{tuple(map(int, bad[0]))}, in {dtype} on {self.device} with pairs of up to {longest} tokens. In "
                "float16, set the judge's dtype to bfloat16 or float32; in float32 the checkpoint itself is damaged."
            )


def load_pairrm(
    path_or_name: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    source_max_tokens: int | None = None,
    candidate_max_tokens: int | None = None,
    max_pairs_per_forward: int | None = None,
    allow_pickle: bool = False,
) -> PairRM:
    """Loads a PairRM folder or hub name (fetched into the hub cache if absent) in any layout of `checkpoint.py`.

    `source_max_tokens`, `candidate_max_tokens`: instead of the checkpoint's limits.
    `max_pairs_per_forward`: cuts a group's pairs into passes of this many (K = 16 has 240 pairs); by default as many as
    fit a fixed budget of attention memory, which is all of them unless they are long.
    `allow_pickle`: accept pytorch_model.bin, still read by torch's restricted unpickler.
    """
    if dtype not in DTYPES or (dtype == "float16" and torch.device(device).type == "cpu"):
        raise ConfigError(f"PairRM cannot run in {dtype} on {device}: use float32, or bfloat16/float16 on a GPU.")
    if max_pairs_per_forward is not None and max_pairs_per_forward < 1:
        raise ConfigError(f"max_pairs_per_forward is {max_pairs_per_forward}: give 1 or more, or None for all pairs.")
    info = inspect_pairrm(path_or_name, allow_pickle=allow_pickle, download=True)
    base = base_folder(info)
    base_config = json.loads((base / "config.json").read_text(encoding="utf-8")) if info.backbone else dict(info.config)
    source = source_max_tokens or info.source_max_tokens
    candidate = candidate_max_tokens or info.candidate_max_tokens
    check_limits(info.folder, base_config, source, candidate)
    encoder = load_encoder(info, source, candidate)
    network = _build_network(info, base_config, encoder.markers, _read_weights(info))
    network.eval().to(device=device, dtype=DTYPES[dtype])
    if dtype != "float32":
        _head_in_fp32(network)
    return PairRM(info, network, encoder, max_pairs_per_forward)


def _read_weights(info: PairRMInfo) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for path in info.weights:
        state.update(torch.load(path, map_location="cpu", weights_only=True) if info.pickled else load_file(path))
    for key in _IGNORED_KEYS:
        state.pop(key, None)
    return state


def _build_network(
    info: PairRMInfo, base_config: dict[str, Any], markers: Markers, state: dict[str, torch.Tensor]
) -> torch.nn.Module:
    """llm-blender's network with exactly these weights: a missing, extra or misshapen tensor is refused."""
    network_class = pairrm_class()
    from transformers import DebertaV2Config
    from transformers.initialization import no_init_weights

    if base_config.get("model_type") != "deberta-v2":
        found = f"its backbone {info.backbone} is of type {base_config.get('model_type')!r}, not 'deberta-v2'"
        refuse(info.folder, found, "Use a checkpoint on a DeBERTa-v2 or v3 backbone")
    config = DebertaV2Config.from_dict(base_config)
    if EMBEDDING in state:  # llm-blender resizes the backbone's embedding to its tokenizer: 128,100 -> 128,005 rows
        config.vocab_size = state[EMBEDDING].shape[0]
    config.n_tasks = info.config.get("n_tasks", 1)  # the defaults of llm_blender/pair_ranker/config.py
    config.drop_out = info.config.get("drop_out", 0.05)
    config.sep_token_id = markers.sep
    config.source_prefix_id, config.cand_prefix_id = markers.source, markers.candidate
    config.cand1_prefix_id, config.cand2_prefix_id = markers.candidate1, markers.candidate2
    with no_init_weights():
        network: torch.nn.Module = network_class(config)
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:  # torch lists every missing, unexpected and misshapen tensor
        found = f"its weights do not fit the network its config describes ({error})"
        refuse(info.folder, found, "Copy config.json and the weights from one checkpoint")
    return network


def _head_in_fp32(network: torch.nn.Module) -> None:
    head = network.get_submodule("head_layer")
    head.float()
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
