"""What a run needs of each GPU in each phase, and of host memory. Pure arithmetic; GiB = 2**30 bytes throughout.

P parameters of the policy, N learner ranks, e bytes per element (bf16 2, fp32 4). Per learner GPU, ZeRO-3 (DeepSpeed):

    parameters          e P/N              gradients              4 P/N (accumulated in fp32)
    fp32 master         4 P/N              fp32 gradients at the step   4 min(P/N, 1e9)   (one sub-group at a time)
    optimizer           4 P/N (RMSprop)    8 P/N (AdamW)
    gathered layers     e min(P, 1e9)      reduction bucket       e min(P, 5e8)
    activations         T = micro_batch x responses x max_length tokens; one layer and its gradients: 2 T a, with
                        a = e (6 H + 2 A + 2 B + 4 I) + 4 H per norm   (H hidden, A and B query and key widths, I MLP),
                        Gemma-2 also 16 heads max_length per token: its soft-capped scores are held as a matrix;
                        with gradient checkpointing  + L T H e  (each layer's input), without  + L T a
    log-probabilities   one chunk x vocabulary at 16 bytes (24 with Gemma-2's soft cap) + 2 T H e

ZeRO-2 holds parameters whole (e P), ZeRO-0 everything (N = 1 above; in fp32 no master copy).

Rollout GPU: vLLM takes gpu_memory_utilization x the GPU: weights e P, work space, the rest is KV cache, of
2 L (KV heads) (head size) e bytes a token. Judge: weights, and 4 attention matrices of S x S per head for the K(K-1)
pairs of a group at once, S = longest source + 2 longest candidates (DeBERTa's attention has no fused kernel).

All lengths are taken at their limits, and the constants in capitals are estimates, not measurements on GPUs: the verdict
errs towards refusing.
"""

from __future__ import annotations

from dataclasses import dataclass

from sppo_ray.config import Config
from sppo_ray.layout import Layout
from sppo_ray.model_shapes import ModelShape

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
OPTIMIZER_BYTES = {"rmsprop": 4, "adamw": 8}  # a parameter
MARGIN = 0.05  # of the GPU's memory: fragmentation, and what the driver keeps

CONTEXT = 1.0  # GiB; CUDA context and libraries of one process, with NCCL's buffers
ENGINE_WORK = 2.0  # GiB; vLLM's activations and CUDA graphs at its default of 8192 batched tokens
ENGINE_ASLEEP = 1.5  # GiB; context and CUDA graphs of a sleeping engine
PROCESS = 0.7  # GiB; a worker's own host memory (measured for an in-process vLLM engine on CPU)

SOURCE_LIMIT, CANDIDATE_LIMIT = 1224, 412  # tokens; PairRM's

# DeepSpeed's defaults, in elements.
MAX_LIVE, BUCKET, SUB_GROUP = 10**9, 5 * 10**8, 10**9


@dataclass(frozen=True, slots=True)
class Part:
    label: str
    gib: float


@dataclass(frozen=True, slots=True)
class Phase:
    """What one GPU holds at the same time."""

    where: str  # "every GPU, sampling"
    parts: tuple[Part, ...]
    remedy: str  # config keys that lower it

    @property
    def gib(self) -> float:
        return sum(part.gib for part in self.parts)


@dataclass(frozen=True, slots=True)
class Memory:
    phases: tuple[Phase, ...]  # empty on CPU
    host: tuple[Part, ...]  # per node, beside what the operating system and Ray's own processes need
    kv_tokens: int  # tokens the KV cache of one rollout worker holds
    problems: tuple[str, ...]  # what does not fit, each with its remedy; empty: everything fits

    @property
    def fits(self) -> bool:
        return not self.problems


def estimate_memory(config: Config, layout: Layout, policy: ModelShape, judge: ModelShape) -> Memory:
    engine = engine_parts(config, policy)
    phases = _phases(config, layout, policy, judge, engine) if layout.gpus else ()
    kv_gib = engine[-1].gib
    kv_tokens = max(0, int(kv_gib * GIB / kv_bytes_per_token(config, policy)))
    usable = config.cluster.gpu_memory_gb * (1 - MARGIN)
    problems = [
        f"{phase.where}: {phase.gib:.1f} GiB are needed but cluster.gpu_memory_gb={config.cluster.gpu_memory_gb:g} "
        f"leaves {usable:.1f} GiB after a margin of {MARGIN:.0%}; {phase.remedy}."
        for phase in phases
        if phase.gib > usable
    ]
    problems += _kv_problems(config, policy, kv_tokens)
    return Memory(phases, host_parts(config, layout, policy, judge), kv_tokens, tuple(problems))


def kv_bytes_per_token(config: Config, policy: ModelShape) -> int:
    return policy.kv_elements_per_token * BYTES[config.policy.dtype]


def engine_parts(config: Config, policy: ModelShape) -> tuple[Part, ...]:
    """An awake vLLM engine; the last part is the KV cache, which is what is left of its share (on CPU: as configured)."""
    weights = policy.parameters * BYTES[config.policy.dtype] / GIB
    if config.cluster.gpus == 0:
        return Part("vLLM weights", weights), Part("KV cache", config.rollout.kv_cache_mb / 1024)
    # Logits, probabilities and their sorted copy for sampling, fp32.
    work = ENGINE_WORK + 3 * 4 * config.rollout.max_num_seqs * policy.vocab / GIB
    share = config.rollout.gpu_memory_utilization * config.cluster.gpu_memory_gb
    return Part("vLLM weights", weights), Part("vLLM work space", work), Part("KV cache", share - weights - work)


def learner_state(config: Config, policy: ModelShape) -> tuple[Part, ...]:
    """What a rank holds between steps: parameters, master copy, optimizer."""
    learner, e = config.learner, BYTES[config.learner.dtype]
    shard = policy.parameters / (learner.num_workers if learner.zero_stage else 1)
    master = 0 if learner.zero_stage == 0 and e == 4 else 4
    frozen: tuple[Part, ...] = ()
    if _has_frozen_reference(config):
        part = shard if learner.zero_stage == 3 else policy.parameters
        frozen = (Part("frozen reference", BYTES[config.policy.dtype] * part / GIB),)
    return (
        *frozen,
        Part("parameters", e * (shard if learner.zero_stage == 3 else policy.parameters) / GIB),
        Part("fp32 master", master * shard / GIB),
        Part(f"{learner.optimizer} state", OPTIMIZER_BYTES[learner.optimizer] * shard / GIB),
    )


def learner_work(config: Config, policy: ModelShape) -> tuple[Part, ...]:
    """What a rank needs on top during a step."""
    learner, e = config.learner, BYTES[config.learner.dtype]
    shard = policy.parameters / (learner.num_workers if learner.zero_stage else 1)
    buffers = min(policy.parameters, BUCKET) + (min(policy.parameters, MAX_LIVE) if learner.zero_stage == 3 else 0)
    step = min(shard, SUB_GROUP) if learner.zero_stage == 3 else shard
    tokens = micro_batch_tokens(config)
    chunk = min(learner.logprob_chunk, tokens) * policy.vocab * (24 if policy.family == "gemma2" else 16)
    return (
        Part("gradients", (4 if learner.zero_stage else e) * shard / GIB),  # accumulated in fp32: trainer_setup.py
        Part("fp32 gradients at the step", (0 if learner.zero_stage == 0 and e == 4 else 4 * step) / GIB),
        Part("DeepSpeed buffers", e * buffers / GIB),
        Part("activations", activation_bytes(config, policy) / GIB),
        Part("log-probability chunk", (chunk + 2 * tokens * policy.hidden * e) / GIB),
    )


def micro_batch_tokens(config: Config) -> int:
    """The most tokens in one forward pass of a rank: prompts x responses trained on x max_length."""
    responses = config.rollout.responses_per_prompt if config.selection.rule == "all" else 2
    prompts = min(config.learner.micro_batch_size, -(-config.learner.batch_size // config.learner.num_workers))
    return prompts * responses * config.learner.max_length


def activation_bytes(config: Config, policy: ModelShape) -> int:
    e, tokens = BYTES[config.learner.dtype], micro_batch_tokens(config)
    queries, keys = policy.heads * policy.head_dim, policy.kv_heads * policy.head_dim
    norms, scores = (4, 16 * policy.heads * config.learner.max_length) if policy.family == "gemma2" else (2, 0)
    layer = e * (6 * policy.hidden + 2 * queries + 2 * keys + 4 * policy.intermediate)
    layer += 4 * policy.hidden * norms + scores
    kept = policy.hidden * e if config.learner.gradient_checkpointing else layer
    return tokens * (2 * layer + policy.layers * kept)


def judge_parts(config: Config, judge: ModelShape) -> tuple[Part, ...]:
    k, e = config.rollout.responses_per_prompt, BYTES[config.judge.dtype]
    length, pairs = judge_pair_tokens(config), k * (k - 1)
    matrices = 4 * pairs * judge.heads * length**2 * e
    rows = pairs * length * (2 * judge.intermediate + 4 * judge.hidden) * e
    return Part("judge weights", judge.parameters * e / GIB), Part("judge activations", (matrices + rows) / GIB)


def judge_pair_tokens(config: Config) -> int:
    """Longest input of the judge, in tokens: its limits (PairRM's unless overridden), or less if no text is that long
    (which takes the two tokenizers to be alike)."""
    source = config.judge.source_max_tokens or SOURCE_LIMIT
    candidate = config.judge.candidate_max_tokens or CANDIDATE_LIMIT
    return min(source, config.rollout.max_model_len or source) + 2 * min(candidate, config.rollout.max_new_tokens)


def host_parts(config: Config, layout: Layout, policy: ModelShape, judge: ModelShape) -> tuple[Part, ...]:
    """Per node. The hub holds the served weights and, during a publish, the new ones; every node that pulls has a copy."""
    weights = policy.parameters * BYTES[config.policy.dtype] / GIB
    published = Part("object store: two versions of the weights", 2 * weights)
    packing = Part("chunks being packed and read", 2 * min(config.weights.chunk_mb / 1024, weights))
    if layout.gpus:
        ranks = min(layout.learner.workers, layout.gpus_per_node)
        loading = Part("learner ranks, each loading the whole policy at the start", ranks * weights)
        parts = [published, packing, *_checkpoint_parts(config, policy), loading]
        if layout.takes_turns:
            state = sum(part.gib for part in learner_state(config, policy))
            parts.append(Part("learner offloaded while sampling", state * layout.gpus_per_node))
        return tuple(parts)
    engine = sum(part.gib for part in engine_parts(config, policy))
    learner = sum(part.gib for part in (*learner_state(config, policy), *learner_work(config, policy)))
    processes = layout.rollout.workers + layout.learner.workers + layout.judge.workers
    if config.engine_apart:
        processes += layout.rollout.workers  # the engines' own
    return (
        published,
        packing,
        *_checkpoint_parts(config, policy),
        Part("rollout workers", layout.rollout.workers * engine),
        Part("learner ranks", layout.learner.workers * learner),
        Part("judges", layout.judge.workers * sum(part.gib for part in judge_parts(config, judge))),
        Part(f"{processes} processes at {PROCESS:g} GiB", processes * PROCESS),
    )


def _checkpoint_parts(config: Config, policy: ModelShape) -> tuple[Part, ...]:
    """The full state of the learner on the node of rank 0, from the moment it is gathered until it is written."""
    if not config.learner.checkpoint_every:
        return ()
    state = (4 + OPTIMIZER_BYTES[config.learner.optimizer]) * policy.parameters
    if _has_frozen_reference(config):
        state += BYTES[config.policy.dtype] * policy.parameters
    return (Part("a checkpoint being written, on the node of learner-0", state / GIB),)


def _has_frozen_reference(config: Config) -> bool:
    schedule = config.schedule
    return schedule.mode == "async" and config.reference == "snapshot" and schedule.batch_order == "ready"


def _phases(
    config: Config, layout: Layout, policy: ModelShape, judge: ModelShape, engine: tuple[Part, ...]
) -> tuple[Phase, ...]:
    context = Part("learner context", CONTEXT)
    learner = (*learner_state(config, policy), *learner_work(config, policy), context)
    judging = (*judge_parts(config, judge), Part("judge context", CONTEXT))
    fewer = (
        "use more learner.num_workers, or lower learner.micro_batch_size, learner.max_length or learner.logprob_chunk"
    )
    wide = config.judge.dtype == "float32"
    smaller = "set judge.dtype=float16" if wide else "lower judge.source_max_tokens"
    lower = "lower rollout.gpu_memory_utilization"
    if not layout.takes_turns and layout.judges_share:
        sharing = Phase("rollout and judge GPU", (*engine, *judging), f"{lower}, or {smaller}")
        return (sharing, Phase("learner GPU", learner, fewer))
    if not layout.takes_turns:
        alone = (Phase("rollout GPU", engine, lower), Phase("learner GPU", learner, fewer))
        return (*alone, Phase("judge GPU", judging, smaller))
    asleep = Part("vLLM asleep", ENGINE_ASLEEP)
    return (
        Phase("every GPU, sampling", (*engine, context, *judging), f"{lower}, or {smaller}"),
        # The judge idles here, but its process keeps what its activations once took.
        Phase("every GPU, training", (*learner, asleep, *judging), f"{fewer}, or {smaller}"),
    )


def _kv_problems(config: Config, policy: ModelShape, kv_tokens: int) -> list[str]:
    """vLLM refuses to start if one sequence of full length does not fit."""
    length = config.rollout.max_model_len or policy.context
    if kv_tokens >= length:
        return []
    share = "rollout.gpu_memory_utilization" if config.cluster.gpus else "rollout.kv_cache_mb"
    source = "rollout.max_model_len" if config.rollout.max_model_len else f"the context of {policy.name}"
    return [
        f"KV cache: room for {kv_tokens:,} tokens, but one sequence may have {length:,} ({source}); "
        f"raise {share} or lower rollout.max_model_len."
    ]
