"""Ranks of the trainer as real processes, forked from one that has imported everything, and what each of them saw."""

import faulthandler
import fcntl
import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from functools import partial, partialmethod
from itertools import count
from pathlib import Path
from typing import NamedTuple

from helpers import HANG_S, REPO, count_and_estimate_once, digest

_IMPORTED = ["torch.distributed.fsdp", "torch.nn.parallel", "optimi", "cachetrain.checkpoints.save",
             "cachetrain.training.ema", "cachetrain.training.logs.run_logs", "cachetrain.training.optim",
             "cachetrain.training.run"]  # fmt: skip


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
        kill: (rank, moment of `observe`, or of what takes its place) at which that rank gets a SIGKILL.
        cwds: the directory in which each rank runs; default: this process's.
        target: function that each process calls, with the arguments of `_rank`, which is the default.
    """

    def __init__(self, argv, ranks, folder, kill=None, cwds=None, target=None):
        folder.mkdir(exist_ok=True)
        port = free_port()
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
            self.processes.append(forks.Process(target=target or _rank, args=arguments))
            self.processes[-1].start()

    def finish(self, timeout_s=HANG_S):
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


_PORTS = []  # open files, whose locks keep ports for this process


def free_port():
    """A port for ranks to meet at, which stays this process's until it ends.

    It lies below the ports that the system hands out, and a lock keeps other tests on this machine from choosing it.
    """
    for port in range(20_000, 32_000):
        file = open(Path(tempfile.gettempdir(), f"cachetrain-test-port-{port}"), "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as tried:
                tried.bind(("", port))
        except OSError:  # another test's, or another program's
            file.close()
            continue
        _PORTS.append(file)
        return port
    raise OSError("no free port")


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
    faulthandler.enable()  # a death by SIGSEGV leaves the place of each thread in the log
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("train_from_cached", REPO / "train_from_cached.py")
    trainer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trainer)
    count_and_estimate_once()
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


def starved_rank(env, argv, folder, rank, moment, cwd):
    """A rank whose other threads run only while its main thread waits with Python's lock released, as on a loaded
    machine. Gradients are exchanged in many small parts.

    Args:
        moment: "backward": the process kills itself in the middle of its second backward pass.
    """
    from torch.nn.parallel import DistributedDataParallel

    from cachetrain.training import run

    sys.setswitchinterval(10 * HANG_S)
    time.sleep = lambda _: None
    DistributedDataParallel.__init__ = partialmethod(DistributedDataParallel.__init__, bucket_cap_mb=0.1)
    open_unet, passes = run.open_unet, count(1)

    def die(_):
        if next(passes) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def hooked(*args, **kwargs):
        unet, chosen = open_unet(*args, **kwargs)
        unet.mid_block.attentions[0].proj_in.weight.register_hook(die)
        return unet, chosen

    if moment == "backward":
        run.open_unet = hooked
    _rank(env, argv, folder, rank, None, cwd)


def observe(trainer, moment=None):
    """Returns a dict that fills while the trainer runs in this process.

    headers: paths of the headers read. samples: ids of each micro-batch. parameters, own: number of elements of the
    model, and of those that this rank holds. exchanges: number of gradient exchanges. weights, averages: their hashes
    at each save.

    Args:
        moment: at which the process kills itself: "read" (of a header), "forward" (the fourth), "save".
    """
    from cachetrain.checkpoints.save import Saving
    from cachetrain.data import index
    from cachetrain.training import run

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
            join_saving()
            at("forward")

    def save(save, step, unet, ema, *_):
        seen["weights"].append(_digest_of(unet))
        if ema:
            with ema.applied():
                seen["averages"].append(_digest_of(unet))

    before(index, "read_header", header)
    before(trainer, "forward_pass", forward)
    before(Saving, "save", save)
    before(Saving, "_add_frozen_parts", lambda *_: at("save"))
    _watch_exchanges(run, seen)
    return seen


def join_saving():
    """Waits until the checkpoint that a thread is writing is complete."""
    for thread in [thread for thread in threading.enumerate() if thread.name == "checkpoint"]:
        thread.join()


def watched_rank(env, argv, folder, rank, moment, cwd, watch=None):
    """A rank, or the only process, that writes down the samples before they are trained on.

    At SIGUSR1 it says where it is.

    Args:
        watch: takes the place of `watch_samples`.
    """
    global observe
    faulthandler.register(signal.SIGUSR1, open(folder / f"rank{rank}.stacks", "w"))
    observe = partial(watch or watch_samples, folder / f"rank{rank}.samples")
    _rank(env, argv, folder, rank, moment, cwd)


def watch_samples(path, trainer, moment):
    """Writes a line with the sample ids of each micro-batch, which a kill leaves there.

    Args:
        moment: at which the process kills itself: "forward" (the fourth; all saves so far are complete) or "save"
            (all but the manifest is written).
    """
    from cachetrain.checkpoints import save

    lines, number = open(path, "a", buffering=1), count(1)

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def forward(model, batch, **_):
        if model.training:
            print(batch["samples"].tolist(), file=lines)
            if next(number) == 4 and moment == "forward":
                join_saving()
                kill()

    before(trainer, "forward_pass", forward)
    if moment == "save":
        before(save, "write_manifest", kill)
    return {}


def seen_by(folder, rank):
    """The sample ids of each micro-batch that `watch_samples` has written down."""
    path = folder / f"rank{rank}.samples"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def before(owner, name, look):
    """Makes every call of owner.name call `look` first."""
    original = getattr(owner, name)

    def replacement(*args, **kwargs):
        look(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def _digest_of(unet):
    tensors = unet.state_dict()
    return digest({n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()})


def _watch_exchanges(run, seen):
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    wrap = run.wrap

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

    run.wrap = watched_wrap
    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):  # fully_shard's, by torch's version
        if hasattr(dist, name):
            before(dist, name, count)


def listing_rank(env, argv, folder, rank, moment, cwd):
    """A rank that only lists pairs, twice: with --save_index, then as any later start.

    Args:
        argv: paths of the data directories, one for each time.
    """
    from argparse import Namespace

    open_trainer(env, [], folder / f"rank{rank}.log")
    from cachetrain.data import index, saved_index
    from cachetrain.data.split import open_index
    from cachetrain.distributed import World

    saved_index.SETTLE_S, world, seen = 0.02, World(), {"headers": [], "checksums": [], "tokens": []}
    flags = dict.fromkeys(("force_txtcache", "sizes", "overfit", "val_data_dir", "dir_weights", "kohya_repeats",
                           "shard_cache", "shard_cache_gb"))  # fmt: skip
    flags |= {"imgcache_suffix": ".img_sdxl", "txtcache_suffix": ".txt_t5cache", "val_split": 0.3}
    before(index, "read_header", lambda path: seen["headers"][-1].append(os.fspath(path)))
    for number, directory in enumerate(argv):
        seen["headers"].append([])
        pairs, held_out, _ = open_index(Namespace(train_data_dir=[directory], **flags), world, save_index=not number)
        seen["checksums"].append([pairs.checksum(), held_out.checksum()])
        seen["tokens"].append(pairs.tokens.tolist())
    world.close()
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))


def sharing_rank(env, argv, folder, rank, moment, cwd):
    """A rank that shares arrays with those of the same key, and says what it has.

    Args:
        argv: key of each rank; "none" for all: the first rank fails.
    """
    import numpy as np

    open_trainer(env, [], folder / f"rank{rank}.log")
    from cachetrain.data.many_files import PackedStrings
    from cachetrain.distributed import World

    world, made = World(), []

    def make():
        made.append(rank)
        if argv[rank] == "none":
            raise ValueError(f"rank {rank} has none")
        strings = PackedStrings()
        strings.extend(b"x", [b"1", b"", b"\xff"])
        return {"large": np.full(2**20, rank, np.uint32), "empty": np.zeros((0, 3)), "strings": strings}

    try:
        value = world.share(make, argv[rank])
    except ValueError as error:
        seen = {"error": str(error)}
    else:
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:cachetrain" in line]
        seen = {"made": made, "total": int(value["large"].sum()), "mapped": len(mapped)}
        seen["kib"] = _private_kib("memfd:cachetrain")
        seen["strings"] = [*value["strings"], len(value["empty"])]
        if rank == 1:
            value["large"][0] = 99
        world.barrier()
        seen["first"] = int(value["large"][0])
    world.close()
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))


def _private_kib(name):
    """KiB of the mappings of a file that this process does not share."""
    total = inside = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = name in line
        elif inside and line.startswith("Private_Dirty:"):
            total += int(line.split()[1])
    return total
