"""The config as a document: TOML with overrides in, a checked config out, and back; what is wrong, in words."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from trainrt.config.checks import problems
from trainrt.config.sections import JobConfig, MoeLmConfig
from trainrt.errors import ConfigError, nearest


def load(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a TOML file and `key=value` overrides. Relative paths in it start at its directory. Raises ConfigError."""
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    for override in overrides:
        _override(document, override)
    _resolve_paths(document, path.absolute().parent)
    return parse(document)


def parse(document: dict[str, Any]) -> JobConfig:
    """Validate a document. Raises ConfigError with one line for each thing that is wrong."""
    try:
        config = JobConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error))) from error
    if config.model.kind == "moe_lm":
        _check_sizes(config)
    found = list(problems(config, document))
    if found:
        raise ConfigError("\n".join(found))
    return config


def _check_sizes(config: JobConfig) -> None:
    if not isinstance(config.model.config, dict):
        raise ConfigError(f'model.config = "{config.model.config}": a moe_lm takes a table of sizes')
    try:
        _ = config.moe_lm
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, MoeLmConfig, "model.config."))) from error


def to_toml(config: JobConfig) -> str:
    """The resolved config as TOML; `parse` of it gives the same config."""
    return tomli_w.dumps(config.model_dump(mode="json"))


def _override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: allowed: key=value, such as run.steps=200")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, leaf = key.strip().split(".")
    table = document
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {name} is a value, not a table")
    table[leaf] = value


def _resolve_paths(document: dict[str, Any], base: Path) -> None:
    """Paths in a config start at the config's directory, wherever the command is run."""
    data, model = document.get("data", {}), document.get("model", {})
    if not isinstance(data, dict) or not isinstance(model, dict):
        return
    for table, key, words in ((data, "source", ("stdlib",)), (data, "tokenizer", ("bytes",)), (model, "config", ())):
        value = table.get(key)
        if isinstance(value, str) and value not in words and not Path(value).is_absolute():
            table[key] = str(base / value)


def _explain(error: ValidationError, root: type[BaseModel] = JobConfig, prefix: str = "") -> Iterator[str]:
    """pydantic's errors as one line each: key, value, what is allowed, the nearest spelling."""
    for entry in error.errors():
        parts = [
            str(part)
            for part in entry["loc"]
            if part not in ("int", "float", "str", "tuple") and "literal" not in str(part)
        ]
        key = prefix + ".".join(parts)
        if entry["type"] == "extra_forbidden":
            allowed = _allowed_keys(root, parts[:-1])
            where = f"[{prefix}{'.'.join(parts[:-1])}]" if parts[:-1] else "the config"
            yield f"{key}: unknown key{nearest(parts[-1], allowed)}; {where} takes {', '.join(allowed)}"
        elif entry["type"] == "literal_error":
            expected = entry["ctx"]["expected"]
            words = [word.strip("' ") for word in expected.replace(" or ", ",").split(",")]
            yield f"{key} = {entry['input']!r}{nearest(str(entry['input']), words)}; allowed: {expected}"
        else:
            yield f"{key} = {entry['input']!r}: {entry['msg'][0].lower()}{entry['msg'][1:]}"


def _allowed_keys(root: type[BaseModel], path: Sequence[str]) -> list[str]:
    model: Any = root
    for name in path:
        field = model.model_fields.get(name)
        if field is None:
            break
        model = field.annotation
    return list(getattr(model, "model_fields", {}))
