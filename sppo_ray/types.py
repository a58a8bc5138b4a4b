"""The records that flow through the system, in the order of the data's way. Frozen; shapes and units beside each field.

Prompt -> ResponseGroup (rollout) -> JudgedGroup (judge) -> TrainingExample (selection) -> learner tasks
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of an iteration's slice."""

    prompt_id: str
    text: str  # as the user wrote it
    templated: str  # after the chat template, as text (PairRM's source under `judge.source: templated`)
    token_ids: np.ndarray  # int32 [P], chat-templated, BOS at most once


@dataclass(frozen=True, slots=True)
class Sampling:
    """What to sample for one prompt. `seeds` has one seed per response, so K = len(seeds)."""

    temperature: float  # 0 is greedy (then K must be 1)
    top_p: float
    max_new_tokens: int
    seeds: tuple[int, ...]  # K; consecutive seeds let the engine serve the group as one request with n = K


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response."""

    token_ids: np.ndarray  # int32 [T], as sampled; ends with the stop token when finish_reason is "stop"
    text: str  # decoded, special tokens stripped
    finish_reason: FinishReason
    logprob: float  # nats: sum over T of log pi(y_t | x, y_<t), full softmax at temperature 1
    token_logprobs: np.ndarray  # float32 [T], nats: its summands, each under the weights that sampled the token
    seed: int
    token_versions: np.ndarray | None = None  # int32 [T], policy version of each token; None: the group's version


@dataclass(frozen=True, slots=True)
class ResponseGroup:
    """K responses to one prompt, all from one policy version unless version_start != version_end (then it is mixed)."""

    prompt: Prompt
    iteration: int  # t of the paper, from 1; 0 for evaluation of the base policy
    responses: tuple[Response, ...]  # K
    version_start: int  # published policy version when sampling began (0 is the base policy)
    version_end: int
    worker: str  # name of the rollout actor
    epoch: int = 0  # pass over the slice, from 0; 0 wherever a slice is sampled once


@dataclass(frozen=True, slots=True)
class JudgedGroup:
    """A group with the judge's raw logits."""

    group: ResponseGroup
    logits: np.ndarray  # float32 [K, K]; [i, j] is the logit with response i on the left, j on the right; diagonal 0
    judge: str  # name of the judge actor
    cut: int = 0  # responses that are longer than the judge reads


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """What the learner trains on for one prompt: M selected responses (2 for a pair, winner first) and their targets."""

    prompt_id: str
    prompt_ids: np.ndarray  # int32 [P]
    response_ids: tuple[np.ndarray, ...]  # M arrays, int32 [T_m]
    p_hat: tuple[float, ...]  # M win rates against the policy, in [0, 1]
    p_pair: float  # P(winner beats loser); 0.5 when M != 2 has no pair meaning
    policy_version: int  # version the responses were sampled from (a mixed group: its oldest)
    token_logprobs: tuple[np.ndarray, ...] = ()  # M, float32 [T_m], nats, recorded at sampling
    reference_logps: tuple[float, ...] | None = None  # M, nats; log pi_ref(y_m | x); None: not computed beforehand
    staleness: int = 0  # versions between sampling and this batch


# What the learner pulls, one at a time. A task is a pure function of the buffer's state and the learner's step, so a
# learner that restarts and asks again with the same step gets the same task.


@dataclass(frozen=True, slots=True)
class ReferenceTask:
    """Compute the reference log-probabilities of a sealed slice with the current weights, before its first update."""

    iteration: int
    examples: tuple[TrainingExample, ...]


@dataclass(frozen=True, slots=True)
class TrainTask:
    """One optimizer update on one global batch."""

    step: int  # optimizer updates done before this one, over the whole run
    iteration: int
    step_in_iteration: int  # 0: the optimizer starts afresh
    steps_per_epoch: int  # of this iteration's slice; the learning-rate schedule is laid over it
    examples: tuple[TrainingExample, ...]  # at most the global batch size; the last batch of an epoch may be smaller


@dataclass(frozen=True, slots=True)
class PublishTask:
    """Publish the current weights as `version`, in the middle of a slice (its end is a SaveTask's)."""

    step: int
    iteration: int
    version: int
    probe: tuple[TrainingExample, ...]  # examples whose log-probabilities under these weights are to be reported


@dataclass(frozen=True, slots=True)
class SaveTask:
    """Save the policy of a finished iteration, publish it as `version` and commit a checkpoint."""

    step: int
    iteration: int
    version: int
    probe: tuple[TrainingExample, ...] = ()  # as in PublishTask


@dataclass(frozen=True, slots=True)
class StopTask:
    """Nothing is left to train."""


LearnerTask = ReferenceTask | TrainTask | PublishTask | SaveTask | StopTask


@dataclass(frozen=True, slots=True)
class Look:
    """What the driver sees of the run when it looks at the buffer."""

    step: Mapping[str, Any]  # the newest step's line; {} before the first
    trouble: str  # what is waited for because a disk refuses it, in words for the user; "" while all is well
    learner_restarts: int  # times the learner's ranks were started again
    updates_repeated: int  # since the buffer's process began


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the driver learns of a group without moving the group itself through the driver."""

    prompt_id: str
    worker: str
    tokens: int  # sampled tokens of the K responses
    truncated: int  # responses that ended at the token limit
    version: int  # policy version sampled from (a mixed group: its oldest)
    iteration: int = 0
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class SliceSummary:
    """Counts of a sealed iteration."""

    iteration: int
    groups: int
    examples: int
    identical_groups: int  # K responses with one text
    empty_responses: int
    order_inconsistency: float  # share of pairs whose verdict changes with the order, in [0, 1]
    cycle_rate: float  # share of groups whose majority preferences contain a cycle, in [0, 1]
    steps: int  # optimizer updates this slice gives
    cut_responses: int = 0  # longer than the judge reads
    control_responses: int = 0  # hold control characters
    broken_responses: int = 0  # hold U+FFFD, for bytes that are no character
    special_responses: int = 0  # hold a string that is spelt as special tokens are
    right_to_left_responses: int = 0
    emoji_responses: int = 0


@dataclass(frozen=True, slots=True)
class TrainedIteration:
    """What the learner reports when an iteration's policy is saved and published."""

    iteration: int
    version: int
    step: int  # updates done in the run
    checksum: str  # of the published weights
    policy_dir: str


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a learner starts that has no newer checkpoint: after the last finished iteration."""

    step: int  # optimizer updates done in the run
    policy_dir: str  # HF folder (or hub name) of the policy to start from
    up_to: int | None = None  # a checkpoint of a later step must not be gone on from; None: any may


# Async: what the schedule, the buffer and the learner tell each other beside groups.


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to sample one group. Tickets are numbered in the order in which prompts are meant to be sampled."""

    number: int  # over the whole run, from 0
    iteration: int
    epoch: int
    index: int  # of the prompt in the iteration's slice
    resamples: int  # times this ticket's group was thrown away
    protected: bool = False  # not to be aborted by a publish any more


@dataclass(frozen=True, slots=True)
class Probe:
    """Token log-probabilities of some sequences under one version of the weights, by the learner."""

    prompt_ids: tuple[np.ndarray, ...]  # n, int32 [P]
    response_ids: tuple[np.ndarray, ...]  # n, int32 [T]
    logprobs: tuple[np.ndarray, ...]  # n, float32 [T], nats


@dataclass(frozen=True, slots=True)
class Publication:
    """Weights that the hub holds, ready to be served."""

    version: int
    step: int  # updates done in the run
    iteration: int
    ends_iteration: bool  # these are the weights of iter_<iteration>/policy
    checksum: str
    seconds: float  # what the learner spent on publishing
    probe: Probe | None = None


@dataclass(frozen=True, slots=True)
class CutBatch:
    """What one update of the async learner is trained on; written down when it is cut."""

    step: int  # updates done before it
    iteration: int
    epoch: int
    version: int  # of the learner's published weights when it was cut: the consumed version
    groups: tuple[tuple[int, int], ...]  # (index of the prompt in the slice, policy version sampled from)

    @classmethod
    def of(cls, data: dict[str, Any]) -> CutBatch:
        return cls(**data | {"groups": tuple((index, version) for index, version in data["groups"])})


@dataclass(frozen=True, slots=True)
class WeightChunk:
    """Some of a policy's tensors, in order, packed into one array. Offsets follow from dtypes and shapes."""

    names: tuple[str, ...]  # N, as in the Hugging Face checkpoint
    dtypes: tuple[str, ...]  # N, torch names without the prefix: "bfloat16"
    shapes: tuple[tuple[int, ...], ...]  # N
    data: np.ndarray  # uint8 [bytes]; tensor i starts at a multiple of weight_chunks.ALIGNMENT
