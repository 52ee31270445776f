"""Training processes that are killed at random moments and resumed until they are done train as undisturbed ones."""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import train_ranks
from test_resume import RESUME, Runs, content, events, metrics, seen_by, watched_rank

from cachetrain.checkpoints.save import checkpoint_path, checkpoints, step_of

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")

STEPS, ACCUM, SAVE_STEPS = 7, 2, 2
FLAGS = ["--batch_size", 3, "--gradient_accum", ACCUM, "--max_steps", STEPS, "--save_steps", SAVE_STEPS,
         "--log_groups", 1, 3]  # fmt: skip
FLAGS_OF_TWO = ["--batch_size", 2, "--max_steps", 5, "--save_steps", 1]
SECONDS = 60


@pytest.fixture(scope="module")
def runs(shapes, model_t5, tmp_path_factory):
    return Runs(shapes, model_t5, tmp_path_factory.mktemp("runs"))


class Undisturbed:
    """The run that all others must come to."""

    def __init__(self, runs):
        self.out = runs.new()
        self.samples = runs.train(self.out, *FLAGS)
        self.content, self.metrics = content(self.out, STEPS), metrics(self.out)
        self.events = events(runs, self.out)


@pytest.fixture(scope="module")
def undisturbed(runs):
    return Undisturbed(runs)


class Process:
    """A training process that can be killed.

    Attributes:
        start: step of the checkpoint from which it has to go on.
    """

    def __init__(self, runs, monkeypatch, out, *flags):
        found = checkpoints(out)
        self.out, self.folder, self.start = out, runs.new(), step_of(found[-1]) if found else 0
        resume = RESUME if (out / "args.json").exists() else []
        monkeypatch.setattr(train_ranks, "_rank", watched_rank)
        self.ranks = train_ranks.Ranks(runs.argv(out, *FLAGS, *resume, *flags), 1, self.folder)
        (self.folder / "rank0.log").touch()  # it may be killed before it makes it

    def alive(self):
        return self.ranks.processes[0].exitcode is None

    def until(self, condition):
        """Waits until `condition()`, or until the process has ended."""
        deadline_s = time.monotonic() + SECONDS
        while self.alive() and not condition():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"still running after {SECONDS} s:\n{self.stacks()}")
            time.sleep(0.002)

    def stacks(self):
        """What it has said, and where it and its workers are; then it is killed."""
        for pid in (self.ranks.processes[0].pid, *(int(path.name) for path in self.workers())):
            os.kill(pid, signal.SIGUSR1)
            time.sleep(0.5)
        self.kill()
        return "\n".join((self.folder / f"rank0.{name}").read_text() for name in ("log", "stacks"))

    def workers(self):
        """Its child processes, as paths in /proc that vanish with them."""
        pid = self.ranks.processes[0].pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:  # it has ended
            return []
        return [Path("/proc", child) for child in children]

    def kill(self):
        """Kills it; returns whether that was what ended it."""
        (process,) = self.ranks.processes
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (self.folder / "rank0.log").read_text()
        return process.exitcode != 0

    def samples(self):
        return seen_by(self.folder, 0)

    def saving(self):
        """Whether a checkpoint is being written."""
        return any(self.out.glob(".checkpoint-*"))


# What the killer waits for, before it waits for a little longer.
def anything(process, rng):
    return lambda: True


def some_batches(process, rng):
    wanted = rng.randrange(1, 7)
    return lambda: len(process.samples()) >= wanted


def a_save(process, rng):
    return process.saving


def check_kills(runs, undisturbed, monkeypatch, kills, seed):
    rng = random.Random(seed)
    killed = killed_loading = killed_saving = 0
    workers = []
    while killed < kills:
        out = runs.new()
        while not checkpoint_path(out, STEPS).exists():
            process = Process(runs, monkeypatch, out, "--num_workers", rng.choice([0, 0, 2]))
            if killed < kills:
                process.until(rng.choice([anything, some_batches, a_save, a_save])(process, rng))
                time.sleep(rng.choice([0.001, 0.05, 0.4]) * rng.random())
                saving, children = process.saving(), process.workers()
                was_killed = process.kill()
                killed += was_killed
                workers += children
                killed_loading += was_killed and not process.samples()
                killed_saving += was_killed and saving
            else:
                process.until(lambda: False)
            seen = process.samples()
            assert seen == undisturbed.samples[process.start * ACCUM :][: len(seen)]
        assert content(out, STEPS) == undisturbed.content
        assert metrics(out) == undisturbed.metrics and events(runs, out) == undisturbed.events
        assert not list(out.glob(".checkpoint-*"))
        shutil.rmtree(out)
    deadline_s = time.monotonic() + 20  # torch's workers look every 5 s whether their parent lives
    while any(path.exists() for path in workers) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert workers and not [path for path in workers if path.exists()]
    print(f"{killed} kills, {killed_loading} before the first batch, {killed_saving} during a save")
    assert killed_loading >= kills / 12 and killed_saving >= kills / 6


def test_run_killed_at_random_moments_and_resumed_is_bit_exact(runs, undisturbed, monkeypatch):
    check_kills(runs, undisturbed, monkeypatch, kills=24, seed=0)


@pytest.fixture(scope="module")
def two_ranks(runs):
    """An undisturbed run of two ranks."""
    out = runs.new()
    ranks = runs.launch(out, 2, *FLAGS_OF_TWO)
    assert [rank.code for rank in ranks] == [0, 0], [rank.output for rank in ranks]
    return SimpleNamespace(out=out, ranks=ranks)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_run_killed_at_hundreds_of_random_moments_is_bit_exact(runs, undisturbed, monkeypatch, seed):
    check_kills(runs, undisturbed, monkeypatch, kills=60, seed=seed)


@pytest.mark.parametrize(("rank", "moment"), [(0, "forward"), (1, "forward"), (0, "save")])
def test_ranks_of_which_one_is_killed_end_with_one_line_and_resume_bit_exact(runs, two_ranks, rank, moment):
    out = runs.new()
    killed = runs.launch(out, 2, *FLAGS_OF_TWO, kill=(rank, moment))
    assert killed[rank].code == -signal.SIGKILL and killed[1 - rank].code == 2
    said = killed[1 - rank].output
    assert "Traceback" not in said
    error, last = said.splitlines()[-1].split("; last checkpoint: ")
    assert error.endswith(f": rank {1 - rank}: another rank has ended, its own output says why")
    # In the fourth step the second save has been waited for; the third one may or may not have been written.
    possible = ["none yet"] if moment == "save" else [str(checkpoint_path(out, step)) for step in (2, 3)]
    assert last in possible
    start = max([step_of(path) for path in checkpoints(out)], default=0)
    assert (start in (2, 3)) == (moment == "forward")
    resumed = runs.launch(out, 2, *FLAGS_OF_TWO, *RESUME)
    assert [rank.code for rank in resumed] == [0, 0], [rank.output for rank in resumed]
    assert [rank.seen for rank in resumed] == [rank.seen[start:] for rank in two_ranks.ranks]
    assert content(out, 5) == content(two_ranks.out, 5) and metrics(out) == metrics(two_ranks.out)
