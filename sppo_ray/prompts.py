"""The prompts of a run: read, checked, cut into one slice per iteration, templated, held to the context.

Cheap things first: `read_prompts` needs no tokenizer and finds most mistakes in a fraction of a second, then comes
`encode_prompts`.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sppo_ray.config import Config
from sppo_ray.errors import ConfigError
from sppo_ray.given import is_unicode, shown
from sppo_ray.odd_text import holds_control, holds_emoji, holds_right_to_left, looks_special
from sppo_ray.prompt_sources import Row, read_rows
from sppo_ray.templating import PromptEncoder, encoder_of
from sppo_ray.types import Prompt


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """A prompt as the source has it."""

    prompt_id: str  # "row-<n>" (n from 0, in file order) where the source has none
    text: str


@dataclass(slots=True)
class PromptReport:
    """What became of the rows. Counted up while they are read, so the only record here that is not frozen."""

    empty: int = 0  # white space only, or nothing that the tokenizer knows: skipped
    duplicates: int = 0  # text seen before in the same source: dropped
    leaked: int = 0  # held-out prompts that are training prompts as well: left out
    overlong_dropped: int = 0  # data.overlong=drop
    overlong_cut: int = 0  # data.overlong=keep_last
    cut_for_judge: int = 0  # longer than the judge's source limit: whole for the policy, cut for the judge
    control: int = 0  # hold control characters: kept as they are
    right_to_left: int = 0  # hold text of that direction: kept as it is
    emoji: int = 0  # kept as they are
    special_strings: int = 0  # hold a special token's string: kept, the string read as plain text
    imitations: int = 0  # hold what ends the user's turn where the chat template writes that in plain text: kept
    prompts: int = 0  # in all slices, after everything above
    heldout: int = 0
    longest: int = 0  # tokens of the longest prompt of all

    def summary(self) -> str:
        """One line, naming only what happened."""
        happened = {
            "empty skipped": self.empty,
            "duplicates dropped": self.duplicates,
            "held-out left out (also in training)": self.leaked,
            "overlong dropped": self.overlong_dropped,
            "overlong cut to their last tokens": self.overlong_cut,
            "cut for the judge": self.cut_for_judge,
            "with control characters (kept)": self.control,
            "with right-to-left text (kept)": self.right_to_left,
            "with emoji (kept)": self.emoji,
            "with special tokens' strings (read as plain text)": self.special_strings,
            "that imitate the chat template's plain text (kept)": self.imitations,
        }
        parts = [f"{self.prompts} prompts", f"{self.heldout} held out", f"longest {self.longest} tokens"]
        return ", ".join(parts + [f"{count} {what}" for what, count in happened.items() if count])


@dataclass(frozen=True, slots=True)
class RawPrompts:
    """Everything `read_prompts` knows: texts only."""

    slices: list[list[RawPrompt]]  # one per iteration
    heldout: list[RawPrompt]
    report: PromptReport


@dataclass(frozen=True, slots=True)
class PreparedPrompts:
    """What the run works on."""

    slices: list[list[Prompt]]  # one per iteration
    heldout: list[Prompt]
    report: PromptReport

    @property
    def total(self) -> int:
        """Prompts in all slices."""
        return sum(map(len, self.slices))


def load_texts(
    source: str,
    column: str,
    id_column: str,
    split: str | None = None,
    limit: int | None = None,
    base_dir: Path | None = None,
    *,
    id_prefix: str = "row",
    report: PromptReport | None = None,
) -> list[RawPrompt]:
    """The first `limit` usable prompts in file order; reading stops there. What is skipped is counted in `report`.

    A text that comes twice is kept once: it would count twice in the loss and could stand in two slices, and then the
    later iteration would not see a fresh prompt. Raises ConfigError for a source that cannot be read, a value that is
    not text, and an id that names two texts.
    """
    report = report if report is not None else PromptReport()
    where_of_id: dict[str, str] = {}
    texts: set[str] = set()
    kept: list[RawPrompt] = []
    for number, row in enumerate(read_rows(source, column, id_column, split, base_dir)):
        if len(kept) == limit:
            break
        text = _text_of(row, source, column)
        if not text.strip():
            report.empty += 1
        elif text in texts:
            report.duplicates += 1
        else:
            prompt_id = _id_of(row, source, id_column) or f"{id_prefix}-{number}"
            if prompt_id in where_of_id:
                raise ConfigError(
                    f"{source}: {where_of_id[prompt_id]} and {row.where} have the same id {prompt_id!r} but different "
                    "texts: "
                    "give each prompt its own id, or set data.id_column to a column that the data does not have."
                )
            where_of_id[prompt_id] = row.where
            texts.add(text)
            report.control += holds_control(text)
            report.right_to_left += holds_right_to_left(text)
            report.emoji += holds_emoji(text)
            kept.append(RawPrompt(prompt_id, text))
    return kept


def _text_of(row: Row, source: str, column: str) -> str:
    if not isinstance(row.text, str):
        raise ConfigError(
            f"{source}, {row.where}: {column!r} holds {type(row.text).__name__} ({shown(row.text)}), not text: "
            "set data.column (evaluation.column for held-out prompts) to a column of strings, or repair the row."
        )
    if not is_unicode(row.text):
        raise ConfigError(f"{source}, {row.where}: {column!r} holds half a surrogate pair, not a character: repair it.")
    return row.text


def _id_of(row: Row, source: str, id_column: str) -> str | None:
    """The id as text; None (also for an empty one) if it has to be made."""
    if row.prompt_id is None:
        return None
    if isinstance(row.prompt_id, bool) or not isinstance(row.prompt_id, str | int):
        kind = type(row.prompt_id).__name__
        raise ConfigError(f"{source}, {row.where}: the id in {id_column!r} is a {kind}: use text or whole numbers.")
    prompt_id = str(row.prompt_id)
    if not is_unicode(prompt_id):
        raise ConfigError(f"{source}, {row.where}: the id in {id_column!r} is not valid Unicode: repair it.")
    return prompt_id


def slice_prompts(raw: Sequence[RawPrompt], iterations: int, seed: int) -> list[list[RawPrompt]]:
    """Shuffled by seed and cut into slices whose sizes differ by at most one: disjoint, and together everything."""
    order = list(raw)
    random.Random(f"slices-{seed}").shuffle(order)
    return [order[t::iterations] for t in range(iterations)]


def read_prompts(config: Config, base_dir: Path | None = None) -> RawPrompts:
    """Texts of every slice and of the held-out set. Raises ConfigError; see `load_texts`.

    Splits are taken as they are given, one per iteration: a prompt may come again in another. `data.limit` is then
    shared out evenly, since in file order the first split would take it all.
    """
    data, iterations, report = config.data, config.schedule.iterations, PromptReport()
    if data.splits is None:
        raw = load_texts(data.prompts, data.column, data.id_column, None, data.limit, base_dir, report=report)
        if len(raw) < iterations:
            raise _too_few(len(raw), config)
        slices = slice_prompts(raw, iterations, config.run.seed)
    else:
        shares = [None if data.limit is None else (data.limit + t) // iterations for t in reversed(range(iterations))]
        slices = [
            load_texts(
                data.prompts,
                data.column,
                data.id_column,
                split,
                share,
                base_dir,
                id_prefix=f"{split}-row",
                report=report,
            )
            for split, share in zip(data.splits, shares, strict=True)
        ]
    _refuse_empty_slices(slices, config)
    return RawPrompts(slices, _read_heldout(config, slices, report, base_dir), report)


def _refuse_empty_slices(slices: Sequence[Sequence[Any]], config: Config, why: str = "") -> None:
    if not all(slices):
        raise _too_few(sum(map(len, slices)), config, why)


def _too_few(total: int, config: Config, why: str = "") -> ConfigError:
    limit = f" (data.limit={config.data.limit})" if config.data.limit else ""
    return ConfigError(
        f"{config.data.prompts} gives {total or 'no'} usable prompts{limit}{why}, but {config.schedule.iterations} "
        "iterations need at least one each: use more prompts, or fewer schedule.iterations."
    )


def _read_heldout(
    config: Config, slices: list[list[RawPrompt]], report: PromptReport, base_dir: Path | None
) -> list[RawPrompt]:
    """Held-out prompts without those trained on, even in another spelling of case or white space; then the limit."""
    evaluation, data = config.evaluation, config.data
    if evaluation.prompts is None:
        return []
    trained = {normalise(prompt.text) for part in slices for prompt in part}
    raw = load_texts(evaluation.prompts, evaluation.column, data.id_column, evaluation.split, None, base_dir)
    unseen = [prompt for prompt in raw if normalise(prompt.text) not in trained]
    report.leaked = len(raw) - len(unseen)
    if not unseen:
        raise ConfigError(
            f"evaluation.prompts={evaluation.prompts} leaves nothing to evaluate on: it has {len(raw)} usable prompts "
            "and "
            f"{report.leaked} of them are training prompts; give other prompts, or set evaluation.prompts=null."
        )
    return list(islice(unseen, evaluation.limit))


def normalise(text: str) -> str:
    """The text by which training and held-out prompts are compared, whatever their Unicode form, case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def encode_prompts(config: Config, tokenizer: Any, context_length: int, raw: RawPrompts) -> PreparedPrompts:
    """Templated prompts that leave room for `rollout.max_new_tokens` in the context; see `data.overlong`.

    Raises ConfigError for a prompt that does not fit (data.overlong=refuse), and where no prompt can.
    """
    context = min(config.rollout.max_model_len or context_length, context_length)
    room = context - config.rollout.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} leaves no room for a prompt in a context of "
            f"{context} "
            "tokens: lower it, or raise rollout.max_model_len if that is what limits the context."
        )
    encoder = encoder_of(tokenizer)
    slices = [_encode(part, encoder, room, config, raw.report) for part in raw.slices]
    dropped = raw.report.overlong_dropped
    _refuse_empty_slices(slices, config, f" after {dropped} overlong ones were dropped" if dropped else "")
    heldout = _encode(raw.heldout, encoder, room, config, raw.report)
    prepared = PreparedPrompts(slices, heldout, raw.report)
    raw.report.prompts, raw.report.heldout = prepared.total, len(heldout)
    raw.report.longest = max(prompt.token_ids.size for part in [*slices, heldout] for prompt in part)
    return prepared


def _encode(
    raw: list[RawPrompt], encoder: PromptEncoder, room: int, config: Config, report: PromptReport
) -> list[Prompt]:
    prompts = []
    encoded, bare = encoder.encode_all([prompt.text for prompt in raw]), encoder.bare_ids.tolist()
    for prompt, (templated, ids) in zip(raw, encoded, strict=True):
        if ids.tolist() == bare:  # a bare template around characters that the tokenizer drops
            report.empty += 1
            continue
        report.special_strings += encoder.holds_special_string(prompt.text) or looks_special(prompt.text)
        report.imitations += encoder.imitates_turn_end(prompt.text)
        if ids.size > room:
            if config.data.overlong == "refuse":
                raise _overlong(prompt, ids.size, room, config)
            if config.data.overlong == "drop":
                report.overlong_dropped += 1
                continue
            report.overlong_cut += 1
            ids = encoder.last_tokens(ids, room)
        prompts.append(Prompt(prompt.prompt_id, prompt.text, templated, ids))
    return prompts


def _overlong(prompt: RawPrompt, tokens: int, room: int, config: Config) -> ConfigError:
    return ConfigError(
        f"Prompt {prompt.prompt_id!r} has {tokens} tokens, more than the {room} that rollout.max_new_tokens="
        f"{config.rollout.max_new_tokens} leaves of a context of {room + config.rollout.max_new_tokens}: lower "
        "rollout.max_new_tokens, or set data.overlong=keep_last (keep its last tokens) or data.overlong=drop."
    )
