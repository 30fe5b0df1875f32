"""The universal checkpoint (Universal Checkpointing, arXiv 2406.18820): one format, any topology."""

from trainrt.checkpoint.reader import Universal, read_manifest
from trainrt.checkpoint.writer import WritePlan, complete, finish, newest, prepare, prune, write, write_part

__all__ = [
    "Universal", "WritePlan", "complete", "finish", "newest", "prepare", "prune", "read_manifest", "write", "write_part",
]  # fmt: skip
