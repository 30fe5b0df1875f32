"""The reference says what the code does."""

from __future__ import annotations

import importlib.util
import json
import tomllib

import jsonschema
import pytest

from tests.reference import FOLDER, validate
from trainrt.config import parse, to_toml


def test_every_schema_is_one() -> None:
    for path in FOLDER.glob("*.schema.json"):
        jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text()))


def test_config_pages_are_current() -> None:
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (FOLDER / "config.schema.json").read_text() == generate.schema()
    assert (FOLDER / "config.md").read_text() == generate.page()


def test_a_config_is_valid_and_a_wrong_one_is_not() -> None:
    document = tomllib.loads(to_toml(parse({})))
    validate("config", document)
    document["run"]["stpes"] = 3
    with pytest.raises(jsonschema.ValidationError, match="stpes"):
        validate("config", document)
