"""trainrt: a distributed LLM training runtime with fault tolerance.

The names below load torch or Ray only when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "launch": "trainrt.launch",
    "plan": "trainrt.training.planning",
    "convert": "trainrt.checkpoint.convert",
    "Pipeline": "trainrt.training.pipeline",
    "predict": "trainrt.training.predict",
    "diagnose": "trainrt.diagnostics.diagnose",
}

__all__ = ["Pipeline", "convert", "diagnose", "launch", "plan", "predict"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'trainrt' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
