"""A checkpoint's model outside of any job."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import trainrt
from tests.jobs import job
from tests.state import Trained


@pytest.mark.parametrize("kind", ["moe_lm", "huggingface"])
def test_predict_gives_the_logits_of_the_checkpoints_model(kind: str, tmp_path: Path) -> None:
    path = Trained(job(kind, mesh={"fsdp": 2}), tmp_path, steps=2).checkpoint()
    sample = {"input_ids": np.arange(8), "labels": np.arange(8)}
    logits = trainrt.predict(path, [sample, sample])
    assert logits.shape == (2, 8, 64)
    torch.testing.assert_close(logits[0], logits[1])
    if kind == "huggingface":
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(path / "model")
        torch.testing.assert_close(logits[:1], theirs(torch.arange(8)[None]).logits)


def test_a_pipelines_predict_is_used(tmp_path: Path) -> None:
    path = Trained(job(), tmp_path, steps=1).checkpoint()
    pipeline = trainrt.Pipeline(predict=lambda model, batch: model(batch["input_ids"]).logits.argmax(-1).shape)
    assert trainrt.predict(path, [{"input_ids": np.arange(8), "labels": np.arange(8)}], pipeline) == (1, 8)
