"""Desired numbers of rollout and judge workers of a running async job: `scale.json` in its run directory.

`sppo scale` writes the file, the driver follows it (actors/fleet.py). Without it, and when
the run is resumed by its user, the config's num_workers hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sppo_ray.atomic import write_json
from sppo_ray.config import Config
from sppo_ray.config_io import load_config
from sppo_ray.errors import ConfigError
from sppo_ray.given import shown
from sppo_ray.layout import compute_layout
from sppo_ray.run_dir import read_manifest

FILE = "scale.json"
ScaledRole = Literal["rollout", "judge"]
MOST = 4096  # workers of a role, as in the config
_CHANGE = re.compile(r"(?P<role>\w+)=(?P<sign>[+-]?)(?P<number>[0-9]{1,9})")


class Desired(BaseModel):
    """Workers by role, and when they were asked for: asking again for the same is a new request."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rollout: int = Field(ge=1, le=MOST)
    judge: int = Field(ge=1, le=MOST)
    at: str = ""


def request(root: Path, changes: Sequence[str]) -> tuple[Desired, Desired]:
    """Write what `changes` ask for ("rollout=4", "judge=-1") to the run's scale.json. Returns (before, now).

    Raises ConfigError, and writes nothing, if the run cannot follow.
    """
    config = _scalable(root)
    before = desired(root, config)
    now = apply(before, changes)
    refuse_impossible(config, now)
    write_json(root / FILE, now.model_dump())
    return before, now


def apply(before: Desired, changes: Sequence[str]) -> Desired:
    """The counts after the changes, one after the other; +N and -N count from what is desired before."""
    counts: dict[str, int] = {"rollout": before.rollout, "judge": before.judge}
    for text in changes:
        change = _CHANGE.fullmatch(text)
        if change is None:
            raise ConfigError(f"{shown(text)} is not of the form role=N, role=+N or role=-N, e.g. rollout=+2.")
        role, sign, number = change["role"], change["sign"], int(change["number"])
        if role not in counts:
            raise ConfigError(f"{text!r}: {role} workers cannot be added or removed; these can: {', '.join(counts)}.")
        counts[role] = {"": number, "+": counts[role] + number, "-": counts[role] - number}[sign]
        if counts[role] < 1:
            raise ConfigError(f"{text!r} leaves {counts[role]} {role} workers: the last one cannot be removed.")
        if counts[role] > MOST:
            raise ConfigError(f"{text!r} asks for {counts[role]} {role} workers: {MOST} are the most.")
    return Desired(rollout=counts["rollout"], judge=counts["judge"], at=datetime.now(UTC).isoformat())


def desired(root: Path, config: Config) -> Desired:
    """What scale.json asks for, else the config's counts. Raises ConfigError for a file that does not make sense."""
    path = root / FILE
    try:
        return Desired.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Desired(rollout=config.rollout.num_workers, judge=config.judge.num_workers)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise ConfigError(f"{path} is not a pair of worker counts ({problems}); write it by `sppo scale`.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Remove it, or write it by `sppo scale`.") from None


def forget(root: Path) -> None:
    """The config's counts hold again."""
    (root / FILE).unlink(missing_ok=True)


def refuse_impossible(config: Config, wanted: Desired) -> None:
    """Raise ConfigError if the run's GPUs have no room for these counts. Who sits where was decided when it started: a
    judge with a GPU of its own does not move beside a rollout worker."""
    layout = compute_layout(config)
    if not layout.gpus:
        return
    learners, apart = layout.learner.workers, not layout.judges_share
    need = wanted.rollout + learners + (wanted.judge if apart else 0)
    if need > layout.gpus:
        judges = f", judge={wanted.judge}" if apart else ""
        raise ConfigError(
            f"rollout={wanted.rollout}{judges} and {learners} learner ranks need {need} GPUs, but the run has "
            f"cluster.gpus={layout.gpus}: ask for fewer."
        )
    if not apart and wanted.judge > wanted.rollout:
        raise ConfigError(
            f"judge={wanted.judge} but rollout={wanted.rollout}: this run's judges share the rollout workers' GPUs, one on "
            "each; ask for at most as many."
        )


def _scalable(root: Path) -> Config:
    """The config of a run that follows scale.json."""
    if not (root / "config.yaml").is_file():
        raise ConfigError(f"{root} is not a run directory: it has no config.yaml; give the run.dir of a running job.")
    config = load_config(root / "config.yaml")
    status = read_manifest(root).get("status")
    if status != "running":
        raise ConfigError(f"the run in {root} is not running (its manifest says {status}): there is nothing to scale.")
    if config.schedule.mode != "async":
        raise ConfigError(
            f"the run in {root} has schedule.mode={config.schedule.mode}, whose workers are fixed while it runs: stop it, "
            "and go on with another rollout.num_workers or judge.num_workers."
        )
    return config
