"""The reference says what the code does."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib

import jsonschema
import pytest

from tests.reference import FOLDER, validate
from trainrt.config import parse, to_toml
from trainrt.diagnostics.table import SUMMARY
from trainrt.launch.telemetry import RECORD_BYTES


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


def test_the_page_tells_summaries_byte_by_byte() -> None:
    """The table of fields in run_directory.md is that of the record."""
    page = (FOLDER / "run_directory.md").read_text()
    told: list[tuple[str, int, str]] = []
    for offset, number, letter, bits, names in re.findall(r"\| (\d+) \| (?:(\d+) x )?([uf])(\d+) \| (.*) \|", page):
        listed = re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", names.partition(":")[0]))
        assert len(listed) == int(number or 1), names
        size = int(bits) // 8
        told += [(name, int(offset) + size * at, f"<{letter}{size}") for at, name in enumerate(listed)]
    fields = SUMMARY.fields
    assert fields is not None and told == [(name, fields[name][1], fields[name][0].str) for name in SUMMARY.names or ()]
    assert SUMMARY.itemsize == RECORD_BYTES == 112
