"""The closing table of a run, from its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

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


def closing_table(metrics: Sequence[Mapping[str, Any]]) -> Table | None:
    """Two rows per policy (greedy and sampled answers), the base first; None if the run had no evaluation."""
    lines = evaluations(metrics)
    if not lines:
        return None
    table = Table(title=f"Held-out evaluation, {lines[0]['prompts']} prompts")
    table.add_column("policy")
    table.add_column("answers")
    columns = [column for column in COLUMNS if any(f"{column[0]}_{MODES[0]}" in line for line in lines)]
    if any("_vs_" in key for key, _, _ in columns):
        table.caption = "vs: win rates, ties count half"
    for _, heading, _ in columns:
        table.add_column(heading, justify="right")
    for line in lines:
        name = f"iter {line['iteration']}" if line["iteration"] else "base"
        for mode in MODES:
            values = ((line.get(f"{key}_{mode}"), form) for key, _, form in columns)
            cells = ("" if value is None else form.format(value) for value, form in values)
            table.add_row(name if mode == MODES[0] else "", mode, *cells, end_section=mode == MODES[-1])
    return table
