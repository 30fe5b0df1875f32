"""Ways to split a Hugging Face model over the ranks of a mesh, for `benchmarks.tensor_parallel`.

Each arm is a model that one calls as before, and knows how to show what one process would have: gradients by name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from trainrt.parallel.planner.probe import Blueprint, hollow
from trainrt.parallel.planner.sharding import find_sharding
from trainrt.parallel.sharded.model import full, shard_model

Make = Callable[[], Any]
Loss = Callable[[Any], Tensor]
"""The loss of a model on the benchmark's batch."""

Pair = tuple[str, Tensor, Tensor]
"""The name of a parameter, its gradient, and what it should be."""


class Unmatched(Exception):
    """What an arm holds cannot be put beside what one process has."""


class Arm:
    """A split model. `held`: elements of its parameters on this rank, tied ones once."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model, self._loss = model, loss

    def held(self) -> int:
        return sum(_local(parameter).numel() for parameter in self.model.parameters())

    def loss(self) -> Tensor:
        return self._loss(self.model)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def pairs(self, wanted: Mapping[str, Tensor]) -> Iterator[Pair]:
        """Gradients made whole beside the wanted ones. Raises Unmatched."""
        for name, parameter in self._named(wanted).items():
            yield name, _shaped(name, _whole(_gradient(parameter)), wanted[name]), wanted[name]

    def _named(self, wanted: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        missing = [name for name in wanted if name not in named]
        if missing:
            raise Unmatched(f"no parameter {missing[0]}")
        return {name: named[name] for name in wanted}


class Ours(Arm):
    """Plans derived from a run of the model (on the batch of `planned`): what the runtime does under `parallel.tp`."""

    def __init__(
        self, make: Make, loss: Loss, mesh: DeviceMesh, *, planned: Loss | None = None, sequence: bool = True
    ) -> None:
        def small() -> nn.Module:
            with hollow():
                return make()

        model = make()
        sharding = find_sharding(Blueprint(small, planned or loss, lambda: ""), mesh.size()).spread(model)
        self._splits = sharding.splits
        self._axis = shard_model(model, sharding.splits, mesh, sequence=sharding.sequence and sequence)
        super().__init__(model, loss)

    def loss(self) -> Tensor:
        return full(super().loss())

    def pairs(self, wanted: Mapping[str, Tensor]) -> Iterator[Pair]:
        """What this rank holds, which need not be one run of indices as a DTensor's shard is."""
        for name, parameter in self._named(wanted).items():
            want, split = wanted[name], self._splits.get(name)
            if split is not None:
                want = self._axis.take(want, split.dim, split.owners)
            yield name, _local(_gradient(parameter)), want


class HuggingFace(Arm):
    """The `tp_plan` that transformers has for a model class, applied while a checkpoint is loaded."""

    def __init__(self, cls: type, saved: Path, loss: Loss, mesh: DeviceMesh, *, attention: str) -> None:
        from transformers.distributed import DistributedConfig

        _need_no_accelerate()
        model = cls.from_pretrained(
            saved, dtype=torch.get_default_dtype(), attn_implementation=attention,
            distributed_config=DistributedConfig(tp_size=mesh.size(), tp_plan="auto"),
        )  # fmt: skip
        super().__init__(model.eval(), loss)


class DeepSpeed(Arm):
    """AutoTP for training, automatic or a preset, on ZeRO's stage 0: gradients stay with the parameters."""

    def __init__(self, make: Make, loss: Loss, mesh: DeviceMesh, *, samples: int, preset: str | None) -> None:
        import deepspeed

        # Nothing is to be compiled (see tests/checkpoint/frameworks.py).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        model = make()
        named = {} if preset is None else {"preset_model": preset}
        config = {
            "train_micro_batch_size_per_gpu": samples,
            "tensor_parallel": {"autotp_size": mesh.size(), **named},
            "zero_optimization": {"stage": 0},
        }
        # An optimizer of its own would be stepped and would clear gradients; this one does neither.
        idle = torch.optim.SGD(model.parameters(), lr=0.0)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=idle, config=config)
        super().__init__(self._engine.module.eval(), loss)

    def loss(self) -> Tensor:
        return self._loss(self._engine)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def pairs(self, wanted: Mapping[str, Tensor]) -> Iterator[Pair]:
        """Gradients gathered by DeepSpeed's own way for parameters: it takes the parameter itself, so these are swapped in."""
        for name, parameter in self._named(wanted).items():
            gradient, kept = _gradient(parameter), parameter.data
            if hasattr(parameter, "gather_params"):
                parameter.grad = None
                parameter.data = gradient.clone()
                try:
                    parameter.gather_params([parameter])
                    whole = parameter.data
                except Exception as error:
                    raise Unmatched(f"{name}: {error}") from error
                finally:
                    parameter.data, parameter.grad = kept, gradient
            else:
                whole = gradient
            yield name, _shaped(name, whole, wanted[name]), wanted[name]


class Tutorial(Arm):
    """The plan of torch's tutorial on tensor parallelism for a Llama, on Hugging Face's modules."""

    def __init__(self, make: Make, loss: Loss, mesh: DeviceMesh) -> None:
        model = make()
        whole = Replicate()
        top = {
            "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=whole),
            "lm_head": ColwiseParallel(output_layouts=whole),
        }
        parallelize_module(model, mesh, top)
        for layer in model.model.layers:
            columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
            rows = ("self_attn.o_proj", "mlp.down_proj")
            plan = {name: ColwiseParallel() for name in columns} | {name: RowwiseParallel() for name in rows}
            parallelize_module(layer, mesh, plan)
        super().__init__(model, loss)


def _need_no_accelerate() -> None:
    """Where accelerate is missing, skip the check for it: on one device a rank, loading does not call it."""
    if importlib.util.find_spec("accelerate") is None:
        transformers.modeling_utils.check_and_set_device_map = lambda device: {"": torch.device(device or "cpu")}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _shaped(name: str, whole: Tensor, want: Tensor) -> Tensor:
    if whole.shape == want.shape:
        return whole
    if whole.ndim == 2 and whole.T.shape == want.shape:  # GPT-2's Conv1D made a linear layer
        return whole.T
    raise Unmatched(f"{name}: {tuple(whole.shape)} where one process has {tuple(want.shape)}")
