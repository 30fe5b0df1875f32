"""A mapping as its author writes it: a short TOML file, or a Python file with the same in a dictionary `MAPPING`.

    format = "mine"
    files = "shards/rank_{tp}.pt"              # braces: the mesh axes; .safetensors, or what torch.save writes
    inside = "model"                           # where in a pickled file the tensors are; left out: at its top

    [variables]
    heads = 8                                  # numbers, or names of config.json's entries: "num_attention_heads"

    [[tensor]]
    stored = "layers.{l}.mlp.w_out"
    holds = 'transpose(shard("model.layers.{l + first}.mlp.down_proj.weight", axis="tp", dim=1))'

    [roles]                                    # where else: state of the optimizer, by the stored name of its parameter
    exp_avg = "optimizer.{name}.m"

With an axis `pp`, `first` is the number of layers (placeholder `l`) that earlier stages have.
"""

from __future__ import annotations

import re
import runpy
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainrt.checkpoint.mapping.language import BRACES
from trainrt.checkpoint.mapping.rules import Rule, StoredArray
from trainrt.errors import ConfigError


class TensorRule(BaseModel):
    model_config = ConfigDict(extra="forbid")
    stored: str
    holds: str
    on: dict[str, int] = {}


class Description(BaseModel):
    """See the module."""

    model_config = ConfigDict(extra="forbid")
    format: str
    files: str
    inside: str = ""
    variables: dict[str, int | str] = {}
    tensor: Annotated[list[TensorRule], Field(min_length=1)]
    roles: dict[str, str] = {}

    @classmethod
    def load(cls, path: Path) -> Description:
        """Raises ConfigError with the file, the key and what is allowed."""
        try:
            document = runpy.run_path(str(path))["MAPPING"] if path.suffix == ".py" else tomllib.loads(path.read_text())
            return cls.model_validate(document)
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"--mapping {path}: {error}") from error
        except KeyError as error:
            raise ConfigError(f"--mapping {path}: no {error.args[0]} in it") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"--mapping {path}: {where}: {first['msg'].lower()}") from error

    @property
    def rules(self) -> list[Rule]:
        return [Rule(rule.stored, rule.holds, rule.on) for rule in self.tensor]

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
        """The files, and where each sits in the mesh."""
        pattern = re.compile(
            "".join(
                rf"(?P<{part}>\d+)" if number % 2 else re.escape(part)
                for number, part in enumerate(BRACES.split(self.files))
            )
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

    def layers_before(self, arrays: list[StoredArray]) -> dict[int, int]:
        """How many layers the stages before each one hold."""
        counts: dict[int, int] = {}
        for array in arrays:
            for rule in self.rules:
                values = rule.matches(array.name) or {}
                stage = array.at.get("pp", 0)
                counts[stage] = max(counts.get(stage, 0), values.get("l", -1) + 1)
        return {stage: sum(count for other, count in counts.items() if other < stage) for stage in counts}
