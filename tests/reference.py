"""Validation against the schemas of docs/reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

FOLDER = Path(__file__).parents[1] / "docs" / "reference"


def validate(name: str, document: Any) -> None:
    """Raise where a document is not what docs/reference/NAME.schema.json says."""
    schema = json.loads((FOLDER / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(document)
