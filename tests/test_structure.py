"""The house rules that a program can check: imports between rooms and between tests, sizes, quick scripts."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import BENCHMARKS, REPO, SCRIPTS

PACKAGE = REPO / "cachetrain"
# The ground floor, and what its modules may import of ours.
GROUND = {
    "reading": set(),
    "log": {"reading"},
    "atomic": {"reading"},
    "cli": {"log"},
    "outputs": {"atomic", "reading"},
    "distributed": {"reading"},
}
# What each room of the package may import besides itself and the ground floor.
BELOW = {
    "diffusion": set(),
    "modeling": {"diffusion"},
    "data": {"diffusion", "modeling"},
    "checkpoints": {"diffusion", "modeling", "data"},
    "sampling": {"diffusion", "modeling", "data", "checkpoints"},
    "caching": {"diffusion", "modeling", "data", "sampling"},
    "training": {"diffusion", "modeling", "data", "checkpoints", "sampling"},
    "report": set(),
    "curation": {"data", "caching"},
}
ALLOWED = GROUND | {room: below | GROUND.keys() for room, below in BELOW.items()}


def imports_of(path):
    """Dotted names that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_arrows(package):
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "cachetrain" and len(parts) > 1 and parts[1] not in ALLOWED[room] | {room}:
                yield f"{path.name}: {room} imports {name}"
            if parts[0] in {Path(script).stem for script in SCRIPTS}:
                yield f"{path.name} imports the script {name}"


def test_package_arrows_point_one_way():
    assert list(wrong_arrows(PACKAGE)) == []


def test_a_wrong_arrow_is_noticed(tmp_path):
    (tmp_path / "caching").mkdir()
    (tmp_path / "caching" / "x.py").write_text("def f():\n    from cachetrain.training import data\n")
    (tmp_path / "atomic.py").write_text("import sample\n")
    assert len(list(wrong_arrows(tmp_path))) == 3  # the module, the name in it, the script


def imports_of_tests(folder):
    """Imports of a test file from another; of a helper module from a test file."""
    names = {path.stem for path in folder.rglob("test_*.py")}
    for path in sorted(folder.rglob("*.py")):
        yield from (f"{path.name} imports {name}" for name in imports_of(path) if name.split(".")[-1] in names)


def test_tests_import_from_helpers_never_from_tests(tmp_path):
    assert list(imports_of_tests(REPO / "tests")) == []
    (tmp_path / "test_a.py").touch()
    (tmp_path / "test_b.py").write_text("def f():\n    from tests.test_a import x\n")
    assert list(imports_of_tests(tmp_path)) == ["test_b.py imports tests.test_a"]


LINES = {"train_from_cached.py: train": 130}  # of a function, where it may have more than MAX_LINES
MAX_LINES, MAX_POSITIONAL, MAX_PARAMETERS = 60, 6, 14


def oversized(text, name):
    """Functions with too many lines, calls with too many positional arguments, and long constructors of a module."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines, parameters = node.end_lineno - node.lineno + 1, node.args
            if lines > LINES.get(f"{name}: {node.name}", MAX_LINES):
                yield f"{name}:{node.lineno}: {node.name} has {lines} lines"
            count = len(parameters.posonlyargs + parameters.args + parameters.kwonlyargs)
            if node.name == "__init__" and count - 1 > MAX_PARAMETERS:  # self is not counted
                yield f"{name}:{node.lineno}: a constructor takes {count - 1} parameters"
        elif isinstance(node, ast.Call):
            count = sum(not isinstance(argument, ast.Starred) for argument in node.args)
            if count > MAX_POSITIONAL and name not in BENCHMARKS:  # whose calls list the words of command lines
                yield f"{name}:{node.lineno}: {ast.unparse(node.func)} gets {count} positional arguments"


def test_functions_calls_and_constructors_are_small():
    modules = [path.relative_to(REPO).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]
    names = [*modules, *SCRIPTS, *BENCHMARKS]
    assert [line for name in names for line in oversized((REPO / name).read_text(encoding="utf-8"), name)] == []


def test_what_is_oversized_is_noticed():
    body = "\n".join(["    pass"] * 60)
    parameters = ", ".join(f"p{number}" for number in range(15))
    text = f"class A:\n    def __init__(self, *, {parameters}): f(1, 2, 3, 4, 5, 6, *a)\n"
    text += f"def g():\n{body}\nf(1, 2, 3, 4, 5, 6, 7)\n"
    assert len(list(oversized(text, "x.py"))) == 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once_since_it_imports_no_heavy_package(script):
    code = (
        f"import runpy, sys; sys.argv = [{str(REPO / script)!r}, '--help']\n"
        f"sys.path.insert(0, {str((REPO / script).parent)!r})\n"
        "before = set(sys.modules)\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    print('imported:', *{name.split('.')[0] for name in set(sys.modules) - before})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")
    imported = set(done.stdout.splitlines()[-1].removeprefix("imported:").split())
    own = {"cachetrain", *(path.stem for path in (REPO / script).parent.glob("*.py"))}
    allowed = {"PIL", "tqdm"} if script.startswith("cache/create_") else {"PIL", "tqdm", "numpy"}
    assert imported - sys.stdlib_module_names - own <= allowed


@pytest.mark.parametrize(
    "script", [s for s in SCRIPTS if "cachetrain" in {n.split(".")[0] for n in imports_of(REPO / s)}]
)
def test_script_without_the_package_says_in_one_line_what_to_run(script):
    required = {
        "train_from_cached.py": ["--train_data_dir", "x", "--model", "x", "--output_dir", os.devnull + "/x"],
        "sample.py": ["--model", "x", "--prompt", "x", "--out", "x"],
        "report.py": ["x"],
        "launch_tensorboard.py": ["--logdir", "."],
    }
    command = [sys.executable, "-S", REPO / script, *required.get(script, [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1
    if script != "train_from_cached.py":  # its output_dir is refused first
        assert "pip install -e ." in done.stderr


@pytest.mark.parametrize("script", ["cache/create_img_sdxl.py", "train_from_cached.py"])
def test_an_error_is_one_line_and_exit_code_2(script, tmp_path):
    root = "--train_data_dir" if script.startswith("train") else "--data_root"
    flags = ["--model", tmp_path / "nowhere", root, tmp_path / "missing"]
    flags += ["--output_dir", tmp_path / "out"] if script.startswith("train") else []
    done = subprocess.run([sys.executable, REPO / script, *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(tmp_path) in done.stderr


def test_scripts_are_executable_and_have_an_example():
    for script in SCRIPTS:
        path = REPO / script
        assert os.access(path, os.X_OK), script
        assert path.name in ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), script
