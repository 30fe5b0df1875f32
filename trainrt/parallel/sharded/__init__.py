"""Sharded execution: global shapes outside, local tensors inside."""
