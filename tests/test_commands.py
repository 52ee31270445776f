"""The executables of the tree and the console scripts of the installed package run the same commands."""

import importlib
import subprocess
import sys
import tomllib

import pytest
from helpers import REPO

ENTRY_POINTS = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"]
EXECUTABLES = {
    "cachetrain-train": "train_from_cached.py",
    "cachetrain-sample": "sample.py",
    "cachetrain-report": "report.py",
} | {
    name: f"cache/{target.split(':')[0].rpartition('.')[2]}.py"
    for name, target in ENTRY_POINTS.items()
    if ".caching.commands." in target
}


def test_each_console_script_has_its_executable_and_each_in_cache_its_console_script():
    assert EXECUTABLES.keys() == ENTRY_POINTS.keys()
    assert {path for path in EXECUTABLES.values() if path.startswith("cache/")} == {
        f"cache/{path.name}" for path in (REPO / "cache").glob("*.py")
    }


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_console_script_prints_the_help_of_its_executable_without_torch(name):
    module, function = ENTRY_POINTS[name].split(":")
    executable = REPO / EXECUTABLES[name]
    code = f"""if True:
        import sys
        from {module} import {function}
        sys.argv = ["{executable.name}", *sys.argv[1:]]
        try:
            {function}()
        finally:
            assert "torch" not in sys.modules
    """
    installed = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, cwd=REPO)
    assert installed.returncode == 0, installed.stderr
    assert (
        installed.stdout
        == subprocess.run([sys.executable, executable, "--help"], capture_output=True, text=True).stdout
    )
    assert importlib.import_module(module).__doc__.strip() in installed.stdout


def test_console_script_ends_with_the_exit_code_of_main(tmp_path):
    (tmp_path / "a.png").touch()
    code = "from cachetrain.caching.commands.cache_status import run; run()"
    for root, returncode in ((tmp_path, 1), (tmp_path / "absent", 2)):
        done = subprocess.run(
            [sys.executable, "-c", code, "--data_root", root], capture_output=True, text=True, cwd=REPO
        )
        assert done.returncode == returncode and "Traceback" not in done.stderr
