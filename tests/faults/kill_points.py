"""Points of a training run at which its process kills itself: while it loads, in a step, or within a save."""

import contextlib
import json
import os
import re
import signal
from pathlib import Path
from typing import NamedTuple

import torch
import train_ranks
from save_faults import watched_disk

LOADING = ["open_index", "open_unet", "restore", "logs"]
IN_A_STEP = ["forward", "optimizer", "log"]


class Point(NamedTuple):
    """Where a process is killed.

    Attributes:
        name: of LOADING, of IN_A_STEP, or "save".
        step: whose work it is, or whose save; 0 while loading.
        number: of the micro-batch in the step ("forward") or of the operation in the save, from 0.
    """

    name: str
    step: int = 0
    number: int = 0


@contextlib.contextmanager
def watched_saves(look):
    """Calls look(step, operation) ahead of each operation by which a save changes its checkpoint's files."""

    def before(operation, path):
        step = re.search(r"checkpoint-(\d+)", str(path))
        if step:
            look(int(step[1]), operation)

    with watched_disk(before):
        yield


def watch_and_kill(path, trainer, point):
    """`train_ranks.watch_samples` of a process that kills itself at `point`, as JSON has it; None: at none.

    Just before it writes the numbers of its workers' processes to a file named like `path`, ending in ".killed".
    """
    from cachetrain.checkpoints.resume import Resumed
    from cachetrain.checkpoints.save import Saving
    from cachetrain.training import nonfinite
    from cachetrain.training import run as opening
    from cachetrain.training.logs.run_logs import Logs

    # How often a worker looks whether its parent lives. By default 5 s, for which the test would have to wait.
    torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.2
    point = point and Point(*point)
    micro_batches = operations = 0

    def kill():
        pid = os.getpid()
        workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        path.with_suffix(".killed").write_text(json.dumps(workers))
        os.kill(pid, signal.SIGKILL)

    def at(name, step=0, number=0):
        if point == (name, step, number):
            if name in IN_A_STEP:
                train_ranks.join_saving()  # so that the newest checkpoint is the same each time
            kill()

    def due(saving, step, *_):
        nonlocal decided, micro_batches
        decided, micro_batches = step, 0

    def forward(model, *_, **__):
        nonlocal micro_batches
        if model.training:
            at("forward", decided + 1, micro_batches)
            micro_batches += 1

    def restore(resumed, *_):
        nonlocal decided
        decided = resumed.step
        at("restore")

    def operation(step, _):
        nonlocal operations
        if step == point.step:
            at("save", step, operations)
            operations += 1

    decided = 0
    train_ranks.watch_samples(path, trainer, None)
    train_ranks.before(opening, "open_index", lambda *_: at("open_index"))
    train_ranks.before(opening, "open_unet", lambda *_: at("open_unet"))
    train_ranks.before(Resumed, "restore", restore)
    train_ranks.before(Logs, "__init__", lambda *_: at("logs"))
    train_ranks.before(Saving, "due", due)
    train_ranks.before(trainer, "forward_pass", forward)
    train_ranks.before(nonfinite, "step_if_finite", lambda *_: at("optimizer", decided))
    train_ranks.before(Logs, "write", lambda *_: at("log", decided))
    if point and point.name == "save":
        write = Saving._write

        def watched_write(*args):
            with watched_saves(operation):
                write(*args)

        Saving._write = watched_write
    return {}
