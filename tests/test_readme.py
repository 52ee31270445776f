"""Every command in README.md exists and parses."""

import os
import re
import shlex
import subprocess

import pytest
from conftest import REPO, load_script

README, CACHE_README = ((REPO / name).read_text(encoding="utf-8") for name in ("README.md", "cache/README.md"))
COMMANDS = sorted({
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README + CACHE_README, re.DOTALL)
    for line in block.splitlines()
    if line.split("#")[0].strip()
})  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_parses(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if words[0] == "torchrun":
        from torch.distributed.run import parse_args

        launched = parse_args(words[1:])
        words = [launched.training_script, *launched.training_script_args]
    name, argv = words[0].removeprefix("./"), words[1:]
    for word in argv:
        if re.fullmatch(r"output/\w+", word):
            (tmp_path / word).mkdir(parents=True)
    if name == "tensorboard":
        from tensorboard.program import TensorBoard

        TensorBoard().configure(["tensorboard", *argv])
    elif name == "cp":
        assert (REPO / argv[0]).is_file()
    elif name == "source":
        assert argv == [".venv/bin/activate"]  # made by both commands
    elif name.endswith(".py"):
        load_script(name).parse_args(argv)
    elif name.startswith("train_") or name == "my_run.sh":
        script = "train_t5.sh" if name == "my_run.sh" else name
        # Through the script itself, its flags before those that it was given, with a stand-in for Python.
        recorder = tmp_path / "python3"
        recorder.write_text('#!/bin/bash\nprintf "%s\\0" "${@:2}" >"$RECORD"\n')
        recorder.chmod(0o755)
        settings = dict(word.split("=", 1) for word in shlex.split(command) if re.fullmatch(r"[A-Z_]+=.*", word))
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": "x", "RECORD": str(tmp_path / "argv")}
        command = {"args": [REPO / script, *argv], "env": os.environ | settings | path, "cwd": tmp_path}
        if argv == ["checkpoint"]:
            assert b"no run is going on there" in subprocess.run(**command, capture_output=True).stderr
            return
        subprocess.run(**command, check=True)
        given = (tmp_path / "argv").read_text().split("\0")[:-1]
        if "GPUS" in settings:
            given = given[given.index(str(REPO / "train_from_cached.py")) + 1 :]
        load_script("train_from_cached.py").parse_args(given)
    else:
        assert name in ("quickstart.sh", "run_tests.sh")
        help_text = (REPO / name).read_text(encoding="utf-8")
        assert all(flag in help_text for flag in argv if flag.startswith("--"))


def test_readme_links_and_tree_name_files_that_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (REPO / target).exists(), target
    tree = README.split("## The tree")[1].split("```")[1]
    for line in tree.strip().splitlines():
        for name in re.match(r"((?:\S+ ?)+?)(?:  |$)", line.strip()).group(1).split():
            assert any(
                (REPO / folder / name).exists() for folder in ("", "cachetrain", "cachetrain/training", "models")
            ), name


def test_reliability_document_names_tests_that_exist():
    tests = "".join(path.read_text(encoding="utf-8") for path in (REPO / "tests").rglob("test_*.py"))
    table = (REPO / "docs" / "reliability.md").read_text(encoding="utf-8").split("## Promises")[1]
    named = set(re.findall(r"`(test_\w+)`", table))
    assert len(named) > 25 and [name for name in named if f"def {name}(" not in tests] == []
    assert all((REPO / path).exists() for path in re.findall(r"`(\w+/[\w/]+\.py)`", table))


def test_readme_tags_are_tags_that_are_logged():
    """docs/logging.md names every logged tag and no other (tests/test_logging.py); the README names some of them."""
    documented = set(re.findall(r"`([\w/]+)`", (REPO / "docs" / "logging.md").read_text(encoding="utf-8")))
    named = set(re.findall(r"`(\d\d_\w+/\w+|val/\w+)`", README))
    assert named and named <= documented
