"""Metrics hold each step once, whatever was done again."""

from __future__ import annotations

import json

import pytest

from sppo_ray.metrics import MetricsLog, read_metrics


def test_metrics_hold_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    assert log.write({"step": 1, "loss": 2.0})
    assert log.write({"event": "evaluation", "iteration": 1, "x": 1})
    assert not MetricsLog(path).write({"step": 1, "loss": 3.0})
    assert MetricsLog(path).write({"step": 2, "loss": 3.0})
    assert [line.get("step") for line in read_metrics(path)] == [1, None, 2]


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).write({"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert MetricsLog(path).write({"step": 2, "loss": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_metrics_are_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        MetricsLog(tmp_path / "m.jsonl").write({"step": 1, "loss": float("nan")})
