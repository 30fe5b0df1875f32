"""Checkpoints of Megatron-LM, made by megatron-core on CPU: what stands in for CUDA, the ranks, and how they are saved.

All state is set from tensors that are known by their Hugging Face names, and cut for a rank here, by code that shares nothing
with what is tested.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.checkpoint.megatron_model import MODEL, as_local_layers, known, shapes, stored

STEPS = 3
PROMPT = [[3, 14, 15, 9, 26, 5, 35, 60], [2, 7, 18, 28, 1, 8, 28, 45]]


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on CUDA are made on the CPU, and say that they are on CUDA when their type is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        made = func(*args, **kwargs)
        return made.replace("torch.", "torch.cuda.") if func is Tensor.type and len(args) == 1 else made


def without_cuda() -> TorchFunctionMode:
    """What megatron-core asks of CUDA, answered for the CPU."""
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    Tensor.cuda = lambda self, *_, **__: self
    from megatron.core import tensor_parallel
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None
    tensor_parallel.get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()
    return OnCpu()


class Rank:
    """One process: its part of the model, of the optimizer, and of what is saved."""

    def __init__(self, rank: int, options: dict[str, Any]) -> None:
        from megatron.core import parallel_state

        self.rank, self.options, self.mesh = rank, options, parallel_state
        self.model = {**MODEL, **options.get("model", {})}
        self.tp, self.pp, self.vp, self.ep = (options.get(axis, 1) for axis in ("tp", "pp", "vp", "ep"))
        self.etp = options.get("etp", self.tp)
        self.dtype = getattr(torch, options.get("dtype", "float32"))
        divisible = options.get("divisible", 8) * self.tp
        self.padded = -(-self.model["vocab"] // divisible) * divisible
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.tp, pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vp if self.vp > 1 else None, expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
        )  # fmt: skip
        self.config = self._config()
        self.chunks = [self._chunk(stage) for stage in range(self.vp)]

    def _config(self) -> Any:
        from megatron.core.transformer import TransformerConfig

        model = self.model
        moe = {
            "num_moe_experts": model["experts"], "moe_router_topk": 2, "moe_ffn_hidden_size": model["ffn"],
            "moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "allgather",
        } if model["experts"] else {}  # fmt: skip
        return TransformerConfig(
            num_layers=model["layers"], hidden_size=model["hidden"], num_attention_heads=model["heads"],
            num_query_groups=model["kv_heads"], kv_channels=model["head_dim"], ffn_hidden_size=model["ffn"],
            normalization="RMSNorm", layernorm_epsilon=1e-5, gated_linear_unit=True,
            activation_func=torch.nn.functional.silu, add_bias_linear=False, add_qkv_bias=model["qkv_bias"],
            qk_layernorm=model["qk_norm"], attention_dropout=0.0, hidden_dropout=0.0, bias_activation_fusion=False,
            bias_dropout_fusion=False, apply_rope_fusion=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
            use_cpu_initialization=True, tensor_model_parallel_size=self.tp, pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vp if self.vp > 1 else None, expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
            num_layers_in_first_pipeline_stage=self.options.get("first_stage"), pipeline_dtype=self.dtype,
            params_dtype=self.dtype, bf16=self.dtype == torch.bfloat16, **moe,
        )  # fmt: skip

    def _chunk(self, stage: int) -> Any:
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        spec = get_gpt_layer_local_spec(
            num_experts=self.model["experts"] or None, qk_layernorm=self.model["qk_norm"], normalization="RMSNorm"
        )
        place = {"ignore_virtual": False, "vp_stage": stage}
        chunk = GPTModel(
            self.config, spec, vocab_size=self.padded, max_sequence_length=64, position_embedding_type="rope",
            pre_process=self.mesh.is_pipeline_first_stage(**place), post_process=self.mesh.is_pipeline_last_stage(**place),
            share_embeddings_and_output_weights=self.model["tied"], vp_stage=stage if self.vp > 1 else None,
        )  # fmt: skip
        return chunk.to(self.dtype)

    def named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The rank's parameters, with the numbers that layers and experts have in the whole model."""
        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                words = name.split(".")
                if words[1] == "layers":
                    words[2] = str(chunk.decoder.layers[int(words[2])].layer_number - 1)
                if "local_experts" in words:
                    at = words.index("local_experts") + 1
                    mine = self.model["experts"] // self.ep
                    words[at] = str(int(words[at]) + mine * self.mesh.get_expert_model_parallel_rank())
                yield ".".join(words), parameter

    def local(self, role: str, name: str, parameter: torch.nn.Parameter) -> Tensor:
        """This rank's part of what is known under a role."""
        sizes = shapes(self.model)
        parts = stored(name, lambda whole: known(role, whole, sizes[whole]), self.model, self.padded)
        if getattr(parameter, "tensor_model_parallel", False):
            rank, count = self.mesh.get_tensor_model_parallel_rank(), self.tp
            if "local_experts" in name:
                rank, count = self.mesh.get_expert_tensor_parallel_rank(), self.etp
            parts = [part.chunk(count, parameter.partition_dim)[rank] for part in parts]
        return torch.cat(parts)

    def fill(self) -> None:
        with torch.no_grad():
            for name, parameter in self.named():
                parameter.copy_(self.local("master", name, parameter))

    def fresh_optimizer(self) -> Any:
        """Megatron's own, of the model as it is."""
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        spread = self.options["optimizer"] == "distributed"
        settings = DistributedDataParallelConfig(use_distributed_optimizer=spread)
        self.wrapped = [DistributedDataParallel(self.config, settings, chunk) for chunk in self.chunks]
        config = OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=1e-4, weight_decay=0.1, clip_grad=0.0, bf16=self.dtype == torch.bfloat16,
            params_dtype=self.dtype, use_distributed_optimizer=spread,
        )  # fmt: skip
        return get_megatron_optimizer(config, self.wrapped)

    def optimizer(self) -> Any:
        """After some steps (without gradients), and then with state that is known."""
        made = self.fresh_optimizer()
        for _ in range(STEPS):
            made.step()
        for one in made.chained_optimizers:
            with torch.no_grad():
                self._set(one, self.options["optimizer"] == "distributed")
        return made

    def _set(self, optimizer: Any, spread: bool) -> None:
        mine = {id(p) for group in getattr(optimizer, "model_float16_groups", []) for p in group}
        mine |= {id(p) for group in getattr(optimizer, "model_fp32_groups", []) for p in group}
        for name, parameter in self.named():
            # Also where another rank has the state of it.
            parameter.copy_(self.local("master", name, parameter))
            master = getattr(parameter, "main_param", None)
            master = parameter if master is None else master
            if spread and id(parameter) in mine:
                state = optimizer._get_main_param_and_optimizer_states(parameter)
                span = optimizer._get_model_param_range_map(parameter)["param"]
            elif not spread and master in optimizer.optimizer.state:
                state = {**optimizer.optimizer.state[master], "param": master}
                span = SimpleNamespace(start=0, end=parameter.numel())
            else:
                continue
            for key, role in (("param", "master"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
                flat = self.local(role, name, parameter).flatten()[span.start : span.end]
                state[key].copy_(flat.view(state[key].shape))

    def arguments(self) -> argparse.Namespace:
        """What Megatron-LM's arguments are after its own checks, as far as anyone reads them."""
        from megatron.core.enums import ModelType
        from megatron.core.transformer.enums import AttnBackend

        model = self.model
        return argparse.Namespace(
            num_layers=model["layers"], hidden_size=model["hidden"], num_attention_heads=model["heads"],
            group_query_attention=model["kv_heads"] != model["heads"], num_query_groups=model["kv_heads"],
            kv_channels=model["head_dim"], ffn_hidden_size=model["ffn"], vocab_size=model["vocab"],
            padded_vocab_size=self.padded, make_vocab_size_divisible_by=8, max_position_embeddings=64, seq_length=64,
            position_embedding_type="rope", rotary_base=10000, rotary_percent=1.0, rotary_interleaved=False,
            use_rope_scaling=False, swiglu=True, normalization="RMSNorm", norm_epsilon=1e-5,
            apply_layernorm_1p=False, add_bias_linear=False, add_qkv_bias=model["qkv_bias"], qk_layernorm=model["qk_norm"],
            untie_embeddings_and_output_weights=not model["tied"], window_size=None,
            num_experts=model["experts"] or None, moe_router_topk=2, moe_ffn_hidden_size=model["ffn"],
            moe_router_pre_softmax=False, moe_shared_expert_intermediate_size=None, moe_layer_freq=1,
            tensor_model_parallel_size=self.tp, pipeline_model_parallel_size=self.pp, expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp, params_dtype=self.dtype, bf16=self.dtype == torch.bfloat16, fp16=False,
            use_distributed_optimizer=self.options.get("optimizer") == "distributed", overlap_grad_reduce=False,
            ckpt_format=self.options["format"], model_type=ModelType.encoder_or_decoder, attention_backend=AttnBackend.auto,
            data_path=[Path("corpus")], iteration=STEPS,
        )  # fmt: skip

    def scheduler(self, optimizer: Any) -> Any:
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        return OptimizerParamScheduler(
            optimizer, init_lr=0.0, max_lr=1e-3, min_lr=1e-4, lr_warmup_steps=2, lr_decay_steps=10, lr_decay_style="cosine",
            start_wd=0.1, end_wd=0.1, wd_incr_steps=10, wd_incr_style="constant",
        )  # fmt: skip

    def state(self, optimizer: Any, scheduler: Any) -> dict[str, Any]:
        """As Megatron-LM's `generate_state_dict` and `get_rng_state` put it together."""
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        sharded = self.options["format"] == "torch_dist"
        metadata = {
            "singleton_local_shards": self.options.get("singleton", False), "chained_optim_avoid_prefix": True,
            "dp_cp_group": self.mesh.get_data_parallel_group(with_context_parallel=True),
        } | ({"distrib_optim_sharding_type": self.options.get("sharding", "fully_reshardable")}
             if self.options.get("optimizer") == "distributed" else {})  # fmt: skip
        state: dict[str, Any] = {"args": self.arguments(), "checkpoint_version": 3.0, "iteration": STEPS}
        for number, chunk in enumerate(self.chunks):
            key = "model" if self.vp == 1 else f"model{number}"
            state[key] = (
                chunk.sharded_state_dict(metadata=metadata) if sharded else chunk.state_dict_for_save_checkpoint()
            )
        if optimizer is not None:
            made = optimizer.sharded_state_dict(state, metadata=metadata) if sharded else optimizer.state_dict()
            state["optimizer"] = made
            state["opt_param_scheduler"] = (scheduler or self.scheduler(optimizer)).state_dict()
        rng: Any = [{
            "random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(), "cuda_rng_state": torch.cuda.get_rng_state(),
            "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
        }]  # fmt: skip
        place = (self.mesh.get_pipeline_model_parallel_rank(), self.mesh.get_tensor_model_parallel_rank())
        state["rng_state"] = (
            ShardedObject("rng_state", rng, (self.pp, self.tp), place, replica_id=self.mesh.get_data_parallel_rank())
            if sharded
            else rng
        )
        return state | {"num_floating_point_operations_so_far": 0}

    def save(self, root: Path, optimizer: Any, scheduler: Any = None) -> None:
        """As Megatron-LM's `save_checkpoint` does."""
        folder = root / f"iter_{STEPS:07d}"
        if self.options["format"] == "torch_dist":
            from megatron.core import dist_checkpointing

            folder.mkdir(parents=True, exist_ok=True)
            dist_checkpointing.save(
                self.state(optimizer, scheduler), str(folder), content_metadata={"singleton_local_shards": False}
            )
        else:
            home = folder / self._home()
            home.mkdir(parents=True, exist_ok=True)
            if self.options.get("optimizer") == "distributed":
                optimizer.save_parameter_state(str(home / "distrib_optim.pt"))
            if 0 in (self.mesh.get_data_parallel_rank(), self.mesh.get_expert_data_parallel_rank()):
                torch.save(self.state(optimizer, scheduler), home / "model_optim_rng.pt")
        dist.barrier()
        (root / "latest_checkpointed_iteration.txt").write_text(str(STEPS))

    def load(self, root: Path, optimizer: Any, scheduler: Any = None) -> None:
        """As Megatron-LM's `load_checkpoint` does with --no-load-rng, into a model and an optimizer that are all zero before."""
        with torch.no_grad():
            for held in itertools.chain(*self._states(optimizer), (parameter for _, parameter in self.named())):
                held.zero_()
        folder = root / f"iter_{STEPS:07d}"
        (chunk,) = self.chunks
        if self.options["format"] == "torch":
            state = torch.load(folder / self._home() / "model_optim_rng.pt", weights_only=False)
            state["model"] = as_local_layers(state["model"])
            # What the optimizer's numbers go by, in the group that decays and in the other one.
            for group in (lambda held: held.dim() > 1, lambda held: held.dim() == 1):
                found = [name for name, held in state["model"].items() if group(held)]
                assert found == [name for name, held in chunk.named_parameters() if group(held)]
        else:
            from megatron.core import dist_checkpointing

            metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
            wanted = {"model": chunk.sharded_state_dict(metadata=metadata)}
            if self.model["experts"]:
                # Layers of megatron-core's own have Transformer Engine's names here, but for this one.
                names = {"decoder.layers.mlp.linear_fc1.layer_norm_": "decoder.layers.pre_mlp_layernorm."}
                dist_checkpointing.utils.apply_prefix_mapping(wanted, names)
            wanted["optimizer"] = optimizer.sharded_state_dict(wanted, is_loading=True, metadata=metadata)
            state = dist_checkpointing.load(wanted, str(folder))
        assert (state["iteration"], state["args"].num_layers) == (STEPS, self.model["layers"])
        chunk.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(state["opt_param_scheduler"])

    def _states(self, optimizer: Any) -> Iterator[Iterator[Tensor]]:
        """Masters, moments and steps."""
        for one in optimizer.chained_optimizers:
            yield (master for group in one.optimizer.param_groups for master in group["params"])
            yield (value for state in one.optimizer.state.values() for value in state.values())

    def check(self, optimizer: Any) -> None:
        """Every parameter, master and moment of this rank is what is known, bit for bit, but for the vocabulary's padding."""
        for name, parameter in self.named():
            rows = self._rows(name, parameter)
            known = self.local("master", name, parameter).to(parameter.dtype)
            assert torch.equal(parameter[:rows], known[:rows]), name
            (one,) = optimizer.chained_optimizers
            master = getattr(parameter, "main_param", parameter)
            state = one.optimizer.state[master]
            for role, value in (("master", master), *((r, state[r]) for r in ("exp_avg", "exp_avg_sq"))):
                assert torch.equal(value[:rows], self.local(role, name, parameter)[:rows]), (role, name)
            assert int(state["step"]) == STEPS

    def _rows(self, name: str, parameter: torch.nn.Parameter) -> int:
        """How many rows of a parameter are no padding."""
        if "word_embeddings" not in name and "output_layer" not in name:
            return len(parameter)
        return max(
            0, min(len(parameter), self.model["vocab"] - len(parameter) * self.mesh.get_tensor_model_parallel_rank())
        )

    def _home(self) -> str:
        places = [f"mp_rank_{self.mesh.get_tensor_model_parallel_rank():02d}"]
        places += [f"{self.mesh.get_pipeline_model_parallel_rank():03d}"] if self.pp > 1 else []
        places += [f"{self.mesh.get_expert_model_parallel_rank():03d}"] if self.ep > 1 else []
        return "_".join(places)

    def logits(self) -> Tensor:
        """The whole model's, without the vocabulary's padding."""
        tokens = torch.tensor(PROMPT)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            return self.chunks[0](tokens, positions, None)[..., : self.model["vocab"]]


def megatron_rank(rank: int, port: int, folder: Path, options: dict[str, Any]) -> None:
    """A model with known weights and optimizer state, saved; on one rank its logits too."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=options["world"])
    with without_cuda():
        mine = Rank(rank, options)
        if "load" in options:
            optimizer = mine.optimizer()
            mine.load(Path(options["load"]), optimizer)
            mine.check(optimizer)
            np.savez(folder / "expected.npz")
            dist.barrier()
            dist.destroy_process_group()
            return
        mine.fill()
        expected: dict[str, Tensor] = {}
        if options.get("logits"):
            expected["logits"] = mine.logits()
        optimizer = mine.optimizer() if options.get("optimizer") else None
        mine.save(folder / "checkpoint", optimizer)
    if rank == 0:
        roles = ["master"] + (["exp_avg", "exp_avg_sq"] if optimizer is not None else [])
        for (name, shape), role in itertools.product(shapes(mine.model).items(), roles):
            expected[f"{role}/{name}"] = known(role, name, shape)
        np.savez(folder / "expected.npz", **{key: value.numpy() for key, value in expected.items()})
    dist.barrier()
    dist.destroy_process_group()
