"""Config files: YAML read safely, dotted overrides, fidelity presets, and errors a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sppo_ray.config import Config
from sppo_ray.errors import ConfigError
from sppo_ray.presets import PRESETS, preset

# Values that name a file or folder when one exists there, and a hub name otherwise.
SOURCES = ("data.prompts", "policy.model", "judge.model", "evaluation.prompts")


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file with `key.path=value` overrides on top and the fidelity preset underneath.

    Paths become absolute at once, since Ray jobs and Ray Train change the working directory. Raises ConfigError.
    """
    given = _read_yaml(path)
    for text in overrides:
        key, value = _parse_override(text)
        _put(given, key, value)
    return build_config(given, base=path.resolve().parent)


def build_config(given: dict[str, Any], base: Path | None = None) -> Config:
    """Validate plain data into a Config. `base` is tried first for relative source paths."""
    fidelity = given.get("fidelity", "paper")
    if fidelity not in PRESETS:
        raise ConfigError(f"fidelity={fidelity!r} is not a preset; use one of {', '.join(PRESETS)}.")
    merged: dict[str, Any] = {}
    for key, value in preset(fidelity).items():
        _put(merged, key, value)
    _merge(merged, given)
    for key in SOURCES:
        if isinstance(value := _get(merged, key), str):
            _put(merged, key, resolve_source(value, base))
    if isinstance(value := _get(merged, "run.dir"), str):
        _put(merged, "run.dir", str(Path(value).expanduser().resolve()))
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def resolve_source(value: str, base: Path | None) -> str:
    """An absolute path if `value` exists beside the config file or in the working directory, else `value` itself."""
    path = Path(value).expanduser()
    for candidate in (path,) if path.is_absolute() or base is None else (base / path, path):
        if candidate.exists():
            return str(candidate.resolve())
    return value


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def dump_config(config: Config) -> str:
    """The resolved config as YAML; `load_config` of it gives an equal Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def preset_overrides(config: Config) -> dict[str, dict[str, Any]]:
    """What differs from the fidelity preset, for the manifest: {key: {"preset": ..., "used": ...}}."""
    used = flatten(config.model_dump(mode="json"))
    return {
        key: {"preset": value, "used": used[key]}
        for key, value in preset(config.fidelity).items()
        if used[key] != value
    }  # fmt: skip


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist; the shipped ones are in configs/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read as text: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path} holds {type(data).__name__}, not sections of keys and values.")
    for name, section in data.items():
        if name in Config.model_fields and name != "fidelity" and not isinstance(section, dict):
            raise ConfigError(
                f"config file {path}: section {name} holds {section!r}; give it keys, e.g. `{name}: {{}}`."
            )
    return data


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not of the form key.path=value, e.g. rollout.num_workers=2.")
    try:
        return key, yaml.safe_load(_number(value))
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not YAML: {' '.join(str(error).split())}.") from None


def _number(value: str) -> str:
    # YAML 1.1 reads 5e-7 as text, which is the usual way to write a learning rate.
    try:
        return repr(float(value)) if "e" in value.lower() else value
    except ValueError:
        return value


def _get(data: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        if not isinstance(data, Mapping) or part not in data:
            return None
        data = data[part]
    return data


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for part in sections:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"key {key!r}: {part!r} is a value, not a section.")
    data[last] = value


def _merge(into: dict[str, Any], given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _explain(error: ValidationError) -> str:
    """All problems, one a line: key, value, remedy."""
    return "\n".join(_explain_one(dict(problem)) for problem in error.errors())


def _explain_one(problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _fields_of(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {'.'.join([*location[:-1], close[0]])}?" if close else f"known here: {', '.join(known)}."
        return f"{key}={problem['input']!r}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{key} is required; set it in the config file or as {key}=VALUE on the command line."
    if not key:
        return str(problem["msg"]).removeprefix("Value error, ")
    return f"{key}={problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}."


def _fields_of(location: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
