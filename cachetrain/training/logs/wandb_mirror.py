"""--wandb: sends the TensorBoard log to Weights & Biases while it is written. Errors in wandb never end a run."""

import io
import os
import re
import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cachetrain.atomic import atomic_write
from cachetrain.log import warn
from cachetrain.reading import read_text

ID = "wandb_id"  # file in a run's output_dir, with which a resumed run continues the same wandb run
_INIT_TIMEOUT_S = 30
_FINISH_TIMEOUT_S = 120
_WITHOUT = "the run is logged without Weights & Biases"
_MAX_AHEAD_S = 5  # event files that are newer still are not waited for: the clock has been set back


def start(args: Namespace):
    """Starts a wandb run; without a login or a network an offline run in the output_dir, for `wandb sync`.

    Returns:
        the wandb run, or None if it cannot be started.
    """
    for mode in (None, "offline"):
        try:
            return _start(args, mode)
        except Exception as error:  # any, of the import too: a run is not ended because wandb failed
            if mode is None:
                consequence = "logging offline instead; upload the log with `wandb sync`"
            else:
                consequence = _WITHOUT
            warn(f"--wandb: {_describe(error)}: {consequence}")
            with suppress(Exception):
                _teardown()
    return None


@contextmanager
def following(log_dir: Path) -> Iterator[None]:
    """Lets wandb follow the event files of the SummaryWriter that is opened in `log_dir` inside the block.

    wandb.init(sync_tensorboard=True) is not used: it delays the end of the run by 10 s, waiting for a second
    directory to find the common root, and sends everything again for each writer that Metrics opens after an error.
    """
    try:
        import wandb

        wandb.tensorboard.patch(root_logdir=str(log_dir))
    except Exception as error:
        warn(f"--wandb: {_describe(error)}: {_WITHOUT}")
        yield
        return
    try:
        yield
    finally:
        with suppress(Exception):
            wandb.tensorboard.unpatch()


def finish(run) -> None:
    """Waits until everything is uploaded, up to a timeout; the run counts as failed if an exception is ending it."""
    try:
        run.finish(exit_code=int(sys.exc_info()[0] is not None))
    except Exception as error:
        warn(f"--wandb: {_describe(error)}: the log may not be uploaded completely")


def _teardown():
    import wandb

    wandb.teardown()


def _describe(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _start(args, mode):
    import wandb

    def setting(name, default):
        return os.environ.get(f"WANDB_{name}", default)

    output_dir = Path(args.output_dir)
    _wait_for_new_second(Path(args.logdir) / output_dir.name)
    if not (output_dir / ID).exists():
        atomic_write(output_dir / ID, uuid.uuid4().hex[:8].encode())
    settings = wandb.Settings(
        console=setting("CONSOLE", "off"),
        init_timeout=setting("INIT_TIMEOUT", _INIT_TIMEOUT_S),
        finish_timeout=setting("FINISH_TIMEOUT", _FINISH_TIMEOUT_S),
    )
    with _hidden_terminal():
        run = wandb.init(
            project=setting("PROJECT", "cachetrain"),
            name=setting("NAME", output_dir.resolve().name),
            dir=setting("DIR", output_dir),
            id=setting("RUN_ID", read_text(output_dir / ID)),
            resume=setting("RESUME", "allow"),
            mode=mode,
            config=vars(args),
            settings=settings,
        )
    run.define_metric("*", step_metric="global_step")  # x is the optimizer step, as in TensorBoard
    return run


def _wait_for_new_second(log_dir):
    """Waits while an event file in `log_dir` has the current second in its name, or one of the next few.

    wandb sends every event file whose name has the second of wandb's start or a later one. The event file of an
    earlier process, stopped within the same second, would be sent again, and all of its values would be doubled.
    """
    names = os.listdir(log_dir) if log_dir.is_dir() else []
    opened_s = {int(match[1]) for name in names if (match := re.search(r"tfevents\.(\d+)\.", name))}
    while any(0 <= second - int(time.time()) < _MAX_AHEAD_S for second in opened_s):
        time.sleep(0.01)


@contextmanager
def _hidden_terminal():
    """Hides the terminal from wandb, which would otherwise ask for a login and wait for the answer."""
    stdin, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = stdin
