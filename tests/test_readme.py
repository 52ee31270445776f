"""Every command in README.md exists and parses."""

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
        subprocess.run(["bash", "-n", REPO / script], check=True)
        fixed = ["--train_data_dir", "x", "--model", "x", "--output_dir", "x"]
        load_script("train_from_cached.py").parse_args([*fixed, *argv])
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
            assert any((REPO / folder / name).exists() for folder in ("", "cachetrain", "models")), name


def test_readme_tags_are_those_that_are_logged(shapes, model_t5, tmp_path):
    from test_training import run

    lines, _ = run(shapes, model_t5, tmp_path / "run", "--max_steps", 1, "--batch_size", 2, "--use_snr")
    named = set(re.findall(r"`(\d\d_\w+/\w+)`", README)) | {"01_Training/images_seen"}
    assert named == set(lines[0]) - {"step"}
