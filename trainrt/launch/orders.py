"""What a driver tells an agent when it starts it, and what kinds of things the agent's parts pass on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]
Tell = Callable[[Event], None]
"""Keeps an event for the driver."""
Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
"""Runs a coroutine beside the others, and holds its task."""


@dataclass(frozen=True, slots=True)
class AgentOrders:
    """What an agent needs to know of the run. `entry` ("module:function") is what a worker runs."""

    run_dir: str
    run_id: str
    node: str
    secret: str
    grace_seconds: float
    entry: str
    preload: tuple[str, ...]
    host: str
