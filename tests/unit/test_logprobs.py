"""Chunked response log-probabilities against the naive full log-softmax, and the memory they save."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sppo_ray.logprobs import PolicyLogps, switch_off_dropout

VOCAB = 503
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True, initializer_range=0.3))


def gemma2() -> PreTrainedModel:
    caps = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "attn_implementation": "eager"}
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, sliding_window=8, initializer_range=0.3, **caps))


def batch(rows: int = 3, length: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(VOCAB, (rows, length), generator=generator)
    ends = length - 3 * torch.arange(rows)
    positions = torch.arange(length)
    attention_mask = (positions < ends[:, None]).long()
    response_mask = (positions >= 5) & (positions < ends[:, None])
    return input_ids, attention_mask, response_mask


def naive(
    lm: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """float32 [B, T], through the model's own logits."""
    logits = lm(input_ids=input_ids, attention_mask=attention_mask).logits.float()
    logps = torch.log_softmax(logits[:, :-1], dim=-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
    return torch.nn.functional.pad(logps, (1, 0)) * mask


@pytest.mark.parametrize("make", [llama, gemma2])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_equals_the_full_log_softmax(make, chunk: int) -> None:
    torch.manual_seed(0)
    lm = make()
    inputs = batch()
    expected = naive(lm, *inputs)
    policy = PolicyLogps(lm, chunk)
    torch.testing.assert_close(policy.token_logps(*inputs), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(policy(*inputs), expected.sum(dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [llama, gemma2])
def test_gradients_equal(make) -> None:
    torch.manual_seed(0)
    lm = make()
    inputs = batch()
    naive(lm, *inputs).sum().backward()
    expected = [p.grad.clone() for p in lm.parameters()]
    lm.zero_grad()
    PolicyLogps(lm, chunk=7)(*inputs).sum().backward()
    for p, grad in zip(lm.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-4, rtol=1e-4)


def test_more_projections_than_tokens_change_nothing() -> None:
    """Ranks agree on the number of projections, so one with few tokens runs some on no tokens at all."""
    torch.manual_seed(0)
    policy, inputs = PolicyLogps(llama(), chunk=8), batch(rows=1, length=8)
    few = policy(*inputs)
    many = policy(*inputs, chunks=9)
    torch.testing.assert_close(many, few)
    many.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters())


class LargestVocabularyTensor(TorchDispatchMode):
    """Most positions in any tensor whose last dimension is the vocabulary."""

    positions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2 and tensor.shape[-1] == VOCAB:
                self.positions = max(self.positions, tensor.numel() // VOCAB)
        return out


@pytest.mark.parametrize("length", [64, 256])
def test_no_more_than_one_chunk_of_the_vocabulary_matrix(length: int) -> None:
    policy = PolicyLogps(llama(), chunk=16)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() if tensor.shape[-1:] == (VOCAB,) else 0)
        return tensor

    # Parameters and their transposes are [vocabulary, hidden]; the gradient of the weight is too.
    with LargestVocabularyTensor() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        logps = policy(*batch(rows=2, length=length))
        assert max(kept) == 0, "logits are kept for the backward pass"
        logps.sum().backward()
    assert 0 < seen.positions <= max(16, SMALL["hidden_size"])  # the head's own transpose is [hidden, vocabulary]


def test_dropout_is_off_in_training_mode() -> None:
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(**SMALL, attention_dropout=0.5))
    lm.train()
    switch_off_dropout(lm)
    policy, inputs = PolicyLogps(lm, 8), batch()
    torch.testing.assert_close(policy(*inputs), policy(*inputs), atol=0, rtol=0)


def test_bfloat16_models_give_float32() -> None:
    logps = PolicyLogps(llama().to(torch.bfloat16), 8)(*batch())
    assert logps.dtype == torch.float32
