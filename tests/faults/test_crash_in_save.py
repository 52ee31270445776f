"""A process that dies at any point of a save: what has a checkpoint's name is a whole checkpoint, the old or the new.

Each case is a forked process that ends before file-system operation number n, or behind the last. What a kill leaves
is all that was done until then; what a power failure leaves lacks, at worst, all that was not forced to disk.
"""

import os
import signal

import pytest
from save_faults import NEW, NEXT, OLD, LostCache, Run, check, copy, undisturbed, watched_disk

from cachetrain import atomic
from cachetrain.checkpoints.save import checkpoints, step_of


def crash(action, number, folder, power):
    """Runs action() in a forked process that dies before operation `number`; returns whether it came to its end.

    Args:
        power: it is the machine that dies, and `folder` loses what was not forced to disk.
    """
    pid = os.fork()
    if pid == 0:
        cache, left = LostCache(), number

        def before(operation="end", *_):
            nonlocal left
            left -= power or operation not in ("fsync", "chmod")  # which change nothing that a kill would leave
            if left == -1:
                if power:
                    cache.lose(folder)
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            with watched_disk(before, cache):
                action()
                before()  # behind the last operation
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


@pytest.fixture(scope="module")
def saved(model_t5, tmp_path_factory):
    return undisturbed(model_t5, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("again_every", [10, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("power", [False, True], ids=["kill", "power failure"])
def test_crash_before_and_after_each_operation_of_a_save_leaves_the_old_checkpoint_or_the_new(
    power, again_every, saved, model_t5, tmp_path, capfd
):
    start, expected, single_files = saved
    newest, number, lived = [], 0, False
    while not lived:
        folder = copy(start, tmp_path / "run")
        lived = crash(lambda folder=folder: Run(model_t5, folder).save(NEW), number, folder, power)
        run = Run(model_t5, folder)
        newest.append(check(run, expected, single_files))
        assert not list(run.output_dir.glob(".*")) and not list(run.ckpt_dir.glob(".*"))
        if number % again_every == 0:
            again = NEW if newest[-1] == OLD else NEXT
            run.save(again)
            assert check(run, expected, single_files) == again
            assert [step_of(path) for path in checkpoints(run.output_dir)] == [again - 1, again]
            assert not list(run.output_dir.glob(".*")) and not list(run.ckpt_dir.glob(".*"))
        number += 1
    assert newest == sorted(newest) and newest[0] == OLD and newest[-2:] == [NEW, NEW]
    assert newest.count(OLD) > 50 and newest.count(NEW) > 30  # then old ones are removed, the single file is written
    assert "DAMAGED" not in capfd.readouterr().err


def test_power_failure_right_after_a_save_takes_nothing_of_it(saved, model_t5, tmp_path):
    start, expected, single_files = saved
    operations = []
    counted, folder = (copy(start, tmp_path / name) for name in ("counted", "run"))
    with watched_disk(lambda *operation: operations.append(operation)):
        Run(model_t5, counted, keep_last=None).save(NEW)
    # Nothing is removed afterwards, which would force the name to disk, too.
    assert not crash(lambda: Run(model_t5, folder, keep_last=None).save(NEW), len(operations), folder, power=True)
    assert check(Run(model_t5, folder), expected, single_files) == NEW


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power failure"])
def test_crash_while_a_directory_is_replaced_leaves_the_old_content_or_the_new(power, tmp_path):
    def replace(out):
        with atomic.staged_directory(out, overwrite=True) as stage:
            (stage / "a.txt").write_text("new")

    found, number, lived = [], 0, False
    while not lived:
        folder = tmp_path / str(number)
        (folder / "out").mkdir(parents=True)
        (folder / "out" / "a.txt").write_text("old")
        lived = crash(lambda folder=folder: replace(folder / "out"), number, folder, power)
        # Between two renames neither has the name: the old one is beside it, whole.
        whole = [folder / "out", folder / ".out.removed"]
        found += [(path / "a.txt").read_text() for path in whole if (path / "a.txt").exists()][:1]
        replace(folder / "out")
        atomic.remove_leftovers(folder, "*")
        assert (folder / "out" / "a.txt").read_text() == "new" and [path.name for path in folder.iterdir()] == ["out"]
        number += 1
        assert len(found) == number
    assert found == sorted(found, reverse=True) and found[0] == "old" and found[-1] == "new"
