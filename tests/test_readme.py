"""The documents: commands parse, links resolve, every script and option is described, named files and tests exist."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise

import pytest
from helpers import BENCHMARKS, REPO, SCRIPTS, load_script

README = REPO / "README.md"
MAX_README_LINES = 180
DOCUMENTS = [README, REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md", *sorted((REPO / "docs").glob("*.md"))]
TEXTS = {path.relative_to(REPO).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
ALL_SCRIPTS = sorted(SCRIPTS + BENCHMARKS)
SHELL_SCRIPTS = ("quickstart.sh", "run_tests.sh")
MADE_BY_COMMANDS = {"my_run.sh", "on_gpu.md"}  # files that the documents have the reader make
ODD_PHRASES = (
    "manieth", "leave the flag away", "bit by bit", "keep the others company", "goes on from", "the data's way",
    "what the way feels like", "what a save waits behind", "written behind training",
)  # fmt: skip


def parser_of(script):
    """parse_args of a script, which may lie in the module that it runs."""
    module = load_script(script)
    return (module if hasattr(module, "parse_args") else sys.modules[module.main.__module__]).parse_args


def commands(text):
    """The lines of a document's bash blocks, without comments; a backslash joins lines."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in block.replace("\\\n", " ").splitlines())
        yield from (" ".join(line.split()) for line in lines if line)


COMMANDS = sorted({command for text in TEXTS.values() for command in commands(text)})


def split_command(command):
    """Returns (environment variables, program, its arguments), those of torchrun's script for torchrun."""
    words = shlex.split(command)
    settings = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z_]+=.*", word))
    words = words[len(settings) :]
    if words[0] == "torchrun":
        from torch.distributed.run import parse_args

        launched = parse_args(words[1:])
        words = [launched.training_script, *launched.training_script_args]
    return settings, words[0].removeprefix("./"), words[1:]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_a_document_parses(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(REPO / "dataset_scripts")  # as when a script of this folder is run
    settings, program, argv = split_command(command)
    for word in argv:
        if re.fullmatch(r"output/\w+(/samples/step-\d+)?|shapes_vae", word):
            (tmp_path / word).mkdir(parents=True)
    if program == "models/train_tiny_vae.py":  # counts its images before anything else
        for number in range(200):
            (tmp_path / "shapes_vae" / f"{number}.png").touch()
    if program.endswith(".py") or program == "benchmarks/on_gpu.sh":
        parser_of(program.replace("on_gpu.sh", "on_gpu.py"))(argv)
    elif program.startswith("train_") or program == "my_run.sh":
        check_wrapper("train_t5.sh" if program == "my_run.sh" else program, settings, argv, tmp_path)
    elif program in SHELL_SCRIPTS:
        check_shell_script(program, argv)
    elif program == "pip":
        check_pip(argv)
    elif program == "cp":
        assert (REPO / argv[0]).is_file()
    else:  # what makes and enters .venv
        assert [program, *argv] in (["python3", "-m", "venv", ".venv"], ["source", ".venv/bin/activate"])


def check_wrapper(script, settings, argv, tmp_path):
    """Runs a front end with a stand-in for Python, and parses what it would call the trainer with."""
    recorder = tmp_path / "python3"
    recorder.write_text('#!/bin/bash\nprintf "%s\\0" "${@:2}" >"$RECORD"\n')
    recorder.chmod(0o755)
    stand_in = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": "x", "RECORD": str(tmp_path / "argv")}
    call = {"args": [REPO / script, *argv], "env": os.environ | settings | stand_in, "cwd": tmp_path}
    if argv == ["checkpoint"]:
        done = subprocess.run(**call, capture_output=True, text=True)
        assert done.returncode == 2 and "no run" in done.stderr
        return
    subprocess.run(**call, check=True)
    given = (tmp_path / "argv").read_text().split("\0")[:-1]
    if "GPUS" in settings:
        given = given[given.index(str(REPO / "train_from_cached.py")) + 1 :]
    parser_of("train_from_cached.py")(given)


def check_shell_script(name, argv):
    """Flags of our own must stand in the script; pytest's go through run_tests.sh."""
    text = (REPO / name).read_text(encoding="utf-8")
    if name == "run_tests.sh":
        assert all((REPO / word.split("::")[0]).exists() for word in argv if word.startswith("tests/"))
    else:
        assert all(word in text for word in argv if word.startswith("--"))


def check_pip(argv):
    """`pip install PACKAGE` or `pip install -e .[EXTRA]`: a dependency or an extra of ours."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert argv[0] == "install"
    if argv[1] == "-e":
        assert argv[2] == "." or re.fullmatch(r"\.\[(\w+)\]", argv[2])[1] in extras
        return
    packages = {re.match(r"[\w-]+", need)[0] for needs in extras.values() for need in needs}
    assert len(argv) == 2 and argv[1] in packages


def test_what_commands_write_into_the_repository_is_ignored_by_git():
    if not (REPO / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    writing = ("--out", "--sheet", "--png", "--output_dir", "--grid", "--prompts", "--ckpt_dir")
    made = {"my_run.sh", "output/run1", "tensorboard", "quickstart"}
    for command in COMMANDS:
        _, program, argv = split_command(command)
        if program.endswith(".py"):
            made |= {word for flag, word in pairwise(argv) if flag in writing}
    made = {name for name in made if not name.startswith(("models/tiny", "~", "/", "s3://"))}
    for name in sorted(made):
        # A directory that does not exist yet is one for git only with a slash at its end.
        command = ["git", "-c", "safe.directory=*", "check-ignore", "-q"]
        checks = [subprocess.run([*command, path], cwd=REPO) for path in (name, f"{name}/")]
        assert 0 in [check.returncode for check in checks], f"{name}: add it to .gitignore"


def options_of(script, monkeypatch):
    """All option strings of a script's parser, which is caught when it would parse."""

    class Caught(Exception):
        pass

    def catch(parser, *_, **__):
        raise Caught(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", catch)
    monkeypatch.syspath_prepend(REPO / "dataset_scripts")  # as when a script of this folder is run
    with pytest.raises(Caught) as caught:
        parser_of(script)([])
    (parser,) = caught.value.args
    return {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_script_and_all_of_its_options_are_documented(script, monkeypatch):
    """In the README or a document that names the script."""
    name = re.compile(rf"\b{re.escape(script.split('/')[-1])}\b")
    text = "\n".join(text for text in TEXTS.values() if name.search(text))
    assert text, f"no document names {script}"
    missing = {
        option for option in options_of(script, monkeypatch) if not re.search(rf"{re.escape(option)}(?![\w-])", text)
    }
    assert missing == set()


def test_documents_name_no_option_that_no_script_has(monkeypatch):
    known = set().union(*(options_of(script, monkeypatch) for script in ALL_SCRIPTS))
    shell = "".join((REPO / name).read_text(encoding="utf-8") for name in SHELL_SCRIPTS)
    # Of tables of other trainers' options, the first column is theirs.
    page = "docs/coming-from.md"
    texts = TEXTS | {page: re.sub(r"^\|[^|]*\|", "", TEXTS[page], flags=re.MULTILINE)}
    named = {
        option
        for text in texts.values()
        for code in re.findall(r"`([^`\n]+)`", text)
        for option in re.findall(r"(?<!\S)--\w+(?![\w*])", code)
    }
    assert {option for option in named - known - {"--help"} if option not in shell} == set()


def test_installed_commands_are_documented():
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = "\n".join(TEXTS.values())
    assert [name for name in project.get("scripts", {}) if f"`{name}`" not in text] == []


def anchors(text):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", TEXTS)
def test_links_and_images_resolve(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[document]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        path = (REPO / document).parent / path if path else REPO / document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("document", TEXTS)
def test_files_that_a_document_names_exist(document):
    """Code in `backticks` that ends like one of our files; paths may leave out the folders that lead to them."""
    folders = ("cachetrain", "cache", "models", "dataset_scripts", "benchmarks", "tests", ".github", "docs", ".ci")
    ours = [path for folder in folders for path in (REPO / folder).rglob("*") if path.is_file()]
    ours += [path for path in REPO.glob("*") if path.is_file()]
    ours = {f"/{path.relative_to(REPO).as_posix()}" for path in ours} | {f"/{name}" for name in MADE_BY_COMMANDS}
    named = set(re.findall(r"`([\w./]+\.(?:py|sh|md|toml|cff|yml))`", TEXTS[document])) - {"pipeline.py"}
    assert {name for name in named if not any(path.endswith(f"/{name.removeprefix('./')}") for path in ours)} == set()


@pytest.mark.parametrize("document", TEXTS)
def test_no_odd_phrases(document):
    text = " ".join(TEXTS[document].lower().split())
    assert [phrase for phrase in ODD_PHRASES if phrase in text] == []


@pytest.mark.parametrize("document", TEXTS)
def test_tables_have_as_many_cells_in_each_row(document):
    text = re.sub(r"```.*?```", "", TEXTS[document], flags=re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        cells = {len(re.split(r"(?<!\\)\|", row.strip())) for row in table.strip().splitlines()}
        assert len(cells) == 1, table.splitlines()[0]


def test_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= MAX_README_LINES


def test_index_names_every_document():
    index = TEXTS["docs/README.md"]
    assert [
        name
        for name in TEXTS
        if name.startswith("docs/") and name != "docs/README.md" and f"]({name.removeprefix('docs/')})" not in index
    ] == []


def test_reliability_document_names_tests_that_exist():
    tests = "".join(path.read_text(encoding="utf-8") for path in (REPO / "tests").rglob("test_*.py"))
    table = TEXTS["docs/reliability.md"].split("## Promises")[1]
    named = set(re.findall(r"`(test_\w+)`", table))
    assert len(named) > 25 and [name for name in named if f"def {name}(" not in tests] == []
    assert all((REPO / path).exists() for path in re.findall(r"`(\w+/[\w/]+\.py)`", table))


def test_readme_tags_are_tags_that_are_logged():
    """docs/logging.md names every logged tag and no other (tests/test_logging.py); the README names some of them."""
    documented = set(re.findall(r"`([\w/]+)`", TEXTS["docs/logging.md"]))
    named = set(re.findall(r"`(\d\d_\w+/\w+|val/\w+)`", TEXTS["README.md"]))
    assert named and named <= documented
