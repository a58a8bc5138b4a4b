"""Config files: YAML read safely, dotted overrides, fidelity presets, and errors a person can act on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sppo_ray.config import Config
from sppo_ray.errors import ConfigError
from sppo_ray.given import is_unicode, shown, user_path
from sppo_ray.presets import PRESETS, preset
from sppo_ray.secrets import HIDDEN, names_a_secret, without_secrets

# Values that name a file or folder when one exists there, and a hub name otherwise.
SOURCES = ("data.prompts", "policy.model", "judge.model", "evaluation.prompts")
LARGEST_FILE = 1 << 20  # bytes


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
    _refuse_unusable(given)
    fidelity = given.get("fidelity", "paper")
    if not isinstance(fidelity, str) or fidelity not in PRESETS:
        raise ConfigError(f"fidelity={shown(fidelity)} is not a preset; use one of {', '.join(PRESETS)}.")
    merged: dict[str, Any] = {}
    for key, value in preset(fidelity).items():
        _put(merged, key, value)
    _merge(merged, given)
    for key in (*SOURCES, "run.dir"):
        if isinstance(value := _get(merged, key), str):
            if not value.strip():
                raise ConfigError(f"{key}={value!r} is empty: name a {'folder' if key == 'run.dir' else 'source'}.")
            if key == "run.dir" and "://" in value:
                raise ConfigError(
                    f"run.dir={value} is not a folder: name one that all nodes share, and set run.mirror={value} for a copy there."
                )
            resolved = str(user_path(value).resolve()) if key == "run.dir" else resolve_source(value, base)
            _put(merged, key, resolved)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def resolve_source(value: str, base: Path | None) -> str:
    """An absolute path if `value` exists beside the config file or in the working directory, else `value` itself."""
    path = user_path(value)
    for candidate in (path,) if path.is_absolute() or base is None else (base / path, path):
        if user_path(candidate).exists():
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


class _Loader(yaml.SafeLoader):
    """Safe YAML without what a config has no use for: aliases, by which a few lines stand for a billion values, and a key
    given twice, of which YAML readers silently keep the last."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None,
                None,
                "aliases (*name) are not read here: write the value out",
                self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "merge keys (<<) are not read here: write the keys out", key.start_mark
                )
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key.value)} is given twice: keep one", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Plain data, by `_Loader`. Raises ValueError."""
    try:
        return yaml.load(text, _Loader)
    except (
        Exception
    ) as error:  # the constructors raise what they like: KeyError for `!!bool x`, ValueError for a 31st of June
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _parse(text: str, where: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not YAML: {error}.") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with user_path(path).open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist; the shipped ones are in configs/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read as text: {error}.") from None
    if len(content) > LARGEST_FILE:
        raise ConfigError(f"config file {path} has more than {LARGEST_FILE} bytes: it is not a config of this project.")
    data = _parse(text, f"config file {path}")
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path} holds {type(data).__name__}, not sections of keys and values.")
    for name, section in data.items():
        if name in Config.model_fields and name != "fidelity" and not isinstance(section, dict):
            raise ConfigError(
                f"config file {path}: section {name} holds {shown(section)}; give it keys, e.g. `{name}: {{}}`."
            )
    return data


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    told, name = shown(text), re.match(r"[\w.-]+", text)
    if name and names_a_secret(name[0]):  # what follows is not repeated
        told, value = f"'{name[0]}...'", HIDDEN
    if not equals or not key:
        raise ConfigError(f"override {told} is not of the form key.path=value, e.g. rollout.num_workers=2.")
    if key.count(".") > 1:
        raise ConfigError(f"override {told}: keys have two parts, section and name, e.g. rollout.num_workers=2.")
    return key, HIDDEN if value is HIDDEN else _parse(_number(value), f"override {told}: the value")


def _refuse_unusable(data: Mapping[Any, Any], prefix: str = "") -> None:
    """Values that no setting takes and that fail far from here: as paths, in the manifest or in a table."""
    for name, value in data.items():
        key = f"{prefix}{name}"
        if not isinstance(name, str):
            raise ConfigError(f"{prefix}{shown(name)} is a key that is not text: put it in quotes, or correct it.")
        if isinstance(value, str) and ("\0" in value or not is_unicode(value)):
            raise ConfigError(f"{key}={shown(value)} holds a NUL or half a surrogate pair: remove it.")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(f"{key} is a number of more than 63 bits: give a smaller one.")
        if isinstance(value, list):
            value = {str(n): entry for n, entry in enumerate(value)}
        if isinstance(value, Mapping):
            _refuse_unusable(value, f"{key}.")


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
    key = _key_of(location)
    if problem["type"] == "extra_forbidden":
        known = _fields_of(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {'.'.join([*location[:-1], close[0]])}?" if close else f"known here: {', '.join(known)}."
        value = HIDDEN if names_a_secret(key) else shown(without_secrets(problem["input"]))
        return f"{key}={value}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{key} is required; set it in the config file or as {key}=VALUE on the command line."
    if not key:
        return str(problem["msg"]).removeprefix("Value error, ")
    return f"{key}={shown(without_secrets(problem['input']))}: {problem['msg'][0].lower()}{problem['msg'][1:]}."


def _key_of(location: list[str]) -> str:
    """The dotted key, without the names that pydantic gives to the branches of a union."""
    for length in range(1, len(location)):
        if not _fields_of(location[:length]):
            numbers = (part for part in location[length:] if part.isdecimal())
            return ".".join([*location[:length], *numbers])
    return ".".join(location)


def _fields_of(location: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
