"""What an engineer would write by hand: the same model, mesh and data under torchrun, FSDP2 as documented.

    torchrun --nproc-per-node 2 benchmarks/torchrun_peer.py job.toml

Prints one JSON line with the seconds of each step. No snapshots, no checkpoints, no events, nobody to restart it.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from trainrt.config import load
from trainrt.training.data import collate, logical_shards, open_corpus
from trainrt.training.models.moe_lm import MoeLm


def main() -> None:
    config = load(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(config.run.seed)
    model = MoeLm(config.moe_lm, config.moe)
    model.initialize()
    mesh = init_device_mesh("cpu", (ranks,))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.learning_rate, weight_decay=0.1)
    train = open_corpus(config.data).train
    data = config.data
    seconds = []
    for step in range(config.run.steps):
        start = time.perf_counter()
        shards = logical_shards(0, step, global_batch=data.global_batch, microbatch=data.microbatch, length=len(train))
        mine = shards[rank::ranks]
        for turn, ids in enumerate(mine):
            model.set_requires_gradient_sync(turn == len(mine) - 1)
            batch = collate([train[int(i)] for i in ids])
            output = model(batch["input_ids"])
            loss = F.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
            total = loss + config.moe.balance_loss * output.router.balance + config.moe.z_loss * output.router.z
            (total / len(mine)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.detach()
        dist.all_reduce(value)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        print(json.dumps(seconds), flush=True)
    dist.barrier()
    # gloo's threads abort the interpreter's orderly end now and then ("terminate called without an active exception").
    os._exit(0)


if __name__ == "__main__":
    main()
