"""Ranks of the trainer as real processes, forked from one that has imported everything, and what each of them saw."""

import hashlib
import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
TIMEOUT_S = 120
_IMPORTED = ["torch.distributed.fsdp", "torch.nn.parallel", "optimi", "cachetrain.training.saves.saving",
             "cachetrain.training.ema", "cachetrain.training.logs.run_logs", "cachetrain.training.optim",
             "cachetrain.training.setup"]  # fmt: skip


class Rank(NamedTuple):
    """What came of a rank: exit code (negative: the signal that killed it), stdout and stderr, what `observe` saw."""

    code: int
    output: str
    seen: dict


class Ranks:
    """`ranks` processes of the trainer with only the five variables that every launcher sets.

    Args:
        argv: of the trainer.
        folder: where the ranks write what they say and saw.
        kill: (rank, name of a moment of `observe`) at which that rank gets a SIGKILL.
        cwds: the directory in which each rank runs; default: this process's.
    """

    def __init__(self, argv, ranks, folder, kill=None, cwds=None):
        folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(_IMPORTED)
        self.folder, self.processes = folder, []
        for rank in range(ranks):
            env = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            moment = kill[1] if kill and kill[0] == rank else None
            cwd = cwds[rank] if cwds else os.getcwd()
            arguments = (
                {key: str(value) for key, value in env.items()},
                list(map(str, argv)),
                folder,
                rank,
                moment,
                cwd,
            )
            self.processes.append(forks.Process(target=_rank, args=arguments))
            self.processes[-1].start()

    def finish(self, timeout_s=TIMEOUT_S):
        """Waits for the ranks; returns a list of Rank. Kills them and raises TimeoutError if they take longer."""
        deadline_s = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0, deadline_s - time.monotonic()))
        hang = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for rank in hang:
            self.processes[rank].kill()
        results = []
        for rank, process in enumerate(self.processes):
            seen = self.folder / f"rank{rank}.json"
            seen = json.loads(seen.read_text()) if seen.exists() else {}
            results.append(Rank(process.exitcode, (self.folder / f"rank{rank}.log").read_text(), seen))
        if hang:
            raise TimeoutError(
                f"ranks {hang} still run after {timeout_s} s:\n" + "\n".join(r.output for r in results)
            )
        return results


def digest(tensors):
    """A hash of {name: tensor}."""
    import torch

    parts = hashlib.sha256()
    for name in sorted(tensors):
        parts.update(name.encode() + tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return parts.hexdigest()


def open_trainer(env, argv, log):
    """Makes this process, a fork server's child, one that has just started the trainer, and returns its module.

    Args:
        env: variables to set; argv: list of str; log: path for stdout and stderr.
    """
    # Loader workers are its own children, as in any process. Those of a fork server would outlive a kill: what they
    # take for their parent is the server, which in turn lives as long as they do.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(env)
    descriptor = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("train_from_cached", REPO / "train_from_cached.py")
    trainer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trainer)
    sys.argv = ["train_from_cached.py", *argv]
    return trainer


def _rank(env, argv, folder, rank, moment, cwd):
    os.chdir(cwd)
    trainer = open_trainer(env, argv, folder / f"rank{rank}.log")
    seen = observe(trainer, moment)
    try:
        trainer.cli.run(trainer.main)
    finally:
        (folder / f"rank{rank}.json").write_text(json.dumps(seen))


def observe(trainer, moment=None):
    """Returns a dict that fills while the trainer runs in this process.

    headers: paths of the headers read. samples: ids of each micro-batch. parameters, own: number of elements of the
    model, and of those that this rank holds. exchanges: number of gradient exchanges. weights, averages: their hashes
    at each save.

    Args:
        moment: at which the process kills itself: "read" (of a header), "forward" (the fourth), "save".
    """
    from cachetrain.training import distributed, index
    from cachetrain.training.saves.saving import Saving

    seen = {"headers": [], "samples": [], "exchanges": 0, "weights": [], "averages": []}

    def at(reached):
        if moment == reached:
            os.kill(os.getpid(), signal.SIGKILL)

    def header(path):
        seen["headers"].append(os.fspath(path))
        at("read")

    def forward(model, batch, **_):
        if model.training:
            seen["samples"].append(batch["samples"].tolist())
        if len(seen["samples"]) == 4 and moment == "forward":
            for saving in [thread for thread in threading.enumerate() if thread.name == "checkpoint"]:
                saving.join()  # step 2 is written behind training
            at("forward")

    def save(saving, step, unet, ema, *_):
        seen["weights"].append(_digest_of(unet))
        if ema:
            with ema.applied():
                seen["averages"].append(_digest_of(unet))

    _before(index, "read_header", header)
    _before(trainer, "forward", forward)
    _before(Saving, "save", save)
    _before(Saving, "_bring_frozen_parts", lambda *_: at("save"))
    _watch_exchanges(distributed, seen)
    return seen


def _before(owner, name, look):
    """Makes every call of owner.name call `look` first."""
    original = getattr(owner, name)

    def replacement(*args, **kwargs):
        look(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def _digest_of(unet):
    tensors = unet.state_dict()
    return digest({n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()})


def _watch_exchanges(distributed, seen):
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    wrap = distributed.wrap

    def count(*_, **__):
        seen["exchanges"] += 1

    def counted_allreduce(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        count()
        return allreduce_hook(None, bucket)

    def watched_wrap(*args):
        model = wrap(*args)
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(None, counted_allreduce)
        seen["parameters"] = sum(p.numel() for p in model.parameters())
        seen["own"] = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
        return model

    distributed.wrap = watched_wrap
    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):  # fully_shard's, by torch's version
        if hasattr(dist, name):
            _before(dist, name, count)
