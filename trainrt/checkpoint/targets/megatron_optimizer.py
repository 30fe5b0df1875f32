"""The optimizer of a model on its way to Megatron: its two groups of parameters, their settings, and the step.

Megatron sorts its groups: first what decays, then what has one dimension and does not. Its two kinds of Adam have the step at
different places, `torch.optim.AdamW` with every parameter, the FusedAdam of Transformer Engine and of Apex in every group, and do
not take each other's: torch wants a step with the moments, and Transformer Engine refuses what is no moment.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from trainrt.checkpoint.formats.megatron_optimizer import LOW, Groups, Kind
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.targets.array import TargetArray
from trainrt.checkpoint.targets.training import Training

KINDS = (Kind(decays=True, spread=False, apart=False), Kind(decays=False, spread=False, apart=False))
"""The groups of a run without spread experts and `decoupled_lr`, in Megatron's order."""
FIXED = {"lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
"""With `wd_mult`, what Megatron finds a group by."""
OF_FUSED = "bias_correction"
"""A setting that FusedAdam has in its groups, and torch's AdamW has not."""
OF_SCHEDULE = "lr_decay_style"

Arrays = Mapping[str, Mapping[str, TargetArray]]
"""Role to Megatron's names of parameters to arrays, in the order of the parameters in the model."""


class Optimizer:
    """See the module. `adam`: fused or torch; None: what the source was trained with. Empty where the source has no moments."""

    def __init__(self, opened: Opened, training: Training, arguments: Mapping[str, Any], adam: str | None) -> None:
        self._training, self._groups = training, Groups(arguments)
        self._scheduler: dict[str, Any] = dict(opened.metadata.get("scheduler") or {})
        self._samples = (opened.metadata.get("data") or {}).get("next_sample", training.step)
        self._fused = adam == "fused" or (adam is None and any(OF_FUSED in group.settings for group in training.groups))
        moments = training.moments if all(map(self._is_whole, training.moments)) else []
        self.roles = [*(["master"] if training.low else []), *moments] if moments else []
        """Of the state that is written, beside the parameters."""
        self.opened = training.opened if moments else opened
        held = {role for _, role in opened.source.layout.tensors} - {"parameter", "buffer"}
        self.lost = [
            f"{role}: Megatron's optimizer has moments of all parameters, in their shapes, or is not there"
            for role in sorted(held - set(self.roles))
        ]
        if moments:
            self._settings = [self._settings_of(kind) for kind in KINDS]
            self._note_steps()
            if OF_SCHEDULE not in self._scheduler:
                self.lost.append(
                    "scheduler: written as constant (--override-opt-param-scheduler takes the one of Megatron's options)"
                )

    def _is_whole(self, role: str) -> bool:
        tensors = self._training.tensors
        return all(
            (p.name, role) in tensors and tensors[p.name, role].shape == p.shape
            for p in self._training.parameters
            if p.name not in self._training.aliases
        )

    def _settings_of(self, kind: Kind) -> dict[str, Any]:
        """Those that most tensors of a group have in the source."""
        training = self._training
        members = {p.name for p in training.parameters if self._groups.of_parameter(p.name, len(p.shape)) == kind}
        groups = sorted(training.groups, key=lambda group: len(members & set(group.names)), reverse=True)
        held = [
            {key: value for key, value in group.settings.items() if key not in ("wd_mult", *FIXED)}
            for group in groups
            if members & set(group.names) or group is groups[0]
        ]
        what = "matrices" if kind.decays else "norms and biases"
        if any(other != held[0] for other in held):
            self.lost.append(f"settings of {what}: Megatron has one group of them, which gets those of most")
        if not kind.decays and held[0].get("weight_decay") and "wd_mult" not in groups[0].settings:
            self.lost.append(f"weight_decay of {what}: Megatron's scheduler makes it 0")
        rate = held[0].get("max_lr", held[0].get("lr", 1e-3))
        filled = {"default_config": True, "max_lr": rate, "min_lr": 0.0, **held[0], **FIXED}
        return {**filled, "wd_mult": float(kind.decays)} | ({OF_FUSED: True} if self._fused else {})

    def _note_steps(self) -> None:
        steps = sorted({group.step for group in self._training.groups if group.step is not None})
        self._step = steps[-1] if steps else self._training.step
        if not steps:
            self.lost.append(f"steps: not known, and taken for the iterations: {self._step}")
        if len(steps) > 1:
            self.lost.append(f"steps: groups have taken {steps}, and Megatron keeps one: {self._step}")

    def document(self, rank: Arrays | None = None) -> dict[str, Any]:
        """What a checkpoint has beside the model: the optimizer (of `rank` in the classic form) and the scheduler."""
        if not self.roles:
            return {}
        optimizer = self._common() if rank is None else self._numbered(rank)
        return {"optimizer": optimizer, "opt_param_scheduler": self._schedule()}

    def _common(self) -> dict[str, Any]:
        """torch_dist: everything but the tensors."""
        state = {} if self._fused else {"common_step": torch.tensor(float(self._step))}
        inner = {"state": state, "param_groups": [self._group(number) for number in range(len(KINDS))]}
        return {"optimizer": inner} if self._training.low else inner

    def _numbered(self, rank: Arrays) -> dict[str, Any]:
        """Classic: parameters have numbers, in their order in the model, group by group."""
        numbers, state = itertools.count(), {}
        groups, masters = [], []
        for place, kind in enumerate(KINDS):
            members = {
                name: next(numbers)
                for name, array in rank["parameter"].items()
                if self._groups.of_parameter(name, len(array.shape)) == kind
            }
            for name, number in members.items():
                moments = {role: rank[role][name] for role in self.roles if role != "master"}
                # A tensor for each parameter: torch counts in place.
                step = {} if self._fused else {"step": torch.tensor(float(self._step))}
                state[number] = {**step, **moments}
            groups.append({**self._group(place), "params": list(members.values())})
            low = [name for name in members if rank["parameter"][name].dtype in LOW]
            masters.append([rank["master"][name] for name in low])
        inner = {"state": state, "param_groups": groups}
        return {"optimizer": inner, "fp32_from_fp16_params": masters} if self._training.low else inner

    def _group(self, number: int) -> dict[str, Any]:
        return {**self._settings[number], **({"step": self._step} if self._fused else {})}

    def _schedule(self) -> dict[str, Any]:
        """Megatron does not load an optimizer without one; what is not known of it stays as it is now."""
        rate, decay = self._settings[0]["max_lr"], self._settings[0].get("weight_decay", 0.0)
        constant = {
            "max_lr": rate, "lr_warmup_steps": 0, "num_steps": self._samples, "lr_decay_style": "constant",
            "lr_decay_steps": max(1, self._samples), "min_lr": 0.0, "start_wd": decay, "end_wd": decay,
            "wd_incr_style": "constant", "wd_incr_steps": 0,
        }  # fmt: skip
        return self._scheduler if OF_SCHEDULE in self._scheduler else constant
