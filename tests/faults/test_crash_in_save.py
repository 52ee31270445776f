"""Death at any point of a save: what has a checkpoint's name is a whole checkpoint, the old or the new.

Each case is a copy of the directory at one moment: before file-system operation number n, or behind the last. What a
kill leaves is all that was done until then; what a power failure leaves lacks, at worst, all that was not forced to
disk. (Processes that are really killed: test_kills.py.)
"""

import pytest
from save_faults import NEW, NEXT, OLD, Run, check, copy, moments, undisturbed

from cachetrain import atomic
from cachetrain.checkpoints.save import checkpoints, step_of


@pytest.fixture(scope="module")
def saved(model_t5, tmp_path_factory):
    return undisturbed(model_t5, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("again_every", [10, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("power", [False, True], ids=["kill", "power failure"])
def test_crash_before_and_after_each_operation_of_a_save_leaves_the_old_checkpoint_or_the_new(
    power, again_every, saved, model_t5, tmp_path, capfd
):
    start, expected, single_files = saved
    folder, newest, step = copy(start, tmp_path / "run"), [], min(again_every, 2)
    for number, found in enumerate(
        moments(lambda: Run(model_t5, folder).save(NEW), folder, tmp_path / "found", power)
    ):
        if number % step:
            continue
        run = Run(model_t5, found)
        newest.append(check(run, expected, single_files))
        assert not list(run.output_dir.glob(".*")) and not list(run.ckpt_dir.glob(".*"))
        if number % again_every == 0:
            again = NEW if newest[-1] == OLD else NEXT
            run.save(again)
            assert check(run, expected, single_files) == again
            assert [step_of(path) for path in checkpoints(run.output_dir)] == [again - 1, again]
            assert not list(run.output_dir.glob(".*")) and not list(run.ckpt_dir.glob(".*"))
    assert newest == sorted(newest) and newest[0] == OLD and newest[-2:] == [NEW, NEW]
    # Then old ones are removed, and the single file is written.
    assert newest.count(OLD) > 50 / step and newest.count(NEW) > 30 / step
    assert "DAMAGED" not in capfd.readouterr().err


def test_power_failure_right_after_a_save_takes_nothing_of_it(saved, model_t5, tmp_path):
    start, expected, single_files = saved
    folder = copy(start, tmp_path / "run")
    # Nothing is removed afterwards, which would force the name to disk, too.
    saved = moments(lambda: Run(model_t5, folder, keep_last=None).save(NEW), folder, tmp_path / "found", power=True)
    assert check(Run(model_t5, saved[-1]), expected, single_files) == NEW


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power failure"])
def test_crash_while_a_directory_is_replaced_leaves_the_old_content_or_the_new(power, tmp_path):
    def replace(out):
        with atomic.staged_directory(out, overwrite=True) as stage:
            (stage / "a.txt").write_text("new")

    (folder := tmp_path / "folder" / "out").mkdir(parents=True)
    (folder / "a.txt").write_text("old")
    contents = []
    for found in moments(lambda: replace(folder), folder.parent, tmp_path / "found", power):
        # Between two renames neither has the name: the old one is beside it, whole.
        whole = [found / "out", found / ".out.removed"]
        contents.append(next((path / "a.txt").read_text() for path in whole if (path / "a.txt").exists()))
        replace(found / "out")
        atomic.remove_leftovers(found, "*")
        assert (found / "out" / "a.txt").read_text() == "new" and [path.name for path in found.iterdir()] == ["out"]
    assert contents == sorted(contents, reverse=True) and contents[0] == "old" and contents[-1] == "new"
