"""The worker: one rank. Joins the group, runs the job, parks when a peer is lost. It knows nothing of Ray.

A worker outlives its peers: after a failed collective it drops its process group and model, keeps its
imports, and waits for the next incarnation's orders.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import re
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from trainrt.errors import Anomaly, CheckpointError, NonFinite, PeerLost, ReplicasDiffer, StoreError, TrainrtError
from trainrt.parallel.calls import Log
from trainrt.parallel.mesh import backend_of, talk_over_the_way_to
from trainrt.parallel.recording import record_calls
from trainrt.run_dir import RunDir
from trainrt.training.control import Control
from trainrt.training.job import Job, Spec
from trainrt.training.loop import run
from trainrt.training.sockets import open_connections, shut_connections

PEER_LOST = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Timed out waiting|Socket (Timeout|closed)"
    r"|gloo.*(tcp|transport)|NCCL (error|communicator was aborted)|connectFullMesh|Connection refused",
    re.IGNORECASE,
)
"""What gloo, NCCL and the rendezvous store say when the other side is gone."""


def serve(connection: socket.socket) -> None:
    """Run incarnations as ordered, until told to exit."""
    torch.set_num_threads(1)
    recorder = record_calls(receive_log(connection))
    control = Control(connection)
    control.send("ready")
    while True:
        spec = Spec.from_message(control.next_start())
        show_stacks_when_asked(spec)
        before = open_connections()
        recorder.begin(spec.incarnation)
        try:
            _run_incarnation(spec, control)
        finally:
            # Peers that wait for this rank hear of it now, whatever still refers to the group.
            shut_connections(since=before, keep=spec.rendezvous)
            _drop_group()


def receive_log(connection: socket.socket) -> Log:
    """The memory for this rank's collective calls, which the agent sends before all orders."""
    _, (fd,), _, _ = socket.recv_fds(connection, 1, 1)
    log = Log(fd)
    os.close(fd)
    return log


def _run_incarnation(spec: Spec, control: Control) -> None:
    try:
        started = time.perf_counter()
        join_group(spec)
        control.send("phase", name="group", seconds=time.perf_counter() - started)
        job = Job.build(spec, report=control.send)
        try:
            outcome = run(job, control)
        finally:
            job.snapshots.close()
        control.send("finished", **outcome)
    except PeerLost as error:
        control.send("lost", message=str(error))
    except Anomaly as error:
        control.send("error", kind="non_finite", message=str(error), traceback="", step=_step_of(error), rollback=True)
    except ReplicasDiffer as error:
        control.send(
            "error", kind="silent_corruption", message=str(error), traceback="", step=_step_of(error), rollback=True,
            ranks=error.ranks,
        )  # fmt: skip
    except NonFinite as error:
        control.send("error", kind="non_finite", message=str(error), traceback="", step=_step_of(error))
    except (CheckpointError, StoreError) as error:
        control.send("error", kind="storage", message=str(error), traceback="", step=_step_of(error))
    except TrainrtError as error:
        control.send("error", kind="runtime", message=str(error), traceback="", step=_step_of(error))
    except Exception as error:
        if is_peer_loss(error):
            control.send("lost", message=_last_line(error))
            return
        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        control.send("error", kind="user_error", message=_last_line(error), traceback=text, step=_step_of(error))


def show_stacks_when_asked(spec: Spec) -> None:
    """On SIGUSR1 write the stacks of all threads into a file, whoever holds the GIL: for where py-spy is not permitted."""
    # faulthandler keeps the file.
    faulthandler.register(signal.SIGUSR1, file=RunDir(spec.run_dir).stack_dump(spec.rank).open("a"), all_threads=True)


def join_group(spec: Spec) -> None:
    """Join the process group of this incarnation. A store key space per incarnation keeps old ones out."""
    host, _, port = spec.rendezvous.rpartition(":")
    timeout = timedelta(seconds=300)
    talk_over_the_way_to(host)
    store = dist.TCPStore(host, int(port), is_master=False, timeout=timeout)
    dist.init_process_group(
        backend_of(spec.device),
        store=dist.PrefixStore(str(spec.incarnation), store),
        rank=spec.rank,
        world_size=spec.world_size,
        timeout=timeout,
    )
    if spec.device == "cuda":
        torch.cuda.set_device(spec.local_rank)


def is_peer_loss(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone, rather than that this one is wrong."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(PEER_LOST.search(str(error)))


def _drop_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def _step_of(error: BaseException) -> int | None:
    return getattr(error, "step", None)


def _last_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
