"""Writes what can be derived from the code: config.schema.json and config.md. Run it after a change of the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from trainrt.config import JobConfig, MoeLmConfig, Section

HERE = Path(__file__).parent


def schema() -> str:
    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **JobConfig.model_json_schema()}
    return json.dumps(document, indent=1) + "\n"


def page() -> str:
    lines = [
        "# Config", "",
        "TOML; every key has a default, so three lines run. `--set table.key=value` overrides one. Generated from",
        "`trainrt/config/sections.py` by `docs/reference/generate.py`.", "",
    ]  # fmt: skip
    for name, field in JobConfig.model_fields.items():
        lines += _table(f"[{name}]", field.annotation)
        if name == "model":
            lines += _table("[model.config] of kind moe_lm", MoeLmConfig)
    return "\n".join(lines)


def _table(title: str, section: Any) -> list[str]:
    assert issubclass(section, Section)
    rows = ["## " + title, "", "| key | default | allowed |", "|---|---|---|"]
    for key, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        rows.append(f"| `{key}` | `{json.dumps(default)}` | {_allowed(field)} |")
    return [*rows, ""]


def _allowed(field: FieldInfo) -> str:
    limits = [limit for bound in field.metadata if (limit := _limit(bound))]
    return ", ".join([_type(field.annotation), *limits])


def _limit(bound: Any) -> str:
    for mark, name in ((">=", "ge"), (">", "gt"), ("<=", "le"), ("<", "lt")):
        if hasattr(bound, name):
            return f"{mark} {getattr(bound, name)}"
    return ""


def _type(annotation: Any) -> str:
    names = {str: "text", int: "whole number", float: "number", bool: "true, false", dict: "table"}
    if annotation in names:
        return names[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is not None and str(origin).endswith("Literal"):
        return ", ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (tuple, dict):
        return "two numbers" if origin is tuple else "table"
    return " or ".join(_type(argument) for argument in arguments)


if __name__ == "__main__":
    (HERE / "config.schema.json").write_text(schema())
    (HERE / "config.md").write_text(page())
