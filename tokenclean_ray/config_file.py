"""A YAML file and `section.key=value` overrides → a `Config`, or what to write instead."""

from operator import attrgetter
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tokenclean_ray.config import SECTIONS, WITHOUT_REFERENCE, Config
from tokenclean_ray.errors import UserError, nearest

MERGE = "tag:yaml.org,2002:merge"  # <<, which may stand with the keys it brings
# command → keys that must be set; of alternatives in a tuple, one
REQUIRED: dict[str, tuple[str | tuple[str, ...], ...]] = {
    "clean": ("data.path", "model.base", ("model.reference", "data.warmup")),
    "sweep": ("data.path", "model.base", ("model.reference", "data.warmup")),
    "train": ("train.data", ("train.model", "model.base")),
    "evolve": ("data.path", "model.base"),
}


def load_config(path: str, overrides: list[str], command: str = "clean") -> Config:
    """Read a YAML file, apply overrides, validate for a command.

    Args:
        path: a local YAML file.
        overrides: `section.key=value`, the value in YAML syntax.

    Raises:
        UserError: a missing file, bad YAML, an unknown key or a value out of range, with what to write instead.
    """
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{path} is a folder: give the YAML file that its run was started from")
    if not file.is_file():
        raise UserError(f"config file {path} does not exist{nearest(path, map(str, file.parent.glob('*.y*ml')))}")
    values = read_yaml(file, path)
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys such as output:, data: and model:")
    for override in overrides:
        _apply(values, override)
    return build_config(values, command)


def build_config(values: dict[str, Any], command: str = "clean") -> Config:
    """Validate a nested mapping for a command; raises `UserError` with one line for every problem."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, Config)) from error
    missing = []
    for wanted in REQUIRED[command]:
        keys = (wanted,) if isinstance(wanted, str) else wanted
        if "model.reference" in keys and config.select.scorer in WITHOUT_REFERENCE:
            continue
        if not any(attrgetter(key)(config) for key in keys):
            missing.append(f"{keys[0]} is missing: set it in the config or as {' or '.join(f'{k}=…' for k in keys)}")
    if config.score.backend == "vllm" and (config.select.scorer == "entropy" or config.select.gate_on != "loss"):
        missing.append("vLLM gives losses alone: set score.backend: transformers, or a scorer that reads no more")
    if command != "train" and config.select.gate == "auto" and not (config.data.held_out or config.data.warmup):
        missing.append("select.gate: auto is read from clean rows: set data.held_out or data.warmup, or a number")
    if command in ("evolve", "sweep") and config.select.cut:
        missing.append(f"select.cut is for clean, and {command} looks for cuts: set select.cut=null")
    models = (config.model.base, config.model.reference, config.train.model)
    for name in config.model.trust_remote_code:
        if name not in models:
            missing.append(
                f"model.trust_remote_code: {name} is no model of this config{nearest(name, filter(None, models))}"
            )
    if missing:
        raise UserError("; ".join(missing))
    return config


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise UserError(f"override {override!r}: {section} is a value, not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: {text!r} is not valid YAML") from error


class _Loader(yaml.SafeLoader):
    """Of two equal keys YAML's own takes the second, and what stood under the first would be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found: dict[str, int] = {}
        for key, _ in node.value:
            name, line = key.value, key.start_mark.line + 1
            if not isinstance(name, str) or key.tag == MERGE:
                continue
            if name in found:
                raise yaml.constructor.ConstructorError(
                    f"{name} is there twice, in lines {found[name]} and {line}: join them"
                )
            found[name] = line
        return super().construct_mapping(node, deep)


def read_yaml(file: Path, named: str) -> Any:
    """The value of a YAML file, which errors call `named`.

    Raises:
        UserError: it is none, or a key stands twice in a mapping.
    """
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{named} is not valid YAML: {' '.join(str(error).split())}") from error


def explain(error: ValidationError, of: type[BaseModel]) -> str:
    """What is wrong with the values of a model, in one line."""
    return "; ".join(dict.fromkeys(_explain(one, of) for one in error.errors()))


def _explain(error: Any, of: type[BaseModel]) -> str:
    # the location of a union's branch ends in the branch's name, which no user wrote
    location = [part for part in error["loc"] if isinstance(part, str) and part.isidentifier() and part != "bool"]
    key = ".".join(location)
    if error["type"] == "missing" and isinstance(error["loc"][-1], str):
        return f"{key} is missing: set it in the config or as {key}=…"
    if error["type"] == "extra_forbidden":
        section: Any = of
        *sections, last = error["loc"]
        for part in sections:
            if isinstance(part, str):
                found = section.model_fields[part].annotation
                section = next((kind for kind in get_args(found) if kind is not type(None)), found)  # Calibrate | None
        known = list(section.model_fields)
        name = ".".join(map(str, error["loc"]))
        within = [part for part, inner in SECTIONS.items() if of is Config and last in inner.model_fields]
        if not sections and within:
            return f"unknown key {name}; did you mean {' or '.join(f'{part}.{last}' for part in within)}?"
        return f"unknown key {name}" + (nearest(last, known) or f"; known here: {', '.join(known)}")
    return f"{key}: {error['msg'].removeprefix('Value error, ')} (it is {error['input']!r})"
