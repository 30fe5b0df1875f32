"""The snapshot store: a daemon per node that holds generations in shared memory (docs/recovery.md)."""
