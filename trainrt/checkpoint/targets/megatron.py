"""Megatron-LM's checkpoints, classic (cut for tp x pp) and torch_dist (for any mesh). What is in them: see formats.megatron.

Layers have the names of those of Transformer Engine, which is Megatron's default. The optimizer is the one that is not
distributed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainrt.checkpoint.formats.dcp_items import METADATA
from trainrt.checkpoint.formats.megatron import FILE, LATEST
from trainrt.checkpoint.formats.megatron_dist import BACKEND, COMMON, LAYERS
from trainrt.checkpoint.formats.megatron_model import EMBEDDING, OUTPUT, Facts, Parameter
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.mapping.rules import Rule, StoredArray, compile_writing
from trainrt.checkpoint.targets.array import TargetArray
from trainrt.checkpoint.targets.files import FilesTarget, TargetFile
from trainrt.checkpoint.targets.megatron_optimizer import Arrays, Optimizer
from trainrt.checkpoint.targets.shape import Shape
from trainrt.checkpoint.targets.skeleton import Skeleton
from trainrt.checkpoint.targets.target import Target
from trainrt.checkpoint.targets.training import Training
from trainrt.errors import CheckpointError, ConfigError
from trainrt.parallel.layout import LogicalTensor

KINDS = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
"""The models whose layers are those of megatron-core's GPTModel."""
LOCAL = ("input_layernorm.", "pre_mlp_layernorm.")
DIVISIBLE = 128
"""Megatron's default of `make_vocab_size_divisible_by`."""
STATE = {"master": "fp32_param"}
CUT_NORM = "mlp.linear_fc1.layer_norm_"
ORDER = (
    "self_attention.linear_proj.", "self_attention.linear_qkv.layer_norm_", "self_attention.linear_qkv.",
    "self_attention.q_layernorm.", "self_attention.k_layernorm.", "pre_mlp_layernorm.", "mlp.router.", "mlp.experts.",
    CUT_NORM, "mlp.linear_fc1.", "mlp.linear_fc2.",
)  # fmt: skip
"""A layer's parameters as its modules register them. The optimizer's numbers go by it."""
BACKENDS = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip
EXTRA = ("self_attention.linear_proj", "self_attention.linear_qkv")
EXTRA_MLP, EXTRA_EXPERTS = (
    tuple(f"{mlp}.linear_{matrix}" for matrix in ("fc1", "fc2")) for mlp in ("mlp", "mlp.experts.experts")
)
"""Where Transformer Engine looks for states of 8-bit formats; they are empty."""


def make(opened: Opened, shape: Shape) -> tuple[Opened, Target, list[str]]:
    """Classic. Raises ConfigError for a model or a mesh that Megatron does not have."""
    model = _Model(opened, tp=shape.tp or 1, pp=shape.pp or 1, adam=shape.adam)
    files = [TargetFile(name, (Skeleton.of(state),)) for name, state in model.ranks()]
    return model.opened, FilesTarget(files, {LATEST: model.latest}), model.lost


def make_dist(opened: Opened, shape: Shape) -> tuple[Opened, Target, list[str]]:
    """torch_dist. Raises ConfigError for a model that Megatron does not have."""
    # An item is cut out of torch's own form, whose import takes half a second.
    from trainrt.checkpoint.targets.dcp_items import Item, cut, directory

    model = _Model(opened, tp=1, pp=1, adam=shape.adam)
    items = [item for entry, array in model.whole() for item in cut(array, [entry])]
    items += [Item([None], (entry,)) for entry in model.extra()]
    files, metadata = directory(items)
    home = model.home
    files = [TargetFile(f"{home}/{file.name}", file.archives) for file in files]
    files.append(TargetFile(f"{home}/{COMMON}", (Skeleton.of(model.common()),)))
    plain = {
        f"{home}/{METADATA}": metadata, f"{home}/{BACKEND}": json.dumps(BACKENDS).encode(), LATEST: model.latest,
    }  # fmt: skip
    return model.opened, FilesTarget(files, plain), model.lost


class _Model:
    """One model on its way to Megatron's names."""

    def __init__(self, opened: Opened, *, tp: int, pp: int, adam: str | None) -> None:
        self._config: dict[str, Any] = opened.metadata["model_config"]
        if not self._config:
            raise ConfigError("--to megatron wants the model's config.json: --model-config DIR")
        if self._config.get("model_type") not in KINDS:
            raise ConfigError(
                f"--to megatron: model_type {self._config.get('model_type')!r}; allowed: {', '.join(KINDS)}"
            )
        self._training, self._tp, self._pp = Training(opened, None), tp, pp
        self._tensors = opened.source.layout.tensors
        self._check_mesh()
        names = {name for name, role in self._tensors if role == "parameter"}
        self._biases = any(name.endswith("q_proj.bias") for name in names)
        self._norms = any(name.endswith("q_norm.weight") for name in names)
        self._facts = Facts(Path("config.json"), self.arguments(), self._config, dict(self._shapes(names)))
        self._optimizer = Optimizer(opened, self._training, self._facts.arguments, adam)
        self.opened = self._optimizer.opened
        self._tensors = self.opened.source.layout.tensors
        self.lost = ["rng: Megatron's random states are its own (--no-load-rng)", *self._optimizer.lost]

    @property
    def home(self) -> str:
        return f"iter_{self._training.step:07d}" if self._training.step else "release"

    @property
    def latest(self) -> bytes:
        return str(self._training.step or "release").encode()

    def _check_mesh(self) -> None:
        config, tp, pp = self._config, self._tp, self._pp
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        groups = config.get("num_key_value_heads") or heads
        if layers % pp:
            raise ConfigError(f"--mesh pp={pp}: Megatron cuts layers evenly, and {layers} do not divide")
        for what, count in (("attention heads", heads), ("KV heads", groups)):
            if count % tp:
                raise ConfigError(f"--mesh tp={tp}: {count} {what} do not divide")

    def arguments(self) -> dict[str, Any]:
        """What Megatron's own options would be; the counterpart of formats.megatron_config."""
        config, dtype = self._config, self._training.low or "float32"
        heads = config["num_attention_heads"]
        groups = config.get("num_key_value_heads") or heads
        experts = config.get("num_local_experts") or config.get("num_experts")
        rope = config.get("rope_parameters") or {}
        vocabulary, step = config["vocab_size"], DIVISIBLE * self._tp
        found = {
            "num_layers": config["num_hidden_layers"], "hidden_size": config["hidden_size"], "num_attention_heads": heads,
            "group_query_attention": groups != heads, "num_query_groups": groups,
            "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
            "ffn_hidden_size": config["intermediate_size"], "vocab_size": vocabulary,
            "padded_vocab_size": -(-vocabulary // step) * step, "make_vocab_size_divisible_by": DIVISIBLE,
            "max_position_embeddings": config["max_position_embeddings"], "seq_length": config["max_position_embeddings"],
            "position_embedding_type": "rope", "rotary_percent": 1.0, "rotary_interleaved": False, "use_rope_scaling": False,
            "rotary_base": rope.get("rope_theta") or config.get("rope_theta") or 10000, "swiglu": True,
            "normalization": "RMSNorm", "norm_epsilon": config.get("rms_norm_eps", 1e-5), "add_bias_linear": False,
            "add_qkv_bias": self._biases, "qk_layernorm": self._norms,
            "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
            "num_experts": experts, "tensor_model_parallel_size": self._tp, "pipeline_model_parallel_size": self._pp,
            "expert_model_parallel_size": 1, "expert_tensor_parallel_size": self._tp, "params_dtype": getattr(torch, dtype),
            "bf16": dtype == "bfloat16", "fp16": dtype == "float16", "transformer_impl": "transformer_engine",
            "iteration": self._training.step,
        }  # fmt: skip
        if experts:
            found["moe_router_topk"] = config["num_experts_per_tok"]
            found["moe_ffn_hidden_size"] = config.get("moe_intermediate_size") or config["intermediate_size"]
            found["moe_router_pre_softmax"] = not config.get("norm_topk_prob", True)
        return found

    def _shapes(self, names: set[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """What the facts want to see of a model: what it has, and that its first matrices are gate and up."""
        width = self._config["intermediate_size"]
        mlp = "mlp.experts.local_experts" if any(".experts." in name for name in names) else "mlp"
        yield f"{LAYERS}{mlp}.linear_fc1.weight", (2 * width, 1)
        yield f"{LAYERS}{mlp}.linear_fc2.weight", (1, width)
        if self._norms:
            yield f"{LAYERS}self_attention.q_layernorm.weight", (1,)
        if not self._config.get("tie_word_embeddings", False):
            yield OUTPUT, (1,)

    @property
    def _moe(self) -> bool:
        return not self._facts.has("mlp.linear_fc1.weight")

    def _inside(self) -> dict[str, Parameter]:
        """A layer's parameters, once each: norms go with the matrices behind them, but for the router's."""
        dropped = ("input_layernorm.", CUT_NORM) if self._moe else LOCAL
        return {name: p for name, p in self._facts.inside().items() if not name.startswith(dropped)}

    def _outside(self) -> dict[str, tuple[Parameter, dict[str, int]]]:
        """And on which stage each is."""
        found = {name: (p, {"pp": 0 if name == EMBEDDING else -1}) for name, p in self._facts.outside().items()}
        if self._facts.tied and self._pp == 1:
            del found[OUTPUT]
        return found

    @property
    def _variables(self) -> dict[str, int]:
        return {**self._facts.variables, "padding": DIVISIBLE * self._tp}

    def _document(self, rank: Arrays | None = None) -> dict[str, Any]:
        """All but the model: of `rank` in the classic form, of all ranks in torch_dist."""
        return {
            "args": argparse.Namespace(**self.arguments()), "checkpoint_version": 3.0, "iteration": self._training.step,
            **self._optimizer.document(rank),
        }  # fmt: skip

    # The classic form.

    def ranks(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """File names and states."""
        experts = self._facts.experts("mlp.experts.local_experts.{e}.")
        rules = [Rule(name, p.on_a_rank(), on) for name, (p, on) in self._outside().items()]
        rules += [Rule(f"{LAYERS}{{l}}.{name}", p.on_a_rank()) for name, p in (self._inside() | experts).items()]
        each = self._config["num_hidden_layers"] // self._pp
        ranks: dict[tuple[int, int], dict[str, OrderedDict[str, TargetArray]]] = defaultdict(
            lambda: defaultdict(OrderedDict)
        )
        for role in ("parameter", *self._optimizer.roles):
            arrays = self._compiled(rules, role, {"pp": self._pp, "tp": self._tp}, each)
            for array, lies in sorted(arrays, key=lambda held: _in_order(held[0].name)):
                ranks[array.at["pp"], array.at["tp"]][role][array.name] = _target(array, lies)
        for (pp, tp), rank in sorted(ranks.items()):
            place = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if self._pp > 1 else "")
            yield f"{self.home}/{place}/{FILE}", {**self._document(rank), "model": rank["parameter"]}

    def _compiled(
        self, rules: Sequence[Rule], role: str, axes: Mapping[str, int], each: int
    ) -> list[tuple[StoredArray, list[tuple[Any, LogicalTensor]]]]:
        """`each`: layers of a stage. Raises CheckpointError for parameters that Megatron has no place for."""
        wanted = {key: tensor for key, tensor in self._tensors.items() if tensor.name not in self._training.aliases}
        arrays, placed = compile_writing(
            rules, wanted, role=role, axes=axes, variables=self._variables,
            local=lambda at: {"first": at.get("pp", 0) * each},
            layers=lambda at: range(at.get("pp", 0) * each, (at.get("pp", 0) + 1) * each),
        )  # fmt: skip
        left = sorted(name for name, held in wanted if held == role and (name, held) not in placed)
        if left:
            raise CheckpointError(f"{left[0]} ({role}): Megatron's GPTModel has no place for it")
        return arrays

    # torch_dist.

    def whole(self) -> Iterator[tuple[str, TargetArray]]:
        """Entries and arrays: the parameters, masters and moments."""
        experts = self._facts.experts("mlp.experts.experts.")
        rules = [Rule(name, p.whole()) for name, (p, _) in self._outside().items()]
        rules += [Rule(f"{LAYERS}{name}", p.whole("l")) for name, p in self._inside().items()]
        rules += [Rule(f"{LAYERS}{name}", p.whole("e", "l")) for name, p in experts.items()]
        for role in ("parameter", *self._optimizer.roles):
            before = "" if role == "parameter" else f"optimizer.state.{STATE.get(role, role)}."
            for array, lies in self._compiled(rules, role, {}, self._config["num_hidden_layers"]):
                yield f"{before}{array.name}", _target(array, lies)

    def extra(self) -> Iterator[str]:
        """Entries of Transformer Engine's states, an empty one for each layer, and for each of its experts."""
        layers, experts = self._config["num_hidden_layers"], self._facts.arguments["num_experts"]
        for layer in range(layers):
            for name in EXTRA if self._moe else EXTRA + EXTRA_MLP:
                yield f"{LAYERS}{name}._extra_state/shard_{layer}_{layers}"
            for name, expert in itertools.product(EXTRA_EXPERTS, range(experts) if self._moe else ()):
                yield f"{LAYERS}{name}._extra_state/shard_{layer}.{expert}_{layers}.{experts}"

    def common(self) -> dict[str, Any]:
        """What all ranks have alike."""
        return {**self._document(), "content_metadata": {"singleton_local_shards": False}}


def _target(array: StoredArray, lies: list[tuple[Any, LogicalTensor]]) -> TargetArray:
    return TargetArray(array.name, array.role, array.dtype, array.shape, tuple(lies))


def _in_order(name: str) -> tuple[Any, ...]:
    """Embedding, layers by number, the rest; in a layer by ORDER, experts by number, weights before biases."""
    layer = re.match(r"decoder\.layers\.(\d+)\.(.+)", name)
    if layer is None:
        return (0 if name == EMBEDDING else 2, name)
    module = next(number for number, start in enumerate(ORDER) if layer[2].startswith(start))
    expert = re.search(r"\.local_experts\.(\d+)\.", name)
    return (1, int(layer[1]), module, int(expert[1]) if expert else 0, name.rpartition(".")[0], name.endswith("bias"))
