"""Models of megatron-core (GPTModel) under the names of the Hugging Face file format: rules, and the config they come with.

Megatron's parameters are cut over `tp`, its layers over `pp` (and `vp`: virtual stages), its experts over `ep`. On each rank it
fuses queries, keys and values, group by group of heads, and the gate with the up projection; layers and experts are numbered from
each rank's own beginning (`first`, `before`). torch_dist stacks them instead, whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainrt.checkpoint.formats.torch_file import StandIn
from trainrt.checkpoint.mapping.expression import Shape
from trainrt.errors import CheckpointError, ConfigError

STAND_INS = (
    "argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath", "signal.Signals", "_io.BytesIO", "io.BytesIO",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype",
    "numpy.dtypes.UInt32DType", "megatron.core.enums.ModelType", "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic", "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState", "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.AttnMaskType", "megatron.core.transformer.enums.CudaGraphScope",
)  # fmt: skip
"""Classes of the arguments and of random states."""
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
LAYER = "model.layers.{l + first}."
QWEN = ("qwen2_moe", "qwen3_moe", "olmoe")


@dataclass(frozen=True, slots=True)
class Parameter:
    """What one parameter holds: parts, one after the other, each cut over the ranks of `tp` along `dim` (None: not cut)."""

    parts: tuple[str, ...]
    dim: int | None = None

    def on_a_rank(self) -> str:
        cut = self.parts if self.dim is None else [f'shard({part}, axis="tp", dim={self.dim})' for part in self.parts]
        return _joined(cut)

    def whole(self, *stacked: str) -> str:
        """As torch_dist keeps it: with new dimensions for these placeholders, the last one outside."""
        text = _joined(self.parts)
        for over in stacked:
            text = f'stack({text}, over="{over}")'
        return text


def _joined(parts: Collection[str]) -> str:
    return next(iter(parts)) if len(parts) == 1 else f"concat({', '.join(parts)})"


class Facts:
    """What is known of a model: from the checkpoint's arguments, from --model-config, and from its parameters' shapes."""

    def __init__(
        self, path: Path, arguments: Mapping[str, Any], model_config: Mapping[str, Any], shapes: Mapping[str, Shape]
    ) -> None:
        """`shapes`: of all parameters, under names without the numbers of layers and experts."""
        self.path, self.arguments, self.model_config, self._shapes = path, arguments, model_config, shapes
        self.heads = self._number("num_attention_heads", "num_attention_heads")
        self.groups = self._number("num_query_groups", "num_key_value_heads", otherwise=self.heads)
        # The null tokenizer's own token for the end of a document comes behind its vocabulary.
        end = 1 if arguments.get("tokenizer_type") == "NullTokenizer" else 0
        self.vocabulary = self._number("vocab_size", "vocab_size", otherwise=0, more=end)
        untied = arguments.get("untie_embeddings_and_output_weights")
        self.tied = bool(
            model_config.get("tie_word_embeddings", OUTPUT not in shapes) if untied is None else not untied
        )
        kind = model_config.get("model_type")
        self.qwen = kind in QWEN if kind is not None else self.has("self_attention.q_layernorm.weight")

    def has(self, name: str) -> bool:
        """Whether a layer has this parameter."""
        return f"decoder.layers.{name}" in self._shapes

    def _number(self, argument: str, key: str, *, otherwise: int | None = None, more: int = 0) -> int:
        """Raises ConfigError where a number is said nowhere and CheckpointError where two places contradict each other."""
        said, configured = self.arguments.get(argument), self.model_config.get(key)
        if argument == "num_query_groups" and self.arguments.get("group_query_attention") is False:
            said = self.heads
        said = said + more if said is not None else None
        if said is not None and configured is not None and said != configured:
            raise CheckpointError(
                f"{self.path}: its arguments say {argument} = {said}, the model's config {key} = {configured}"
            )
        found = said if said is not None else configured if configured is not None else otherwise
        if not isinstance(found, int):
            raise ConfigError(
                f"{self.path}: args.{argument} is not in it: --model-config DIR gives {key} of its config.json"
            )
        return found

    @property
    def variables(self) -> dict[str, int]:
        return {"heads": self.heads, "groups": self.groups, "first": 0, "before": 0, "padding": 1}

    def gated(self, mlp: str) -> bool:
        """Whether the first matrix is gate and up, by its shape against that of the second one."""
        first, second = self._shapes[f"{mlp}.linear_fc1.weight"], self._shapes[f"{mlp}.linear_fc2.weight"]
        return first[-2] == 2 * second[-1]

    def outside(self) -> dict[str, Parameter]:
        """Embedding, final norm and output layer."""
        words = self._words('"model.embed_tokens.weight"')
        found = {EMBEDDING: words, OUTPUT: words if self.tied else self._words('"lm_head.weight"')}
        for kind in ("weight", "bias"):
            found[f"decoder.final_layernorm.{kind}"] = Parameter((f'"model.norm.{kind}"',))
        return found

    def _words(self, name: str) -> Parameter:
        return Parameter((f"pad({name}, length={self.vocabulary}, multiple=padding)" if self.vocabulary else name,), 0)

    def inside(self) -> dict[str, Parameter]:
        """Of a layer, but for experts. Norms have the names of the local layers and of those of Transformer Engine."""
        found: dict[str, Parameter] = {}
        for kind in ("weight", "bias"):
            norms = {"input": ("input_layernorm.", "self_attention.linear_qkv.layer_norm_")}
            norms["post_attention"] = ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
            for name, stored in norms.items():
                found |= {f"{one}{kind}": Parameter((f'"{LAYER}{name}_layernorm.{kind}"',)) for one in stored}
            q, k, v = (f'"{LAYER}self_attn.{x}_proj.{kind}"' for x in "qkv")
            fused = f"interleave({q}, {k}, {v}, groups=groups, sizes=(heads // groups, 1, 1))"
            found[f"self_attention.linear_qkv.{kind}"] = Parameter((fused,), 0)
            out = f'"{LAYER}self_attn.o_proj.{kind}"'
            found[f"self_attention.linear_proj.{kind}"] = Parameter((out,), 1 if kind == "weight" else None)
            for x in "qk":
                found[f"self_attention.{x}_layernorm.{kind}"] = Parameter((f'"{LAYER}self_attn.{x}_norm.{kind}"',))
        if self.has("mlp.linear_fc1.weight"):
            names = ("gate_proj", "up_proj", "down_proj")
            found |= _mlp("mlp.linear_", "", f"{LAYER}mlp.", names, self.gated("decoder.layers.mlp"))
        found["mlp.router.weight"] = Parameter((f'"{LAYER}{self._moe[0]}.gate.weight"',))
        return found

    def experts(self, stored: str, kind: str = "") -> dict[str, Parameter]:
        """Of an expert, stored under `stored`linear_fc1.weight`kind`; empty where the model has none."""
        first = ".linear_fc1.weight"
        mlp = next((n.removesuffix(first) for n in self._shapes if ".experts." in n and n.endswith(first)), None)
        if mlp is None:
            return {}
        home, names = self._moe
        return _mlp(f"{stored}linear_", kind, f"{LAYER}{home}.experts.{{e + before}}.", names, self.gated(mlp))

    @property
    def _moe(self) -> tuple[str, tuple[str, str, str]]:
        return ("mlp", ("gate_proj", "up_proj", "down_proj")) if self.qwen else ("block_sparse_moe", ("w1", "w3", "w2"))


def _mlp(stored: str, kind: str, home: str, names: tuple[str, str, str], gated: bool) -> dict[str, Parameter]:
    found = {}
    for bias in ("weight", "bias"):
        gate, up, down = (f'"{home}{name}.{bias}"' for name in names)
        found[f"{stored}fc1.{bias}{kind}"] = Parameter((gate, up) if gated else (up,), 0)
        found[f"{stored}fc2.{bias}{kind}"] = Parameter((down,), 1 if bias == "weight" else None)
    return found


def without_numbers(name: str) -> str:
    """A parameter's name without those of its layer and its expert."""
    return re.sub(r"(weight|bias)\d+$", r"\1", re.sub(r"\.\d+(?=\.)", "", name))


def arguments_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments, as they were pickled."""
    held = state.get("args")
    return vars(held) if isinstance(held, StandIn) else {}
