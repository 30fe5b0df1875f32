"""trainrt: a distributed LLM training runtime with fault tolerance."""

__version__ = "0.1.0"
