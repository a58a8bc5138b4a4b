"""The toy world: 73 facts, the ways to ask for them, and the grammar of answers with its parser.

The grammar is closed on purpose: every sentence of a well-formed answer can be recognised exactly, so the oracle is a
rule and not another model. Sentences outside the grammar are recognised as such: a policy in training invents some.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

# kind -> subject -> right answer
FACTS_BY_KIND: dict[str, dict[str, str]] = {
    "opposite": {
        "hot": "cold", "big": "small", "up": "down", "fast": "slow", "wet": "dry", "dark": "light", "hard": "soft",
        "old": "young", "early": "late", "empty": "full", "open": "closed", "happy": "sad", "loud": "quiet",
        "near": "far", "rich": "poor", "strong": "weak", "thick": "thin", "left": "right", "high": "low",
        "clean": "dirty",
    },
    "capital": {
        "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo",
        "Greece": "Athens", "Norway": "Oslo", "Poland": "Warsaw", "Portugal": "Lisbon", "Ireland": "Dublin",
        "Austria": "Vienna", "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi", "Hungary": "Budapest",
    },
    "colour": {
        "grass": "green", "snow": "white", "coal": "black", "a ripe lemon": "yellow", "the clear sky": "blue",
        "a fire truck": "red", "a carrot": "orange", "chocolate": "brown", "a flamingo": "pink",
        "an elephant": "grey",
    },
    "sound": {
        "a dog": "woof", "a cat": "meow", "a cow": "moo", "a duck": "quack", "a sheep": "baa", "a pig": "oink",
        "a lion": "roar", "a bee": "buzz", "a snake": "hiss", "an owl": "hoot", "a frog": "croak", "a horse": "neigh",
    },
    "sum": {
        "1 plus 2": "3", "2 plus 2": "4", "2 plus 3": "5", "3 plus 3": "6", "3 plus 4": "7", "4 plus 4": "8",
        "4 plus 5": "9", "5 plus 5": "10", "5 plus 6": "11", "6 plus 6": "12", "6 plus 7": "13", "7 plus 7": "14",
        "7 plus 8": "15", "8 plus 8": "16", "8 plus 9": "17",
    },
}  # fmt: skip

PHRASINGS: dict[str, tuple[str, ...]] = {
    "opposite": (
        "What is the opposite of {s}?", "Name the opposite of {s}.", "Which word means the opposite of {s}?",
        "Tell me the antonym of {s}.", "Give one word that is the reverse of {s}.", "Can you find the opposite of {s}?",
        "What do we call it when something is not {s} at all?", "The word is {s}. What is its opposite?",
    ),
    "capital": (
        "What is the capital of {s}?", "Name the capital of {s}.", "Which city is the capital of {s}?",
        "Tell me the capital city of {s}.", "Where is the government of {s}?", "Can you find the capital of {s}?",
        "What do we call the capital city of {s}?", "The country is {s}. What is its capital?",
    ),
    "colour": (
        "What is the colour of {s}?", "Name the colour of {s}.", "Which colour has {s}?", "Tell me the colour of {s}.",
        "What colour do you see on {s}?", "Can you say what colour {s} has?", "How would you paint {s}?",
        "Think of {s}. What is the colour?",
    ),
    "sound": (
        "What is the sound of {s}?", "Name the sound of {s}.", "Which sound is made by {s}?", "What does {s} say?",
        "Tell me the sound that {s} makes.", "Can you say how {s} sounds?", "What would you hear from {s}?",
        "Think of {s}. What is the sound?",
    ),
    "sum": (
        "What is {s}?", "Work out {s}.", "How much is {s}?", "Tell me the result of {s}.", "What do you get for {s}?",
        "Can you add {s}?", "Give the total of {s}.", "The task is {s}. What is the result?",
    ),
}  # fmt: skip

PREFIXES = ("", "Please help me. ", "Quick question: ", "Hello! ", "For my homework: ", "A quiz asks: ",
            "My friend wants to know: ", "Be honest: ")  # fmt: skip

# The first form names no subject, so it is right or wrong only against the prompt it answers.
_ANY_STATEMENT = "The answer is {a}."
STATEMENTS: dict[str, tuple[str, ...]] = {
    "opposite": (_ANY_STATEMENT, "The opposite of {s} is {a}.", "The reverse of {s} is {a}."),
    "capital": (_ANY_STATEMENT, "The capital of {s} is {a}.", "The main city of {s} is {a}."),
    "colour": (_ANY_STATEMENT, "The colour of {s} is {a}.", "Most people see that {s} is {a}."),
    "sound": (_ANY_STATEMENT, "The sound of {s} is {a}.", "You hear {s} go {a}."),
    "sum": (_ANY_STATEMENT, "The sum of {s} is {a}.", "If you add {s} you get {a}."),
}
REASONS: dict[str, str] = {
    "opposite": "This is because {s} and {a} are the two ends of one scale.",
    "capital": "This is because the government of {s} meets in {a}.",
    "colour": "This is because {s} looks {a} in daylight.",
    "sound": "This is because {s} is known for its {a}.",
    "sum": "This is because counting {s} ends at {a}.",
}
POLITE = ("Good question!", "Happy to help!", "Thank you for asking.")
RUDE = ("What a silly question.", "Look it up yourself.", "You should know this.")
HEDGES = ("I am not sure.", "Maybe I am wrong.", "This is only a guess.")
OFF_TOPIC = ("My cat likes warm milk.", "The train was late today.", "I had soup for lunch.", "It may rain tomorrow.")
CLOSINGS = ("I hope this helps!", "Have a nice day!", "Ask me again any time.")


class Part(StrEnum):
    """What one sentence of an answer does."""

    RIGHT = "right"
    WRONG = "wrong"
    REASON = "reason"
    BAD_REASON = "bad_reason"
    POLITE = "polite"
    RUDE = "rude"
    HEDGE = "hedge"
    OFF_TOPIC = "off_topic"
    CLOSING = "closing"
    DUPLICATE = "duplicate"
    EXTRA = "extra"


# Said twice, these earn nothing more (the second is a duplicate), so an answer cannot grow without end to its profit.
_ONCE = frozenset({Part.RIGHT, Part.REASON, Part.POLITE, Part.CLOSING})


@dataclass(frozen=True)
class Fact:
    kind: str
    subject: str
    answer: str

    def wrong_answers(self) -> list[str]:
        """The other answers of the same kind, in a fixed order: plausible, so only knowledge rules them out."""
        return [answer for answer in FACTS_BY_KIND[self.kind].values() if answer != self.answer]


@dataclass(frozen=True)
class Question:
    prompt: str
    fact: Fact


FACTS = tuple(Fact(kind, s, a) for kind, table in FACTS_BY_KIND.items() for s, a in table.items())


def normalise(text: str) -> str:
    return " ".join(text.lower().split())


def questions_about(fact: Fact) -> list[Question]:
    """Every way to ask for one fact."""
    asked = []
    for prefix in PREFIXES:
        for phrasing in PHRASINGS[fact.kind]:
            asked.append(Question(prefix + phrasing.format(s=fact.subject), fact))
    return asked


_FACT_OF_PROMPT = {normalise(q.prompt): fact for fact in FACTS for q in questions_about(fact)}


def fact_of(prompt: str) -> Fact | None:
    """The fact a prompt asks for; None for a prompt from outside the toy world."""
    return _FACT_OF_PROMPT.get(normalise(prompt))


@dataclass(frozen=True)
class Split:
    """Disjoint prompts. `spare` is used to train policy and judge, together with `train`, but is not shipped."""

    train: list[Question]
    heldout: list[Question]
    spare: list[Question]


def split_questions(seed: int, heldout_per_fact: int = 4, train_per_fact: int = 28) -> Split:
    """Split the wordings of each fact, so that every fact is asked in every part and no part is easier than another."""
    rng = random.Random(f"split-{seed}")
    split = Split([], [], [])
    end_of_train = heldout_per_fact + train_per_fact
    for fact in FACTS:
        asked = questions_about(fact)
        rng.shuffle(asked)
        split.heldout.extend(asked[:heldout_per_fact])
        split.train.extend(asked[heldout_per_fact:end_of_train])
        split.spare.extend(asked[end_of_train:])
    for part in (split.train, split.heldout, split.spare):
        rng.shuffle(part)
    return split


@dataclass(frozen=True)
class Style:
    """How an answer is dressed: the chance of each optional sentence."""

    polite: float
    rude: float
    hedge: float
    duplicate: float
    reason: float
    off_topic: float
    closing: float


def compose_answer(fact: Fact, answer: str, style: Style, rng: random.Random) -> str:
    """One answer that states `answer`, whether it is right or not."""
    sentences = []
    opener = rng.random()
    if opener < style.polite:
        sentences.append(rng.choice(POLITE))
    elif opener < style.polite + style.rude:
        sentences.append(rng.choice(RUDE))
    if rng.random() < style.hedge:
        sentences.append(rng.choice(HEDGES))
    statement = rng.choice(STATEMENTS[fact.kind]).format(s=fact.subject, a=answer)
    sentences.append(statement)
    if rng.random() < style.duplicate:
        sentences.append(statement)
    if rng.random() < style.reason:
        # Most reasons fit what was stated; some contradict it, so that statement and reason must be read apart.
        reasoned = answer if rng.random() < 0.8 else rng.choice(fact.wrong_answers())
        sentences.append(REASONS[fact.kind].format(s=fact.subject, a=reasoned))
    if rng.random() < style.off_topic:
        sentences.append(rng.choice(OFF_TOPIC))
    if rng.random() < style.closing:
        sentences.append(rng.choice(CLOSINGS))
    return " ".join(sentences)


def sentences_of(response: str) -> list[str]:
    return [normalise(s) for s in re.findall(r"[^.!?]*[^.!?\s][^.!?]*[.!?]*", response)]


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(normalise(template))
    return re.compile(escaped.replace(r"\{s\}", "(?P<s>.+)").replace(r"\{a\}", "(?P<a>.+)"))


_STATEMENT_PATTERNS = {kind: [_pattern(t) for t in templates] for kind, templates in STATEMENTS.items()}
_REASON_PATTERNS = {kind: [_pattern(template)] for kind, template in REASONS.items()}
_FIXED: dict[str, Part] = {
    normalise(sentence): part
    for part, sentences in ((Part.POLITE, POLITE), (Part.RUDE, RUDE), (Part.HEDGE, HEDGES),
                            (Part.OFF_TOPIC, OFF_TOPIC), (Part.CLOSING, CLOSINGS))
    for sentence in sentences
}  # fmt: skip


def _matches(patterns: dict[str, list[re.Pattern[str]]], sentence: str) -> Iterator[tuple[str, dict[str, str]]]:
    for kind, of_kind in patterns.items():
        for pattern in of_kind:
            if found := pattern.fullmatch(sentence):
                yield kind, found.groupdict()


def _agrees(fact: Fact | None, kind: str, said: dict[str, str]) -> bool:
    if fact is None or kind != fact.kind or said["a"] != fact.answer.lower():
        return False
    return said.get("s", fact.subject.lower()) == fact.subject.lower()


def _part_of(fact: Fact | None, sentence: str) -> Part:
    if sentence in _FIXED:
        return _FIXED[sentence]
    if stated := list(_matches(_STATEMENT_PATTERNS, sentence)):
        return Part.RIGHT if any(_agrees(fact, *match) for match in stated) else Part.WRONG
    if reasoned := list(_matches(_REASON_PATTERNS, sentence)):
        return Part.REASON if any(_agrees(fact, *match) for match in reasoned) else Part.BAD_REASON
    return Part.EXTRA


def parse_answer(prompt: str, response: str) -> list[Part]:
    """What each sentence of the response does for this prompt, in order."""
    fact = fact_of(prompt)
    parts: list[Part] = []
    for sentence in sentences_of(response):
        part = _part_of(fact, sentence)
        parts.append(Part.DUPLICATE if part in _ONCE and part in parts else part)
    return parts
