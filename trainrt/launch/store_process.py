"""The store of a node, as its agent has it: started, started again whenever it dies, given its lease, and ended."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from trainrt.errors import StoreError
from trainrt.launch.orders import AgentOrders, Spawn, Tell
from trainrt.launch.processes import kill, when_ended

STORE_BYTES = 1 << 20
"""With less shared memory a store cannot even say why it does not start."""


class StoreProcess:
    """At most one process. over: the agent ends everything, and nothing is started again."""

    def __init__(self, orders: AgentOrders, *, tell: Tell, spawn: Spawn, over: asyncio.Event) -> None:
        self._orders, self._tell, self._spawn, self._over = orders, tell, spawn, over
        self._address: Any = None
        self._admin: Any = None

    @property
    def pid(self) -> int | None:
        """None where none runs."""
        return None if self._address is None else int(self._address.pid)

    def record(self) -> dict[str, str] | None:
        """Where it is found."""
        if self._address is None:
            return None
        return {"socket": str(self._address.socket), "address": self._address.address}

    async def start(self) -> None:
        """Raises StoreError where it does not start."""
        from trainrt.checkpoint.store import admin
        from trainrt.checkpoint.store.slots import memory_bytes

        orders = self._orders
        if memory_bytes(orders.run_id) < STORE_BYTES:
            raise StoreError(f"{orders.node}: /dev/shm is full")
        address = await asyncio.to_thread(
            admin.spawn, orders.run_id, orders.node,
            grace_seconds=orders.grace_seconds, token=orders.secret, host=orders.host,
        )  # fmt: skip
        self._address, self._admin = address, admin.StoreAdmin(address.address, orders.secret)
        when_ended(address.pid, lambda: self._spawn(self._on_end()))

    async def _on_end(self) -> None:
        if self._over.is_set():
            return
        self._address = self._admin = None
        self._tell({"type": "store_ended"})
        try:
            await self.start()
        except (StoreError, OSError) as error:
            self._tell({"type": "store_failed", "message": str(error)})
            return
        self._tell({"type": "store_started", "store": self.record()})

    async def renew(self) -> dict[str, list[float]]:
        """Renew the lease. Returns what it measured of links, nothing where it cannot be reached."""
        with suppress(StoreError, OSError):
            if self._admin is not None:
                return await asyncio.to_thread(self._admin.renew)
        return {}

    def kill(self) -> None:
        """SIGKILL; another one is started as after any death of it."""
        kill(self.pid)

    async def shutdown(self) -> None:
        """End it, its memory too."""
        if self._admin is not None:
            with suppress(StoreError, OSError):
                await asyncio.to_thread(self._admin.shutdown)
