"""The form of manifest.json: what is refused before anything in it is used (docs/reference/manifest.schema.json)."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainrt.errors import CheckpointError
from trainrt.parallel.layout import ITEM_BYTES

Count = Annotated[int, Field(ge=0)]
STRICT = ConfigDict(extra="forbid", strict=True)


class FileForm(BaseModel):
    model_config = STRICT
    bytes: Count
    xxh3: str
    header_bytes: Count | None


class ChunkForm(BaseModel):
    model_config = STRICT
    offset: Count
    length: Count
    stored: Count
    codec: str
    xxh3: str


class TensorForm(BaseModel):
    """Its chunks hold it to the byte."""

    model_config = STRICT
    name: str
    role: Annotated[str, Field(pattern=r"^\w+$")]
    dtype: str
    shape: list[Count]
    alias_of: str | None
    file: str | None
    chunks: list[ChunkForm]

    @model_validator(mode="after")
    def _whole(self) -> TensorForm:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype {self.dtype!r}; allowed: {', '.join(ITEM_BYTES)}")
        item = ITEM_BYTES[self.dtype]
        wanted = math.prod(self.shape) * item if self.alias_of is None else 0
        if sum(chunk.length for chunk in self.chunks) != wanted or any(chunk.length % item for chunk in self.chunks):
            raise ValueError(f"{self.name} ({self.role}): its chunks are not the {wanted} bytes of its shape")
        if any(chunk.codec == "none" and chunk.stored != chunk.length for chunk in self.chunks):
            raise ValueError(f"{self.name} ({self.role}): a chunk that is not compressed is stored in another length")
        return self


class ManifestForm(BaseModel):
    """Every tensor once, in a file of the manifest, or tied to one that is."""

    model_config = STRICT
    form: Literal["trainrt-universal/1"] = Field(alias="schema")
    writer: str
    step: Count
    run_id: str
    files: dict[str, FileForm]
    tensors: list[TensorForm]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    data: dict[str, Any]
    rng: dict[str, Any]
    config: dict[str, Any]
    plan_sha256: Any
    mixtures: list[dict[str, Any]] = []

    @model_validator(mode="after")
    def _consistent(self) -> ManifestForm:
        seen: set[tuple[str, str]] = set()
        stored = {tensor.name for tensor in self.tensors if tensor.alias_of is None}
        for tensor in self.tensors:
            key = tensor.name, tensor.role
            if key in seen:
                raise ValueError(f"{tensor.name} ({tensor.role}) stands in it twice")
            seen.add(key)
            if tensor.alias_of is not None and tensor.alias_of not in stored:
                raise ValueError(f"{tensor.name} is tied to {tensor.alias_of}, which is not in it")
            if tensor.alias_of is None and self.files.get(tensor.file or "", FILELESS).header_bytes is None:
                raise ValueError(
                    f"{tensor.name} ({tensor.role}) is in {tensor.file}, which is no file of tensors in it"
                )
        return self


FILELESS = FileForm(bytes=0, xxh3="", header_bytes=None)


def check_form(manifest: Any, what: str) -> None:
    """Raises CheckpointError with the place in the manifest and what is wrong there."""
    try:
        ManifestForm.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{what}: {where + ': ' if where else ''}{first['msg']}") from error
