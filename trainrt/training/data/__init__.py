"""Text to batches: a corpus tokenized once, samples in an order that is a function of (seed, step)."""

from trainrt.training.data.batches import collate, digest_batch
from trainrt.training.data.corpus import Corpus, Samples, open_corpus
from trainrt.training.data.order import logical_shards, sample_ids

__all__ = ["Corpus", "Samples", "collate", "digest_batch", "logical_shards", "open_corpus", "sample_ids"]
