"""Corpora: tokenized once, split by content, packed, and in an order that is a function of (seed, step)."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainrt.config import DataConfig
from trainrt.errors import DataError
from trainrt.training.data import Corpus, collate, digest_batch, logical_shards, open_corpus, sample_ids


def corpus(tmp_path: Path, source: str | Path, **keys: object) -> Corpus:
    settings_ = {"sequence_length": 8, "validation_fraction": 0.0, **keys}
    return open_corpus(DataConfig.model_validate({"source": str(source), **settings_}), tmp_path / "cache")


def texts(tmp_path: Path, *contents: str) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir(exist_ok=True)
    for index, content in enumerate(contents):
        (folder / f"{index:03d}.txt").write_text(content)
    return folder


def test_samples_are_the_documents_in_order_with_ends_between(tmp_path: Path) -> None:
    made = corpus(tmp_path, texts(tmp_path, "hello", "world!", "and more text"))
    expected = [*b"hello", 256, *b"world!", 256, *b"and more text", 256]
    seen = np.concatenate([made.train[i]["input_ids"] for i in range(len(made.train))])
    assert list(seen) == expected[: len(seen)]
    first = made.train[0]
    assert list(first["labels"]) == [*b"ello", 256, -100, *b"or"], "what follows an end belongs to another document"


def test_unigram_entropy_is_that_of_the_training_tokens(tmp_path: Path) -> None:
    made = corpus(tmp_path, texts(tmp_path, "aaab" * 4))
    counts = Counter([*b"aaab" * 4, 256])
    total = sum(counts.values())
    assert made.unigram_entropy == pytest.approx(-sum(n / total * math.log(n / total) for n in counts.values()))


def test_directories_globs_and_jsonl_are_sources(tmp_path: Path) -> None:
    folder = texts(tmp_path, "x" * 20)
    (folder / "more.jsonl").write_text(json.dumps({"text": "y" * 20}) + "\n" + json.dumps("z" * 20) + "\n\n")
    (folder / "ignored.bin").write_bytes(b"\0" * 100)
    everything = corpus(tmp_path, folder)
    seen = {int(token) for i in range(len(everything.train)) for token in everything.train[i]["input_ids"]}
    assert seen == {ord("x"), ord("y"), ord("z"), 256}
    assert len(corpus(tmp_path, folder / "*.jsonl").train) == (42 - 1) // 8


def test_a_tokenizer_file_is_used_and_its_end_of_text_too(tmp_path: Path) -> None:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<unk>": 2, "</s>": 3}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    found = corpus(
        tmp_path, texts(tmp_path, "a b a b a b c"), tokenizer=str(tmp_path / "tokenizer.json"), sequence_length=7
    )
    assert (found.vocabulary_size, found.end_of_text) == (4, 3)
    assert list(found.train[0]["input_ids"]) == [0, 1, 0, 1, 0, 1, 2]


def test_changed_content_makes_another_cache_and_unchanged_content_none(tmp_path: Path) -> None:
    folder = texts(tmp_path, "x" * 50)
    first = corpus(tmp_path, folder)
    assert corpus(tmp_path, folder).digest == first.digest
    (folder / "000.txt").write_text("y" * 50)
    os.utime(folder / "000.txt", ns=(1, 1))
    second = corpus(tmp_path, folder)
    assert second.digest != first.digest
    assert second.train[0]["input_ids"][0] == ord("y")
    assert len(list((tmp_path / "cache" / "corpora").glob("[0-9a-f]*"))) == 2


def _open(folder: str, cache: str) -> str:
    return open_corpus(DataConfig(source=folder, sequence_length=8), Path(cache)).digest


def test_ranks_that_start_together_agree(tmp_path: Path) -> None:
    folder = texts(tmp_path, *["some text" * 50] * 20)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        digests = pool.starmap(_open, [(str(folder), str(tmp_path / "cache"))] * 3)
    assert len(set(digests)) == 1
    assert not list((tmp_path / "cache" / "corpora").glob(".[0-9a-f]*")), "nothing half-written is left"


def test_the_split_is_by_document_and_adding_one_moves_none(tmp_path: Path) -> None:
    def held_out(contents: list[str]) -> set[int]:
        made = corpus(tmp_path, texts(tmp_path, *contents), validation_fraction=0.3, sequence_length=2)
        return {int(t) for i in range(len(made.validation)) for t in made.validation[i]["input_ids"]} - {256}

    letters = [chr(ord("a") + i) * 12 for i in range(20)]
    before = held_out(letters)
    assert 0 < len(before) < 20
    assert held_out([*letters, "Z" * 12]) - {ord("Z")} == before


@pytest.mark.parametrize(
    ("contents", "message"),
    [([""], "empty"), (["abc"], "sequence_length = 8"), ([], "holds no documents")],
)
def test_too_little_text_is_refused(tmp_path: Path, contents: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        corpus(tmp_path, texts(tmp_path, *contents))


def test_a_bad_line_of_jsonl_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n{"txt": 3}\n')
    with pytest.raises(DataError, match=r"x.jsonl:2"):
        corpus(tmp_path, tmp_path / "x.jsonl")


def test_an_unreadable_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        corpus(tmp_path, texts(tmp_path, "x" * 20), tokenizer=str(tmp_path / "t.json"))


@given(st.integers(1, 3000), st.integers(1, 64), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_each_epoch_holds_each_sample_once(length: int, batch: int, seed: int) -> None:
    steps = -(-2 * length // batch)
    ids = np.concatenate([sample_ids(seed, step, global_batch=batch, length=length) for step in range(steps)])
    assert sorted(ids[:length]) == list(range(length))
    assert sorted(ids[length : 2 * length]) == list(range(length))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return list(sample_ids(seed, epoch, global_batch=500, length=500))

    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != list(range(500))
    assert order(3, 7) == order(3, 7)


def test_logical_shards_cut_the_step() -> None:
    shards = logical_shards(0, 5, global_batch=12, microbatch=4, length=100)
    assert [len(shard) for shard in shards] == [4, 4, 4]
    assert list(np.concatenate(shards)) == list(sample_ids(0, 5, global_batch=12, length=100))


def test_the_digest_of_a_batch_tells_one_token(tmp_path: Path) -> None:
    made = corpus(tmp_path, texts(tmp_path, "x" * 100))
    batch = collate([made.train[0], made.train[1]])
    assert batch["input_ids"].shape == (2, 8)
    before = digest_batch(batch)
    batch["labels"][1, 3] += 1
    assert digest_batch(batch) != before
