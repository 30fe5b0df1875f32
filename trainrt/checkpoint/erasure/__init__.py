"""The erasure code of the snapshots kept in memory: k data shards, m parity shards, any k of them give back all."""
