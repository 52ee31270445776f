"""benchmarks/on_gpu.py: its table has each part with a number or a reason, whatever happens to the part."""

import re
import subprocess
import sys

import pytest
from helpers import REPO, load_script, trainer_argv

on_gpu, step_ways = load_script("benchmarks/on_gpu.py"), load_script("benchmarks/step_ways.py")
REASON = re.compile(r"\d|not run: no time left|not finished|skipped: \w+|failed")


def rows_of(out):
    """{what: figure} of the table in a file."""
    lines = out.read_text().splitlines()
    assert lines[:2] == list(on_gpu.HEAD)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert all(len(row) == 5 and row[0] and REASON.search(row[1]) for row in cells), lines
    return {row[0]: row[1] for row in cells}


def run(out, *argv):
    assert on_gpu.main(["--rehearse", "--out", str(out), "--work", str(out.parent / "work"), *map(str, argv)]) == 0
    return rows_of(out)


def test_parts_for_which_no_time_is_left_are_named(tmp_path):
    rows = run(tmp_path / "out.md", "--minutes", 0.001)
    assert list(rows) == ["device", *on_gpu.NAMES]
    assert all(rows[name].startswith("not run: no time left") for name in on_gpu.NAMES)


def test_rows_of_parts_that_fail_hang_or_show_nothing_are_kept_with_the_reason(tmp_path, monkeypatch):
    outcomes = "x.py::test_a PASSED [ 1%]\nx.py::test_b[c d] SKIPPED (no CUDA)\nx.py::test_e FAILED\n"
    outcomes += "FAILED x.py::test_e - assert 1 == 2"
    parts = [
        on_gpu.Part("tests", 60, 0, ["-c", f"print({outcomes!r}); exit(1)"], ["-c", "exit('no compiler')"]),
        on_gpu.Part("training_compiled", 60, 0, ["-c", "exit('out of memory')"]),
        on_gpu.Part("saving", 3, 0, ["-c", "import time; print('| a | 1 s | | | |', flush=True); time.sleep(600)"]),
        on_gpu.Part("caching_text", 60, 0, ["-c", ""]),
        on_gpu.Part("caching_images", 60, 3600, ["-c", ""]),
    ]
    monkeypatch.setattr(on_gpu, "tiny_parts", lambda work: parts)
    out = tmp_path / "out.md"
    assert on_gpu.main(["--rehearse", "--out", str(out), "--work", str(tmp_path / "work")]) == 0
    table = out.read_text().splitlines()[3:]
    assert table == [
        "| test_b[c d] | skipped: no CUDA |  |  | passed |",
        "| test_e | failed: assert 1 == 2 |  |  | passed |",
        "| gpu tests | 1 passed, 1 failed, 0 error, 1 skipped | 3 tests |  | 0 failed, 0 skipped |",
        "| beside tests | exit code 1: no compiler |  |  |  |",
        "| a | 1 s | | | |",
        "| saving | not finished: ended after 3 s; last output: / a / 1 s / / / / |  |  |  |",
        "| caching_text | no figures; see the log |  |  |  |",
        table[-2],
        "| training_compiled | failed with exit code 1: out of memory |  |  |  |",
    ]
    # Last but for one: what compiles ahead has failed.
    assert table[-2].startswith("| caching_images | not run: no time left")
    assert "no compiler" in (tmp_path / "out.md.log").read_text()


def test_without_a_gpu_the_error_names_the_rehearsal(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="--rehearse"):
        on_gpu.main(["--out", str(tmp_path / "out.md")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("minutes", [0.001, pytest.param(30, marks=pytest.mark.slow)])
def test_a_part_is_rehearsed_from_the_shell(tmp_path, minutes):
    out, flags = tmp_path / "out.md", ["--rehearse", "--parts", "saving", "--work", tmp_path / "work"]
    flags += ["--minutes", minutes]
    command = [REPO / "benchmarks" / "on_gpu.sh", *flags, "--out", out]
    env = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout == out.read_text()
    rows = ["saving"] if minutes < 1 else ["tiny, save 1: training held up", "tiny, save 1: on disk after"]
    assert list(rows_of(out)) == ["device", *rows]


def test_flags_of_all_ways_are_those_of_the_trainer(tmp_path):
    ways = [way.split() for unet in step_ways.UNETS.values() for way in unet.ways.values()]
    for flags in ways:
        load_script("train_from_cached.py").parse_args(trainer_argv(tmp_path, tmp_path, tmp_path / "out", *flags))
    assert any("--gradient_release" in flags for flags in ways) and any("--lora_rank" in flags for flags in ways)


@pytest.mark.slow
def test_all_parts_are_rehearsed(tmp_path):
    rows = run(tmp_path / "out.md")
    assert {"gpu tests", "tiny training, bf16, eager, batch 2", "tokens computed"} <= rows.keys()
    ways = {f"tiny {name} at 64, batch 2, {way}" for name, unet in step_ways.UNETS.items() for way in unet.ways}
    assert ways <= rows.keys()
    assert not any(word in figure for figure in rows.values() for word in ("exit code", "not", "failed:"))
