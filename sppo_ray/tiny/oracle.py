"""The known rule of the toy world: how good an answer is, from its text alone.

The judge is a network trained to imitate this rule and is wrong now and then. Reporting the oracle beside the judge
shows whether a policy became better or only found what the judge overrates.
"""

from sppo_ray.tiny.domain import Part, parse_answer

# Being right matters most: it earns more than all dressing together. Each useless sentence costs, so the best answer is
# polite opener, right statement, right reason, closing (5.9).
WEIGHTS: dict[Part, float] = {
    Part.RIGHT: 3.0,
    Part.WRONG: -1.5,
    Part.REASON: 1.5,
    Part.BAD_REASON: -0.5,
    Part.POLITE: 0.8,
    Part.RUDE: -1.5,
    Part.HEDGE: -1.2,
    Part.OFF_TOPIC: -0.8,
    Part.CLOSING: 0.6,
    Part.DUPLICATE: -1.0,
    Part.EXTRA: -0.4,
}
NO_ANSWER = -1.0
JUNK = -1.5


def score(prompt: str, response: str) -> float:
    """Sum of the weights of the response's sentences, less the penalties for stating nothing and for junk."""
    parts = parse_answer(prompt, response)
    total = sum(WEIGHTS[part] for part in parts)
    if Part.RIGHT not in parts and Part.WRONG not in parts:
        total += NO_ANSWER
    if _is_junk(parts):
        total += JUNK
    return total


def is_junk(prompt: str, response: str) -> bool:
    """True for a response that is empty or of which at least half the sentences lie outside the grammar."""
    return _is_junk(parse_answer(prompt, response))


def is_right(prompt: str, response: str) -> bool:
    """True for a response that states the asked fact rightly and never wrongly."""
    parts = parse_answer(prompt, response)
    return Part.RIGHT in parts and Part.WRONG not in parts


def _is_junk(parts: list[Part]) -> bool:
    return 2 * parts.count(Part.EXTRA) >= len(parts)
