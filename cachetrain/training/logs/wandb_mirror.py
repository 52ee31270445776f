"""--wandb: Weights & Biases reads the TensorBoard log as it grows. What fails there never ends a run."""

import io
import os
import re
import sys
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

from cachetrain.atomic import atomic_write
from cachetrain.log import warn

ID = "wandb_id"  # file of a run's output_dir: a resumed run goes on in the same wandb run
_START_S, _END_S = 30, 120  # how long wandb may wait for its server at the start and at the end of a run
_MAX_AHEAD_S = 5  # an event file of a later second than now: the clock has been set back


def start(args):
    """Returns the wandb run, or None where there can be none.

    Without a login or a network it is kept in the output_dir, for `wandb sync`.
    """
    import wandb

    for mode in (None, "offline"):
        try:
            return _start(args, mode)
        except Exception as error:  # whatever it is, a mirror is not worth a run
            then = "it is not mirrored" if mode else "the mirror is kept on this disk, `wandb sync` uploads it"
            warn(f"--wandb: {_words(error)}: {then}")
            wandb.teardown()
    return None


@contextmanager
def following(log_dir):
    """Has wandb follow the event files of the SummaryWriter that is opened meanwhile in `log_dir`.

    Not wandb.init(sync_tensorboard=True): that ends 10 s late, because it waits for a second directory to find the
    root of both, and reads all again for each writer that Metrics opens after an error.
    """
    import wandb

    wandb.tensorboard.patch(root_logdir=str(log_dir))
    try:
        yield
    finally:
        wandb.tensorboard.unpatch()


def finish(run):
    """Waits, not for long, until all is uploaded; the run has failed where an exception is ending it."""
    try:
        run.finish(exit_code=int(sys.exc_info()[0] is not None))
    except Exception as error:
        warn(f"--wandb: {_words(error)}")


def _words(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _start(args, mode):
    import wandb

    def setting(name, default):
        return os.environ.get(f"WANDB_{name}", default)

    output_dir = Path(args.output_dir)
    _wait_for_a_new_second(Path(args.logdir) / output_dir.name)
    if not (output_dir / ID).exists():
        atomic_write(output_dir / ID, uuid.uuid4().hex[:8].encode())
    settings = wandb.Settings(
        console=setting("CONSOLE", "off"),
        init_timeout=setting("INIT_TIMEOUT", _START_S),
        finish_timeout=setting("FINISH_TIMEOUT", _END_S),
    )
    with _nobody_to_ask():
        run = wandb.init(
            project=setting("PROJECT", "cachetrain"),
            name=setting("NAME", output_dir.resolve().name),
            dir=setting("DIR", output_dir),
            id=setting("RUN_ID", (output_dir / ID).read_text()),
            resume=setting("RESUME", "allow"),
            mode=mode,
            config=vars(args),
            settings=settings,
        )
    run.define_metric("*", step_metric="global_step")  # x is the optimizer step, as in TensorBoard
    return run


def _wait_for_a_new_second(log_dir):
    """Waits while an event file in `log_dir` has the current second in its name, or one of the next few.

    wandb mirrors every event file whose name has the second of wandb's start or a later one. That of an earlier run,
    stopped within the same second, would be mirrored again: all of its values would be there twice.
    """
    names = os.listdir(log_dir) if log_dir.is_dir() else []
    opened_s = {int(match[1]) for name in names if (match := re.search(r"tfevents\.(\d+)\.", name))}
    while any(0 <= second - int(time.time()) < _MAX_AHEAD_S for second in opened_s):
        time.sleep(0.01)


@contextmanager
def _nobody_to_ask():
    """Hides the terminal, where wandb would ask who is there, and wait for the answer."""
    stdin, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = stdin
