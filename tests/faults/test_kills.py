"""Training processes that are killed at points drawn by a seed, and resumed until they are done, train as undisturbed
ones."""

import json
import random
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import wait_until
from kill_points import IN_A_STEP, LOADING, Point, watch_and_kill, watched_saves
from runs import RESUME, Runs, content, events, metrics
from train_ranks import Ranks, seen_by, watched_rank

from cachetrain.checkpoints.save import checkpoint_path, checkpoints, step_of

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")

STEPS, ACCUM, SAVE_STEPS = 7, 2, 2
SAVED = [2, 4, 6, 7]
FLAGS = ["--batch_size", 3, "--gradient_accum", ACCUM, "--max_steps", STEPS, "--save_steps", SAVE_STEPS,
         "--log_groups", 1, 3]  # fmt: skip
FLAGS_OF_TWO = ["--batch_size", 2, "--max_steps", 5, "--save_steps", 1]


@pytest.fixture(scope="module")
def runs(shapes, model_t5, tmp_path_factory):
    return Runs(shapes, model_t5, tmp_path_factory.mktemp("runs"))


class Undisturbed:
    """The run that all others must come to.

    Attributes:
        operations: {step: operations on files of its save, in order}.
    """

    def __init__(self, runs):
        self.out, self.operations = runs.new(), {step: [] for step in SAVED}
        with watched_saves(lambda step, operation: self.operations[step].append(operation)):
            self.samples = runs.train(self.out, *FLAGS)
        self.content, self.metrics = content(self.out, STEPS), metrics(self.out)
        self.events = events(runs, self.out)


@pytest.fixture(scope="module")
def undisturbed(runs):
    return Undisturbed(runs)


def newest(out):
    return max(map(step_of, checkpoints(out)), default=0)


def draw_point(kind, start, operations, rng):
    """A Point of a process that resumes from step `start`."""
    if kind == "loading":
        return Point(rng.choice(LOADING))
    if kind == "step":
        name = rng.choice(IN_A_STEP)
        return Point(name, rng.randrange(start + 1, STEPS + 1), rng.randrange(ACCUM) if name == "forward" else 0)
    step = rng.choice([step for step in SAVED if step > start])
    return Point("save", step, rng.randrange(len(operations[step])))


def check_killed(out, point, start, operations):
    """The newest checkpoint is that of the last complete save, and what a save had begun is hidden beside it."""
    renamed = staged = False
    if point.name == "save":
        rename = operations[point.step].index("rename")
        renamed, staged = point.number > rename, 0 < point.number <= rename
    complete = [step for step in SAVED if start < step < point.step + renamed]
    assert newest(out) == max(complete, default=start), point
    assert bool(list(out.glob(".checkpoint-*"))) == staged, point


def check_kills(runs, undisturbed, kills, seed):
    rng, workers = random.Random(seed), []
    kinds = ["loading", "step", "save", "save"] * (kills // 4)
    rng.shuffle(kinds)
    while kinds:
        out = runs.new()
        while (start := newest(out)) < STEPS:
            point = draw_point(kinds.pop(), start, undisturbed.operations, rng) if kinds else None
            resume = RESUME if (out / "args.json").exists() else []
            argv, folder = runs.argv(out, *FLAGS, *resume, "--num_workers", rng.choice([0, 0, 2])), runs.new()
            target = partial(watched_rank, watch=watch_and_kill)
            (rank,) = Ranks(argv, 1, folder, kill=(0, point), target=target).finish()
            if point:
                assert rank.code == -signal.SIGKILL, rank.output
                workers += json.loads((folder / "rank0.killed").read_text())
                check_killed(out, point, start, undisturbed.operations)
            else:
                assert rank.code == 0, rank.output
            seen = seen_by(folder, 0)
            assert seen == undisturbed.samples[start * ACCUM :][: len(seen)]
            unfinished = point is not None and point.name == "forward"
            assert len(seen) >= ACCUM * ((point.step if point else STEPS) - start - unfinished)
        assert content(out, STEPS) == undisturbed.content
        assert metrics(out) == undisturbed.metrics and events(runs, out) == undisturbed.events
        assert not list(out.glob(".checkpoint-*"))
        shutil.rmtree(out)
    assert workers
    wait_until(lambda: not any(Path("/proc", pid).exists() for pid in workers))  # none outlives its run


def test_run_killed_at_random_moments_and_resumed_is_bit_exact(runs, undisturbed):
    check_kills(runs, undisturbed, kills=16, seed=0)


@pytest.fixture(scope="module")
def two_ranks(runs):
    """An undisturbed run of two ranks."""
    out = runs.new()
    ranks = runs.launch(out, 2, *FLAGS_OF_TWO)
    assert [rank.code for rank in ranks] == [0, 0], [rank.output for rank in ranks]
    return SimpleNamespace(out=out, ranks=ranks)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_run_killed_at_hundreds_of_random_moments_is_bit_exact(runs, undisturbed, seed):
    check_kills(runs, undisturbed, kills=60, seed=seed)


@pytest.mark.parametrize(("rank", "moment"), [(0, "forward"), (1, "forward"), (0, "save")])
def test_ranks_of_which_one_is_killed_end_with_one_line_and_resume_bit_exact(runs, two_ranks, rank, moment):
    out = runs.new()
    killed = runs.launch(out, 2, *FLAGS_OF_TWO, kill=(rank, moment))
    assert killed[rank].code == -signal.SIGKILL and killed[1 - rank].code == 2
    said = killed[1 - rank].output
    assert "Traceback" not in said
    error, last = said.splitlines()[-1].split("; last checkpoint: ")
    assert error.endswith(f": rank {1 - rank}: another rank has ended; see the output of that rank")
    # Rank 0 waits for the save of the third step before it ends, or is killed in the fourth.
    start = 0 if moment == "save" else 3
    assert newest(out) == start and last == (str(checkpoint_path(out, 3)) if start else "none yet")
    resumed = runs.launch(out, 2, *FLAGS_OF_TWO, *RESUME)
    assert [rank.code for rank in resumed] == [0, 0], [rank.output for rank in resumed]
    assert [rank.seen for rank in resumed] == [rank.seen[start:] for rank in two_ranks.ranks]
    assert content(out, 5) == content(two_ranks.out, 5) and metrics(out) == metrics(two_ranks.out)
