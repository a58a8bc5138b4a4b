"""Log-probabilities of responses under a causal language model, without the [tokens x vocabulary] matrix in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


class PolicyLogps(nn.Module):
    """A Hugging Face causal model whose forward gives summed response log-probabilities.

    Only response positions are projected to the vocabulary, in chunks that are recomputed in the backward pass; at no
    time is there more than one chunk's [positions x vocabulary]. The head is called as a module, so that DeepSpeed's
    ZeRO-3 hooks gather its weight (which is partitioned, and in tied models belongs to the embedding).
    """

    def __init__(self, lm: PreTrainedModel, chunk: int) -> None:
        """chunk: at most this many positions per projection."""
        super().__init__()
        self.lm = lm
        self.chunk = chunk
        self.softcap: float | None = getattr(lm.config, "final_logit_softcapping", None)  # Gemma-2

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        chunks: int | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """float32 [B]: sum over the response of log pi(y_t | x, y_<t), nats; per_token: its terms, as `token_logps`.

        input_ids, attention_mask: int64 [B, T], padded on the right. response_mask: bool [B, T], True on response
        tokens, never at position 0. chunks: number of projections, when all ranks must agree on it; None: as needed.
        (per_token is here since ZeRO-3's hooks want every pass to enter by the module's forward.)
        """
        if per_token:
            return self.token_logps(input_ids, attention_mask, response_mask, chunks)
        logps, rows = self._token_logps(input_ids, attention_mask, response_mask, chunks)
        return torch.zeros(len(input_ids), device=logps.device).index_add(0, rows, logps)

    def token_logps(
        self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, chunks: int | None = None
    ) -> Tensor:
        """float32 [B, T]: log pi(token t | tokens before t) at response positions, 0 elsewhere."""
        logps, _ = self._token_logps(input_ids, attention_mask, response_mask, chunks)
        return torch.zeros(input_ids.shape, device=logps.device).masked_scatter(response_mask, logps)

    def _token_logps(
        self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, chunks: int | None
    ) -> tuple[Tensor, Tensor]:
        """(log-probabilities [N] of the N response tokens in reading order, their rows [N])."""
        hidden = self.lm.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        rows, columns = response_mask.nonzero(as_tuple=True)
        hidden = hidden[rows, columns - 1]  # position t - 1 predicts token t
        tokens = input_ids[rows, columns]
        pieces = max(1, -(-len(rows) // self.chunk)) if chunks is None else chunks
        parts = [
            # Non-reentrant recomputation is what lets DeepSpeed's hooks see the head again in the backward pass.
            checkpoint(self._project, h, t, use_reentrant=False)
            for h, t in zip(hidden.tensor_split(pieces), tokens.tensor_split(pieces), strict=True)
        ]
        return torch.cat(parts), rows

    def _project(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """hidden [n, H], tokens [n] -> float32 [n]; the log-softmax is in float32 whatever the model's precision."""
        logits = self.lm.get_output_embeddings()(hidden).float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None]).squeeze(1)


def switch_off_dropout(lm: PreTrainedModel) -> None:
    """Dropout off while the model stays in training mode, which gradient checkpointing needs.

    Hugging Face models keep rates both in nn.Dropout modules and as plain attributes that their attention reads.
    """
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
