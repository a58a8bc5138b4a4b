"""How long things take: seconds, tokens, FLOPs. Each number with its reason; none was measured by this project on a GPU.

N parameters, bf16. Training costs 6 N FLOPs a token, 8 N with gradient checkpointing (the forward is done again); a forward
2 N.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RateCard:
    """The defaults: a policy of 7.24 B parameters (Mistral-7B) and PairRM, on A100-80GB SXM with NVLink."""

    parameters: float = 7.24e9
    gpu_flops: float = 312e12  # A100 data sheet, dense bf16
    gpu_bandwidth: float = 2.04e12  # bytes/s, A100-80GB SXM data sheet

    # Rollout: a decoding step of n sequences reads the weights or multiplies by them, whichever takes longer, reads the n
    # caches, and is scheduled and sampled. Batch 1: vLLM on an A100 reaches 77 % of the bandwidth (75 tokens/s for 8 B on
    # the 40 GB card), so 9.2 + 2 ms here. Batch 256: 17 + 10 + 2 = 29 ms, 8,800 tokens/s.
    roofline: float = 0.77  # of gpu_bandwidth
    decode_utilisation: float = 0.7  # of gpu_flops; what cuBLAS reaches with matrices this tall
    kv_bytes_per_token: float = 131_072  # 2 x 32 layers x 8 KV heads x 128 x 2 bytes
    kv_tokens: float = 470  # cached by a running sequence on average: the prompt and half of the response
    scheduling_s: float = 0.002  # a step's CPU time that is not hidden, sampling and log-probabilities
    prefill_utilisation: float = 0.5  # of gpu_flops; a prompt is prefilled once for its K responses (prefix caching)

    # Judge: PairRM is DeBERTa-v3-large: 0.304 B parameters outside the embedding, source + two candidates a pair. At 40
    # + 2 x 412 tokens (most responses reach PairRM's candidate limit): 2 x 0.304e9 x 860 = 0.52 TFLOPs, + 50 % for its
    # three attention matrices without a fused kernel = 0.8 TFLOPs; fp16 at 30 % of 312 TFLOPs/s: 120 pairs/s.
    judge_pairs_per_s: float = 120.0

    # Learner.
    learner_utilisation: float = 0.40  # of gpu_flops, counting the recomputed forward; FSDP and ZeRO-3 reports: 40-57 %
    # ZeRO-3 gathers 14.5 GB twice and scatters 14.5 GB once per forward-backward at ~200 GB/s: 0.2 s, mostly hidden.
    zero_exposed_s: float = 0.1
    optimizer_s: float = 0.3  # RMSprop over the rank's fp32 partition, gradient norm, the step's round trips

    # Weights: 14.5 GB, channel `ray`: gathered, to host memory at ~20 GB/s, written to the object store at ~5 GB/s with
    # a checksum; each worker reads and checks them at ~10 GB/s and copies to its GPU at ~10 GB/s. `nccl` would be ~1 s.
    publish_gb_per_s: float = 3.5
    load_gb_per_s: float = 5.0
    save_gb_per_s: float = 2.0  # the policy's folder, on a local NVMe disk

    # Taking turns on a GPU (colocated). vLLM's sleep mode (level 2): about a second each way; the learner's state, 12 to
    # 16 bytes a parameter over its ranks, to and from pinned host memory at ~10 GB/s per GPU with all of them copying.
    sleep_s: float = 1.0
    wake_s: float = 2.0
    state_bytes: float = 14.0
    offload_gb_per_s: float = 10.0

    @property
    def weights_gb(self) -> float:
        return 2 * self.parameters / 1e9

    def decode_s(self, sequences: int) -> float:
        """A decoding step: every running sequence gets a token."""
        reading = 2 * self.parameters / (self.roofline * self.gpu_bandwidth)
        multiplying = sequences * 2 * self.parameters / (self.decode_utilisation * self.gpu_flops)
        caches = sequences * self.kv_tokens * self.kv_bytes_per_token / (self.roofline * self.gpu_bandwidth)
        return max(reading, multiplying) + caches + self.scheduling_s

    def prefill_s(self, tokens: float) -> float:
        return 2 * self.parameters * tokens / (self.prefill_utilisation * self.gpu_flops)

    def judge_s(self, pairs: int) -> float:
        return pairs / self.judge_pairs_per_s

    def train_s(self, tokens: float) -> float:
        """Forward and backward of a rank's padded micro-batch."""
        return 8 * self.parameters * tokens / (self.learner_utilisation * self.gpu_flops) + self.zero_exposed_s

    def forward_s(self, tokens: float) -> float:
        return 2 * self.parameters * tokens / (self.learner_utilisation * self.gpu_flops) + self.zero_exposed_s / 2

    @property
    def publish_s(self) -> float:
        """On the learner."""
        return self.weights_gb / self.publish_gb_per_s

    @property
    def load_s(self) -> float:
        """On a rollout worker, once it is drained."""
        return self.weights_gb / self.load_gb_per_s

    @property
    def save_s(self) -> float:
        return self.weights_gb / self.save_gb_per_s

    def turn_s(self, ranks: int) -> float:
        """The learner's state to or from host memory."""
        return self.state_bytes * self.parameters / ranks / 1e9 / self.offload_gb_per_s
