"""For which mesh a target is cut: what of `trainrt convert` says it, and which formats know it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from trainrt.errors import ConfigError, nearest

KNOWN = {
    "universal": (), "hf": (), "deepspeed": ("world", "zero_stage"), "deepspeed-universal": ("world", "zero_stage"), "dcp": (),
    "megatron": ("tp", "pp", "adam"), "megatron-dist": ("adam",),
}  # fmt: skip
"""What each format is cut by."""
ADAMS = ("fused", "torch")


@dataclass(frozen=True, slots=True)
class Shape:
    """None: not said. `tp`, `pp`: of `--mesh`; `world`: ranks of ZeRO; `adam`: which of Megatron's will load it."""

    tp: int | None = None
    pp: int | None = None
    world: int | None = None
    zero_stage: int | None = None
    adam: str | None = None

    @classmethod
    def parse(cls, mesh: str | None, *, world: int | None, zero_stage: int | None, adam: str | None = None) -> Shape:
        """From the command's options. Raises ConfigError with what is allowed."""
        sizes: dict[str, int] = {}
        for part in filter(None, (mesh or "").split(",")):
            axis, _, size = part.partition("=")
            if axis not in ("tp", "pp"):
                raise ConfigError(f"--mesh {mesh}: {axis!r}: allowed: tp, pp{nearest(axis, ('tp', 'pp'))}")
            if not size.isdigit() or int(size) < 1:
                raise ConfigError(f"--mesh {mesh}: {part!r}: a size of at least 1 is wanted, as in tp=2,pp=2")
            sizes[axis] = int(size)
        if world is not None and world < 1:
            raise ConfigError(f"--world {world}: at least 1")
        if zero_stage not in (None, 1, 2, 3):
            raise ConfigError(f"--zero-stage {zero_stage}: allowed: 1, 2, 3")
        if adam is not None and adam not in ADAMS:
            raise ConfigError(f"--adam {adam}: allowed: {', '.join(ADAMS)}{nearest(adam, ADAMS)}")
        return cls(sizes.get("tp"), sizes.get("pp"), world, zero_stage, adam)

    def check(self, to: str) -> None:
        """Refuse what a format has no use for. Raises ConfigError."""
        for field in fields(self):
            if getattr(self, field.name) is not None and field.name not in KNOWN[to]:
                option = f"--mesh {field.name}" if field.name in ("tp", "pp") else f"--{field.name.replace('_', '-')}"
                takes = [to for to, known in KNOWN.items() if field.name in known]
                raise ConfigError(f"{option}: --to {to} is not cut by it; it goes with {', '.join(takes)}")
