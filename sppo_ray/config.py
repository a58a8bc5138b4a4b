"""The configuration: typed sections, unknown keys refused. Imports no torch, so that refusing bad input is instant.

Loading (YAML, dotted overrides, fidelity presets) is in `config_io`; checks across sections are in `config_checks`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sppo_ray.secrets import refuse_secrets

Fidelity = Literal["paper", "reference_code"]
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class Run(Section):
    dir: str
    """The run directory: everything the run makes is under it. Made absolute when the config is loaded."""
    seed: int = 42
    """Every random choice derives from it: slices, sampling seeds, shuffling, random pairs."""
    storage_patience_s: float = Field(600.0, ge=0)
    """A write to the run directory that fails (disk full, file server away) is tried again this long, while the run waits;
    then the run stops and can be resumed."""
    mirror: str | None = None
    """fsspec URL of a folder (s3://, gs://, file://, ...) to which finished files of the run directory are copied while the
    run goes on; null: none."""


class Schedule(Section):
    mode: Literal["sync", "async"] = "sync"
    """sync: Algorithm 1 of the paper. async: rollouts and learner at once, bounded staleness."""
    iterations: int = Field(3, ge=1)
    """Iterations t = 1..T of self-play: one slice of the prompts each."""
    max_staleness: int = Field(1, ge=0)
    """async: a batch takes groups sampled from versions at most this much older than the one it is cut at."""
    batch_order: Literal["ready", "slice"] = "ready"
    """async: ready cuts each batch from the groups that are finished, oldest first, and samples every epoch anew;
    slice waits for the whole slice and takes sync's seeded order."""
    max_resamples: int = Field(3, ge=0)
    """async: times a prompt's group may be sampled again (too old, or aborted by a publish) before the run fails
    (too old) or publishes wait for it (aborted)."""


class Data(Section):
    prompts: str
    """A .jsonl or .parquet file, or a hub data set name. Relative paths are tried beside the config file, then the cwd."""
    column: str = "prompt"
    """Column that holds the prompt text."""
    id_column: str = "prompt_id"
    """Column of unique ids; made from the row number when the data has none."""
    splits: tuple[str, ...] | None = None
    """One split name of a hub data set per iteration; null: one set of prompts, cut into slices by seed."""
    limit: int | None = Field(None, ge=1)
    """At most this many prompts in all, taken in file order before the cut; with splits, shared out among them."""
    overlong: Literal["refuse", "keep_last", "drop"] = "refuse"
    """A templated prompt of more tokens than context - rollout.max_new_tokens: refuse the run, keep its last tokens
    (and BOS), or drop it. The context is rollout.max_model_len or the policy's max_position_embeddings. All of
    max_new_tokens must fit, so that every response has the same room."""


class Policy(Section):
    model: str
    """Local folder or hub name of a causal language model with tokenizer and chat template."""
    dtype: Dtype = "bfloat16"
    """Precision of the weights, in the engine and in the saved policy."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Leave it off unless you have read that code."""


class Rollout(Section):
    num_workers: int = Field(1, ge=1, le=4096)
    """Rollout workers, each a vLLM engine in its own actor."""
    responses_per_prompt: int = Field(5, ge=2, le=1024)
    """K of the paper."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling."""
    max_new_tokens: int = Field(2048, ge=1)
    """Longest response, in tokens."""
    seeds: Literal["derived", "reference"] = "derived"
    """derived: from (run seed, iteration, prompt id, k). reference: 0, 50, 100, ... for every prompt, as in the authors' scripts."""
    engine: Literal["auto", "inprocess", "async"] = "auto"
    """vLLM's engine: in the actor's own process (as on CPU), AsyncLLM with a process of its own (as on GPUs), or by device."""
    max_model_len: int | None = Field(None, ge=8)
    """Engine context in tokens; null: the policy's own."""
    max_num_seqs: int = Field(256, ge=1)
    """Sequences decoded at once in one engine."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of the GPU's memory the engine may take while it is awake (GPU only)."""
    kv_cache_mb: int = Field(64, ge=8)
    """Size of the KV cache in MiB (CPU only)."""
    in_flight: int = Field(128, ge=1)
    """Groups in flight per rollout worker, from the start of sampling until the group is on disk: the back-pressure."""
    timeout_s: float = Field(1800.0, gt=0)
    """A worker that has calls and has finished none for so long is taken for hung: its stacks are written to
    logs/<name>.stacks.txt and it is started again."""


class Judge(Section):
    model: str = "llm-blender/PairRM"
    """PairRM: a local folder, llm-blender/PairRM or llm-blender/PairRM-hf."""
    num_workers: int = Field(1, ge=1, le=4096)
    """Judge workers."""
    dtype: Dtype = "float32"
    """Precision of the judge; on CPU float32 is the fastest."""
    allow_pickle: bool = False
    """Take a checkpoint whose weights are a pickle (pytorch_model.bin), if you trust its origin; read by torch's restricted
    unpickler."""
    source: Literal["raw", "templated"] = "raw"
    """What PairRM sees as the source: the prompt as written, or after the chat template (as in the authors' scripts)."""
    win_rates: Fidelity = "paper"
    """Formula from logits to win rates."""
    source_max_tokens: int | None = Field(None, ge=8)
    """Overrides the checkpoint's source limit (PairRM: 1224)."""
    candidate_max_tokens: int | None = Field(None, ge=8)
    """Overrides the checkpoint's candidate limit (PairRM: 412)."""
    timeout_s: float = Field(600.0, gt=0)
    """A worker that has calls and has finished none for so long is taken for hung: its stacks are written to
    logs/<name>.stacks.txt and it is started again."""


class Selection(Section):
    rule: Literal["best_worst", "all", "random_pair"] = "best_worst"
    """Which of the K responses are trained on."""


class Objective(Section):
    loss: Literal["sppo", "sppo_single"] = "sppo"
    """sppo: the paper's squared loss. sppo_single: the authors' variant on the pair's own preference."""
    eta: float = Field(1000.0, gt=0)
    """1/beta: the target of a response is eta * (P_hat - 1/2) nats."""
    reference: Literal["behavior", "snapshot"] | None = None
    """Whose log-probabilities the loss compares with. behavior: the sampling policy's, as vLLM recorded them. snapshot:
    a frozen copy's, computed in the learner. null: snapshot in sync (it is pi_t), behavior in async."""
    snapshot_every: Annotated[int, Field(ge=1)] | Literal["slice"] = "slice"
    """snapshot in async: updates between refreshes of the frozen copy; slice: at the start of each slice."""
    target_clip: float | None = Field(None, gt=0)
    """Largest |target| in nats; null: none. See docs/async.md for when staleness makes it worth while."""
    lag_discount: float = Field(1.0, gt=0, le=1)
    """Weight of an example in the loss is lag_discount ** staleness; 1: all weigh the same."""
    mismatch_groups: int = Field(4, ge=0)
    """async: groups on which the engine's and the learner's log-probabilities are compared at each publish; 0: none."""
    mismatch_alarm: float = Field(0.1, gt=0)
    """Mean absolute difference per token (nats) above which the comparison is reported as an alarm."""


class Learner(Section):
    num_workers: int = Field(1, ge=1)
    """Data-parallel ranks of the learner."""
    learning_rate: float = Field(5e-7, gt=0)
    """Peak of the schedule."""
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"
    """torch's RMSprop (alpha 0.99, eps 1e-8) or AdamW (no weight decay); restarted each iteration as in the authors' scripts."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """After the warm-up; restarted each iteration."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the scheduled steps that is warm-up."""
    schedule_epochs: int | None = Field(None, ge=1)
    """Epochs the learning-rate schedule is laid out for (paper: 18); null: as many as are trained."""
    epochs: int = Field(1, ge=1)
    """Epochs trained per iteration (paper: 1)."""
    batch_size: int = Field(64, ge=1)
    """Global batch in prompts, over all ranks and accumulation steps."""
    micro_batch_size: int = Field(8, ge=1)
    """Prompts per rank and forward pass."""
    max_grad_norm: float | None = Field(None, gt=0)
    """Gradient clipping; null: none, as in the authors' scripts."""
    zero_stage: Literal[0, 2, 3] = 3
    """DeepSpeed ZeRO stage."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute precision of training; master weights are float32 either way."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass (non-reentrant)."""
    max_length: int = Field(1024, ge=16)
    """Longest prompt + response trained on, in tokens."""
    max_prompt_length: int = Field(512, ge=8)
    """Prompt tokens kept (the last ones) when prompt + response exceed max_length."""
    logprob_chunk: int = Field(1024, ge=1)
    """Token positions per vocabulary projection: bounds the [tokens x vocabulary] matrix in memory."""
    checkpoint_every: int = Field(0, ge=0)
    """Steps between checkpoints within an iteration; 0: at iteration ends only."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints kept within an iteration; at its end its saved policy takes their place."""
    max_restarts: int = Field(2, ge=0)
    """Times Ray Train restarts the learner's group after a failure. Then all actors are started again, within
    cluster.max_restarts."""
    timeout_s: float = Field(1800.0, gt=0)
    """An update, or a wait for the other ranks, that takes longer is taken for hung; the ranks that did not arrive are
    named, and the group is started again."""


class Weights(Section):
    publish_every: Annotated[int, Field(ge=1)] | Literal["slice"] | None = None
    """Updates between publishes; slice: at the end of each slice only. null: slice in sync, 8 in async. The end of a
    slice is always published."""
    pause: Literal["finish", "keep", "abort"] = "finish"
    """What a publish does with running requests. finish: they finish on the old version while new ones wait. keep: they
    go on under the new weights (mixed groups, each token's version recorded). abort: they are sampled again."""
    at_once: float = Field(0.34, gt=0, le=1)
    """Share of the rollout workers (at least one) that take new weights at the same time; the others go on sampling."""
    channel: Literal["ray", "disk", "nccl"] = "ray"
    """How published weights reach the rollout workers. ray: the object store. disk: a folder in the run directory, on a
    file system that all nodes share. nccl: GPU to GPU, through vLLM's packed NCCL transfer (disaggregated layout)."""
    chunk_mb: int = Field(32, ge=1)
    """Size of a packed chunk in MiB; the first ones of a publish are smaller."""
    timeout_s: float = Field(600.0, gt=0)
    """A rollout worker that takes longer to take new weights is named and started again."""


class Buffer(Section):
    shard_groups: int = Field(256, ge=1)
    """Judged groups per ledger shard."""
    flush_s: float = Field(1.0, gt=0)
    """A judged group waits at most this long for others to share its shard before it is written and acknowledged."""


class Cluster(Section):
    gpus: int = Field(0, ge=0)
    """GPUs the run uses over all nodes; 0: CPU."""
    gpus_per_node: int = Field(8, ge=1)
    """GPUs of one node, for the layout over several nodes."""
    gpu_memory_gb: float = Field(80.0, gt=0)
    """Memory of one GPU, for the plan's estimate."""
    layout: Literal["auto", "colocated", "disaggregated"] = "auto"
    """colocated: rollout, learner and judge share each GPU in turns. disaggregated: each has its own. auto: by schedule.mode."""
    address: str | None = None
    """Ray cluster to join; null: the one named by RAY_ADDRESS (set inside a Ray job), else a local one is started."""
    allow_unauthenticated: bool = False
    """Join a cluster that anyone on its network may run code on."""
    threads: int = Field(1, ge=1)
    """CPU threads of each worker's torch."""
    max_restarts: int = Field(3, ge=0)
    """Times a rollout or judge worker is started again without having finished a call in between. Then it stays away;
    the run fails with the first error when none is left. Also the times all actors are started again from the run
    directory without the run having got any further; then it fails with the first error, too."""


class Evaluation(Section):
    prompts: str | None = None
    """Held-out prompts (file or hub name); null: no evaluation."""
    column: str = "prompt"
    """Column that holds their text."""
    split: str | None = None
    """Split of a hub data set."""
    limit: int | None = Field(None, ge=1)
    """At most this many held-out prompts."""
    oracle: Literal["none", "tiny"] = "none"
    """Known rule that also scores the responses; only the embedded tiny domain has one."""


class Config(Section):
    fidelity: Fidelity = "paper"
    """Preset for sampling, win rates, source and schedule (REFERENCE values); every value stays overridable."""
    run: Run
    schedule: Schedule = Schedule()
    data: Data
    policy: Policy
    rollout: Rollout = Rollout()
    judge: Judge = Judge()
    selection: Selection = Selection()
    objective: Objective = Objective()
    learner: Learner = Learner()
    weights: Weights = Weights()
    buffer: Buffer = Buffer()
    cluster: Cluster = Cluster()
    evaluation: Evaluation = Evaluation()

    @property
    def engine_apart(self) -> bool:
        """Whether vLLM's engine has a process of its own beside its rollout worker's."""
        return self.rollout.engine == "async" or (self.rollout.engine == "auto" and self.cluster.gpus > 0)

    @property
    def publish_every(self) -> int | Literal["slice"]:
        """`weights.publish_every` with null resolved."""
        if self.weights.publish_every is not None:
            return self.weights.publish_every
        return "slice" if self.schedule.mode == "sync" else 8

    @property
    def reference(self) -> Literal["behavior", "snapshot"]:
        """`objective.reference` with null resolved."""
        return self.objective.reference or ("snapshot" if self.schedule.mode == "sync" else "behavior")

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        from sppo_ray.config_checks import refuse_contradictions  # which reads this module's types

        refuse_contradictions(self)
        refuse_secrets(self.model_dump(mode="json"))
        return self
