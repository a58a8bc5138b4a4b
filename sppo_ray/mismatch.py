"""How far apart the engine's and the learner's log-probabilities are under the same weights. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sppo_ray.types import Probe


def compare(probe: Probe, served: Sequence[np.ndarray]) -> dict[str, float]:
    """Absolute differences in nats: of tokens, and of whole sequences (of their sums, where errors of one sign add up).

    served: n arrays, float32 [T], the engine's log-probabilities of the probe's responses, in their order.
    Raises ValueError when the two are not of the same tokens, or there are none. A difference that is not finite stays
    so in the figures.
    """
    lengths = [len(logprobs) for logprobs in probe.logprobs]
    if lengths != [len(logprobs) for logprobs in served] or sum(lengths) == 0:
        raise ValueError(
            f"the learner's probe has sequences of {lengths} tokens, the engine scored "
            f"{[len(logprobs) for logprobs in served]}: they must be of the same responses, and not empty."
        )
    pairs = zip(probe.logprobs, served, strict=True)
    differences = [ours.astype(np.float64) - theirs.astype(np.float64) for ours, theirs in pairs]
    per_token = np.abs(np.concatenate(differences))
    per_sequence = np.abs([difference.sum() for difference in differences])
    return {
        "mean_abs_per_token": float(per_token.mean()),
        "max_abs_per_token": float(per_token.max()),
        "mean_abs_per_sequence": float(per_sequence.mean()),
        "max_abs_per_sequence": float(per_sequence.max()),
        "tokens": float(len(per_token)),
        "sequences": float(len(per_sequence)),
    }
