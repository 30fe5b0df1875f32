"""A model that a restore will fill is the model that was trained, parameter by parameter."""

from __future__ import annotations

import pytest

from tests.jobs import job
from trainrt.training.blueprint import blueprint_of
from trainrt.training.models.build import build, build_meta
from trainrt.training.pipeline import Pipeline

SMALL = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
TIED = {
    "gpt2": {**SMALL, "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2},
    "falcon": {**SMALL, "model_type": "falcon", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
}


@pytest.mark.parametrize("kind", TIED)
def test_ties_do_not_depend_on_initial_values(kind: str) -> None:
    config = job("huggingface", model={"config": TIED[kind]})
    names = [name for name, _ in build(config, fresh=True).named_parameters()]
    assert len(names) < len(build(config, fresh=True).state_dict()), "negative control: something is tied"
    for made in (build(config, fresh=False), build_meta(config), blueprint_of(config, Pipeline()).make()):
        assert [name for name, _ in made.named_parameters()] == names
