"""Arrays of many ranks in JSON: little-endian bytes in base64, so that 16,384 numbers are 87 KB and nothing is formatted."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray


def packed(values: NDArray[Any]) -> dict[str, Any]:
    """Whole numbers as u2 or u4 by their size, others as f4: {"type", "shape", "data"}."""
    whole = "<u2" if np.max(values, initial=0) < 1 << 16 else "<u4"
    kind = whole if np.issubdtype(values.dtype, np.integer) else "<f4"
    data = base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()
    return {"type": kind[1:], "shape": list(values.shape), "data": data}


def unpacked(document: dict[str, Any]) -> NDArray[Any]:
    """The array again."""
    data = base64.b64decode(document["data"])
    return np.frombuffer(data, dtype="<" + document["type"]).reshape(document["shape"])
