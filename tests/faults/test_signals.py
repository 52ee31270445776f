"""SIGINT and SIGTERM at every stage of a run: it saves, leaves, and goes on to the weights it would have had."""

import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from helpers import HANG_S, REPO, digest, trainer_argv, wait_until
from train_ranks import _IMPORTED, before, free_port, open_trainer

STEPS = 18
FLAGS = ["--max_steps", STEPS, "--batch_size", 2, "--lr", 1e-3, "--ema_decay", 0.9,
         "--cond_dropout", 0.2, "--val_split", 0.1, "--keep_last", 2, "--log_groups", 1, 3]  # fmt: skip
# What a run goes through every two steps; where that does not matter it only trains, and saves at its end.
FULL = ["--val_steps", 2, "--sample_steps", 2, "--sampler_steps", 1, "--sample_cfgs", 1, "--save_steps", 2]
BRIEF = ["--val_steps", STEPS, "--save_steps", STEPS]
PROMPTS = {"samples": [{"prompt": "a star"}], "generate_pretrain_samples": True}
# Where a signal comes, in the order in which the run is stopped there again and again.
LOADING = ["loading", "first samples"]
WORKERS = ["worker starts", "worker works"]
STAGES = ["read", "forward", "backward", "optimizer", "log", "validation", "samples", "writing"]


class Trainer:
    """The trainer as a process of its own, forked from one that has imported everything; it leads a process group.

    Args:
        folder: of the run's files: "run", what it says, and at which step the signal came.
        stage: at which it gets the signal `number` for the first time once step `after` has been decided, see
            `_signal_at`; with `group` all of its process group get it.
        env: environment variables.
        stuck: the thread that writes a checkpoint never comes to an end: it stops before it writes the state.
    """

    def __init__(self, argv, folder, stage=None, number=signal.SIGTERM, group=False, after=1, env=None, stuck=False):
        folder.mkdir(exist_ok=True)
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(
            [*_IMPORTED, "cachetrain.sampling.samples", "transformers.models.t5.modeling_t5"]
        )
        self.log, self.came = folder / f"{time.monotonic_ns()}.log", folder / "came"
        self.stuck = folder / "stuck"
        self.came.unlink(missing_ok=True)
        arguments = (list(map(str, argv)), self.log, self.came, stage, number, group, after, env or {},
                     self.stuck if stuck else None)  # fmt: skip
        self.process = forks.Process(target=_train, args=arguments)
        self.process.start()

    def wait(self):
        """Exit code; negative: the signal that killed it."""
        self.process.join(HANG_S)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still runs after {HANG_S} s:\n{self.log.read_text()}")
        return self.process.exitcode

    def wait_until_stuck(self):
        wait_until(self.stuck.exists, self.process.is_alive)

    @property
    def output(self):
        return self.log.read_text()


def _train(argv, log, came, stage, number, group, after, env, stuck):
    os.setpgid(0, 0)
    trainer = open_trainer(env, argv, log)
    signal_group = partial(_signal_group, os.getpid(), number)
    # The process that has reached the stage, which may be a worker.
    _signal_at(trainer, stage, after, came, signal_group if group else lambda: os.kill(os.getpid(), number))
    if stuck:
        from cachetrain.checkpoints import save

        def stop(*_):
            stuck.touch()
            threading.Event().wait()

        before(save, "write_state", stop)
    trainer.cli.run(trainer.main)


def _signal_group(group, number):
    """From another process: a worker takes a SIGTERM of its parent for torch's, with which that ends its workers."""
    subprocess.run(["bash", "-c", f"kill -{int(number)} -- -{group}"], start_new_session=True, check=True)


def _signal_at(trainer, stage, after, came, send):
    """Makes the process signal itself at a stage, once.

    A stage of the loop counts once it has been decided of step `after`, or a later one, whether it is the last one.
    `came` gets the number of the last step of which that had been decided.
    """
    import torch

    from cachetrain.checkpoints.save import Saving
    from cachetrain.data import dataset
    from cachetrain.sampling.samples import SampleImages
    from cachetrain.training import nonfinite
    from cachetrain.training import run as opening
    from cachetrain.training.logs.run_logs import Logs
    from cachetrain.training.validation import Validation

    pid, decided, sent = os.getpid(), [], threading.Event()
    due, open_unet, save = Saving.due, opening.open_unet, Saving.save

    def seen_due(save, step, stop):
        result = due(save, step, stop)
        decided.append(step)
        return result

    def at(reached):
        in_time = reached in (*LOADING, *WORKERS) or (decided and decided[-1] >= after)
        if reached == stage and in_time and not came.exists():
            came.write_text(str(decided[-1] if decided else 0))
            send()
        if reached == "writing" and in_time:
            sent.set()

    def awaited_save(saving, step, *args):
        """Training goes on once the thread has signalled, so that the step is known."""
        save(saving, step, *args)
        if stage == "writing" and step >= after:
            assert sent.wait(HANG_S)

    def hooked(*args, **kwargs):
        at("loading")
        unet, chosen = open_unet(*args, **kwargs)
        unet.conv_out.bias.register_hook(lambda _: at("backward"))
        return unet, chosen

    def watch(owner, name, reached):
        before(owner, name, lambda *_, **__: at(reached()))

    Saving.due, Saving.save, opening.open_unet = seen_due, awaited_save, hooked
    watch(torch.utils.data._utils.worker, "_worker_loop", lambda: "worker starts")
    watch(dataset.CachedPairs, "_latents", lambda: "read" if os.getpid() == pid else "worker works")
    watch(trainer, "forward_pass", lambda: "forward")
    watch(nonfinite, "step_if_finite", lambda: "optimizer")
    watch(Logs, "write", lambda: "log")
    watch(Validation, "measure", lambda: "validation")
    watch(SampleImages, "draw", lambda: "samples" if decided else "first samples")
    watch(Saving, "_write", lambda: "writing")


def argv_of(dataset, model, folder, *more, brief=False):
    out, prompts = folder / "run", folder / "prompts.json"
    kind = BRIEF if brief else [*FULL, "--sample_prompts", prompts]
    prompts.parent.mkdir(exist_ok=True)
    prompts.write_text(json.dumps(PROMPTS))
    resume = ["--resume", "latest"] if (out / "args.json").exists() else []
    return trainer_argv(dataset, model, out, *FLAGS, *kind, *resume, *more)


def last_state(folder, step=STEPS):
    """A hash of the weights, the averages and the optimizer's tensors of the last step."""
    from safetensors.torch import load_file

    checkpoint = folder / f"run/checkpoint-{step:06d}"
    paths = [path for part in ("unet", "unet_ema", "training_state") for path in (checkpoint / part).glob("*tensors")]
    assert len(paths) == 3
    return digest({f"{path.parent.name}/{k}": v for path in paths for k, v in load_file(path).items()})


def newest(folder):
    """The step of the newest checkpoint; 0 without any."""
    return max((int(path.name.split("-")[1]) for path in (folder / "run").glob("checkpoint-*")), default=0)


def assert_stopped(trainer, folder, code):
    """It ended after the step that was under way, which is saved, and said how to go on."""
    assert trainer.wait() == code, trainer.output
    stopped = re.findall(rf"stopped after step (\d+) of {STEPS}; --resume latest continues the run", trainer.output)
    assert stopped == [str(int(trainer.came.read_text()) + 1)], trainer.output
    assert newest(folder) == int(stopped[0])
    assert "Traceback" not in trainer.output


@pytest.fixture(scope="module")
def start(shapes, model_t5):
    """Function of (folder, flags, brief, **what Trainer takes): a Trainer of its run, resumed if there is one."""

    def start(folder, *flags, brief=True, **options):
        return Trainer(argv_of(shapes, model_t5, folder, *flags, brief=brief), folder, **options)

    return start


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder).wait() == 0
    return last_state(folder)


def finish(start, folder):
    trainer = start(folder)
    assert trainer.wait() == 0, trainer.output
    assert not list((folder / "run").glob(".*stage")) and not list((folder / "run").glob(".*removed"))


@pytest.mark.parametrize(("number", "stages"), [(signal.SIGTERM, STAGES), (signal.SIGINT, STAGES[1:2])])
def test_a_run_stopped_at_every_stage_ends_with_the_weights_of_an_undisturbed_one(
    number, stages, start, undisturbed, tmp_path
):
    for stage in LOADING:
        trainer = start(tmp_path, stage=stage, number=number, brief=False)
        assert trainer.wait() == 128 + number and trainer.came.exists(), trainer.output
        assert trainer.output.endswith({15: "terminated\n", 2: "interrupted\n"}[number])
        assert newest(tmp_path) == 0 and "Traceback" not in trainer.output
        if stage == "loading":  # the directory is as good as new: what comes next is no resumed run
            assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    for stage in stages:
        assert_stopped(start(tmp_path, stage=stage, number=number, brief=False), tmp_path, 128 + number)
    finish(start, tmp_path)
    assert last_state(tmp_path) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_or_the_end_of_a_terminal_reaches_the_loaders_workers_too(number, start, undisturbed, tmp_path):
    trainer = start(tmp_path, "--num_workers", 2, stage="forward", number=number, group=True)
    assert_stopped(trainer, tmp_path, 128 + number)
    finish(start, tmp_path)
    assert last_state(tmp_path) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_signalled_while_it_starts_works_on(number, start, undisturbed, tmp_path):
    trainer = start(tmp_path, "--num_workers", 2, stage="worker starts", number=number)
    assert trainer.wait() == 0 and trainer.came.exists(), trainer.output
    assert last_state(tmp_path) == undisturbed


def test_a_worker_that_is_killed_ends_the_run_and_does_not_hang_it(start, undisturbed, tmp_path):
    trainer = start(tmp_path, "--num_workers", 2, stage="worker works", number=signal.SIGKILL)
    assert trainer.wait() == 2 and trainer.came.exists()
    assert re.search(r"a loader process died \(.*lower --num_workers .*; last checkpoint: ", trainer.output)
    assert "Traceback" not in trainer.output
    finish(start, tmp_path)
    assert last_state(tmp_path) == undisturbed


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_leaves_at_once_and_nothing_half_written_is_trusted(numbers, start, undisturbed, tmp_path):
    assert_stopped(start(tmp_path, stage="forward"), tmp_path, 143)
    kept = newest(tmp_path)
    trainer = start(tmp_path, stage="forward", number=numbers[0], after=kept + 1, stuck=True)
    trainer.wait_until_stuck()
    assert trainer.came.exists()
    os.kill(trainer.process.pid, numbers[1])
    assert trainer.wait() == -numbers[1]  # which never comes if it waits for the save
    assert newest(tmp_path) == kept and list((tmp_path / "run").glob(".checkpoint*stage/unet_ema/*"))
    finish(start, tmp_path)
    assert last_state(tmp_path) == undisturbed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_both_after_the_same_step(rank, start, tmp_path):
    def codes(run, *flags, **options):
        env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        flags = ["--output_dir", tmp_path / run / "run", "--logdir", tmp_path / run / "tb", *flags]
        flags = ["--max_steps", 5, "--batch_size", 1, *flags]
        both = [start(tmp_path / f"rank{i}", *flags, env=env | {"RANK": str(i), "LOCAL_RANK": str(i)},
                      **(options if i == rank else {})) for i in (0, 1)]  # fmt: skip
        return [trainer.wait() for trainer in both]

    assert codes("plain") == [0, 0]
    assert codes("stopped", stage="backward") == [143, 143]
    assert newest(tmp_path / "stopped") == int((tmp_path / f"rank{rank}" / "came").read_text()) + 1 < 5
    assert codes("stopped", "--resume", "latest") == [0, 0]
    assert last_state(tmp_path / "stopped", 5) == last_state(tmp_path / "plain", 5)


@pytest.mark.parametrize("signals", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_signals_at_random_steps_and_stages_change_nothing(signals, start, undisturbed, tmp_path):
    draw, codes = random.Random(0), []
    while len(codes) < signals or codes[-1]:
        folder, number = tmp_path / str(codes.count(0)), draw.choice([signal.SIGTERM, signal.SIGINT])
        kept = newest(folder)
        if kept < STEPS - 1:
            stage, after = draw.choice(["loading", *STAGES]), draw.randrange(kept + 1, STEPS)
        else:  # of the last step it is decided right before the optimizer takes it
            stage, after = draw.choice(STAGES[STAGES.index("optimizer") :]), STEPS
        if len(codes) >= signals:
            stage = None  # the last run ends
        workers = 0 if stage == "read" else draw.choice([0, 2])  # which read in place of the process itself
        flags, brief = ["--num_workers", workers], stage is None
        trainer = start(folder, *flags, brief=brief, stage=stage, number=number, group=True, after=after)
        codes.append(trainer.wait())
        assert "Traceback" not in trainer.output
        assert trainer.came.exists() == (stage is not None)
        if stage == "loading":
            assert codes[-1] == 128 + number and newest(folder) == kept, trainer.output
            continue
        stopped = min(int(trainer.came.read_text()) + 1, STEPS) if stage else STEPS
        assert codes[-1] == (128 + number if stopped < STEPS else 0) and newest(folder) == stopped, trainer.output
        if stopped == STEPS:
            assert last_state(folder) == undisturbed
    print(f"{codes.count(0)} runs, {len(codes) - codes.count(0)} stops")


PAUSED = """
import runpy, sys

def pause(event, args, seen=[]):
    # In each step the trainer looks for this file, and removes it if it is there.
    if event == "os.remove" and str(args[0]).endswith("trigger.checkpoint"):
        seen.append(event)
        if len(seen) == 3:
            print("paused", flush=True)
            sys.stdin.readline()

sys.addaudithook(pause)
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_program_itself_stops_and_goes_on(shapes, model_t5, start, undisturbed, tmp_path):
    """As a person starts it, in a fresh interpreter, but for a pause in its third step, in which the signal comes."""
    argv = [REPO / "train_from_cached.py", *argv_of(shapes, model_t5, tmp_path, "--num_workers", 2, brief=True)]
    with subprocess.Popen(
        [sys.executable, "-c", PAUSED, *map(str, argv)], cwd=tmp_path, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as program:  # fmt: skip
        said = list(itertools.takewhile(lambda line: line != "paused\n", program.stdout))
        assert program.poll() is None, "".join(said)
        program.send_signal(signal.SIGTERM)
        output, _ = program.communicate("go on\n", timeout=HANG_S)
    assert program.returncode == 143 and "Traceback" not in output
    assert (
        output.endswith(f"stopped after step 4 of {STEPS}; --resume latest continues the run\n")
        and newest(tmp_path) == 4
    )
    finish(start, tmp_path)
    assert last_state(tmp_path) == undisturbed
