"""The closing table of a run, from its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from sppo_ray.evaluation import MODES

COLUMNS = (  # key without the mode, heading, format; a column without any value is left out
    ("judge_win_vs_base", "judge\nvs base", "{:.3f}"),
    ("judge_win_vs_previous", "judge vs\nprevious", "{:.3f}"),
    ("oracle_win_vs_base", "oracle\nvs base", "{:.3f}"),
    ("oracle_mean", "oracle\nmean", "{:+.2f}"),
    ("junk_rate", "junk\nrate", "{:.1%}"),
    ("mean_tokens", "mean\ntokens", "{:.1f}"),
)


def evaluations(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The evaluation lines, by iteration."""
    return sorted((m for m in metrics if m.get("event") == "evaluation"), key=lambda m: m["iteration"])


def closing_table(metrics: Sequence[Mapping[str, Any]], policy: str | None = None) -> Table | None:
    """Two rows per policy (greedy and sampled answers), the base first; None if the run had no evaluation.

    policy: the one that `sppo eval` was given; what came before it is the base, so there is no column of its own.
    """
    lines = evaluations(metrics)
    if not lines:
        return None
    of = f" of {policy}" if policy else ""
    table = Table(title=Text(f"Held-out evaluation{of}, {lines[0]['prompts']} prompts", "table.title"))
    table.add_column("policy")
    table.add_column("answers")
    columns = [
        column
        for column in COLUMNS
        if any(f"{column[0]}_{MODES[0]}" in line for line in lines) and not (policy and "_previous" in column[0])
    ]
    if any("_vs_" in key for key, _, _ in columns):
        table.caption = "vs: win rates, ties count half"
    for _, heading, _ in columns:
        table.add_column(heading, justify="right")
    for line in lines:
        name = ("policy" if policy else f"iter {line['iteration']}") if line["iteration"] else "base"
        for mode in MODES:
            values = ((line.get(f"{key}_{mode}"), form) for key, _, form in columns)
            cells = ("" if value is None else form.format(value) for value, form in values)
            table.add_row(name if mode == MODES[0] else "", mode, *cells, end_section=mode == MODES[-1])
    return table
