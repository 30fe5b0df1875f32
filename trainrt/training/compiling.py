"""When torch.compile compiles: a step in which it does is no usual one."""

from __future__ import annotations

import sys
from typing import Any

from trainrt.events import ring


def record_compilation() -> None:
    """Have compilations inside a step recorded, where torch.compile is loaded (workers come with it)."""
    dynamo = sys.modules.get("torch._dynamo.callback")
    if dynamo is not None and _begins not in dynamo.callback_handler.start_callbacks:
        dynamo.callback_handler.register_start_callback(_begins)
        dynamo.callback_handler.register_end_callback(_ends)


def _begins(_: Any) -> None:
    if ring.depth:
        ring.begin("compile", "compile")


def _ends(_: Any) -> None:
    if ring.innermost == "compile":
        ring.end()
