"""A mapping as its author writes it: a short TOML file, or a Python file with the same in a dictionary `MAPPING`.

format = "mine"
files = "shards/rank_{tp}.pt"              # braces: the mesh axes; .safetensors, or what torch.save writes
inside = "model"                           # where in a pickled file the tensors are; left out: at its top

[variables]
heads = 8                                  # numbers, or names of config.json's entries: "num_attention_heads"

[[tensor]]
stored = "layers.{l}.mlp.w_out"
holds = 'transpose(shard("model.layers.{l + first}.mlp.down_proj.weight", axis="tp", dim=1))'

[[tensor]]
stored = "layers.{l}.mlp.w_out"
role = "row_var"                           # state that has another shape than its parameter lies in files otherwise
holds = '"model.layers.{l + first}.mlp.down_proj.weight"'

[roles]                                    # where else: state of the optimizer, by the stored name of its parameter
exp_avg = "optimizer.{name}.m"
row_var = "optimizer.{name}.r"

[counts]                                   # what is numbered anew: how many come before, in the order of axes
first = {of = "l", over = ["vpp", "pp"]}   # or of placeholders; without it, `first` counts over pp
first_expert = {of = "e", over = ["ep"]}
"""

from __future__ import annotations

import re
import runpy
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from trainrt.checkpoint.mapping.language import BRACES
from trainrt.checkpoint.mapping.rules import Local, Rule, StoredArray
from trainrt.errors import ConfigError

Role = Annotated[str, StringConstraints(pattern=r"^\w+$")]
"""It becomes a part of a file's name."""


class TensorRule(BaseModel):
    model_config = ConfigDict(extra="forbid")
    stored: str
    holds: str
    on: dict[str, int] = {}
    role: Role | None = None


class Count(BaseModel):
    """How many values of the placeholder `of` come before, in the order of axes or placeholders (`over`)."""

    model_config = ConfigDict(extra="forbid")
    of: str
    over: Annotated[list[str], Field(min_length=1)]

    def place(self, values: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(values.get(axis, 0) for axis in self.over)


FIRST = {"first": Count(of="l", over=["pp"])}


class Description(BaseModel):
    """See the module."""

    model_config = ConfigDict(extra="forbid")
    format: str
    files: str
    inside: str = ""
    variables: dict[str, int | str] = {}
    tensor: Annotated[list[TensorRule], Field(min_length=1)]
    roles: dict[Role, str] = {}
    counts: dict[str, Count] = {}

    @classmethod
    def load(cls, path: Path) -> Description:
        """Raises ConfigError with the file, the key and what is allowed."""
        try:
            document = _program(path) if path.suffix == ".py" else tomllib.loads(path.read_text())
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"--mapping {path}: {where}: {first['msg'].lower()}") from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"--mapping {path}: {error}") from error

    @property
    def rules(self) -> list[Rule]:
        return [Rule(rule.stored, rule.holds, rule.on, rule.role) for rule in self.tensor]

    def numbers(self, config: Mapping[str, Any]) -> dict[str, int]:
        """The variables' values; names are looked up in the model's config. Raises ConfigError for one that is not there."""
        found = {}
        for name, value in self.variables.items():
            number = config.get(value) if isinstance(value, str) else value
            if not isinstance(number, int):
                raise ConfigError(
                    f"mapping: variable {name} = {value!r}: not a number of config.json (--model-config gives one)"
                )
            found[name] = number
        return found

    def places(self, root: Path) -> list[tuple[Path, dict[str, int]]]:
        """The files, and where each sits in the mesh. Raises ConfigError for a template that is none."""
        parts = BRACES.split(self.files)
        axes = parts[1::2]
        if len(set(axes)) != len(axes) or not all(axis.isidentifier() for axis in axes):
            raise ConfigError(f"mapping: files = {self.files!r}: in braces stand the mesh's axes, each once")
        pattern = re.compile(
            "".join(rf"(?P<{part}>\d+)" if number % 2 else re.escape(part) for number, part in enumerate(parts))
        )
        found = []
        for path in sorted(root.rglob("*")):
            match = pattern.fullmatch(str(path.relative_to(root)))
            if match is not None and path.is_file():
                found.append((path, {axis: int(index) for axis, index in match.groupdict().items()}))
        return found

    def role_of(self, name: str) -> tuple[str, str]:
        """(role, stored name of the parameter) of what a file calls `name`."""
        for role, template in self.roles.items():
            before, _, after = template.partition("{name}")
            if name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after):
                return role, name[len(before) : len(name) - len(after)]
        return "parameter", name

    def local(self, arrays: list[StoredArray]) -> Local:
        """The counts' values for an array, by where it is and by its placeholders."""
        counts = FIRST | self.counts
        seen: dict[str, dict[tuple[int, ...], int]] = {name: {} for name in counts}
        rules = self.rules
        for array in arrays:
            for values in filter(None, (rule.matches(array.name) for rule in rules)):
                for name, count in counts.items():
                    place = count.place({**values, **array.at})
                    seen[name][place] = max(seen[name].get(place, 0), values.get(count.of, -1) + 1)
        before = {
            name: {place: sum(n for other, n in held.items() if other < place) for place in held}
            for name, held in seen.items()
        }
        return lambda at: {name: before[name].get(count.place(at), 0) for name, count in counts.items()}


def _program(path: Path) -> Any:
    """What a Python file has as MAPPING. Raises ConfigError with what went wrong in it."""
    try:
        return runpy.run_path(str(path))["MAPPING"]
    except KeyError as error:
        raise ConfigError(f"--mapping {path}: no {error.args[0]} in it") from error
    except Exception as error:
        raise ConfigError(f"--mapping {path}: {type(error).__name__}: {error}") from error
