"""The executables in cache/ and the console scripts of the installed package run the same commands."""

import importlib
import subprocess
import sys
import tomllib

import pytest
from helpers import REPO

ENTRY_POINTS = {
    name: target
    for name, target in tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"].items()
    if ".caching.commands." in target
}


def test_each_executable_in_cache_has_a_console_script():
    modules = {target.split(":")[0].rpartition(".")[2] for target in ENTRY_POINTS.values()}
    assert modules == {path.stem for path in (REPO / "cache").glob("*.py")}
    assert all(name.startswith("cachetrain-cache-") for name in ENTRY_POINTS)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_console_script_prints_the_help_of_its_executable_without_torch(name):
    module, function = ENTRY_POINTS[name].split(":")
    stem = module.rpartition(".")[2]
    code = f"""if True:
        import sys
        from {module} import {function}
        sys.argv = ["{stem}.py", *sys.argv[1:]]
        try:
            {function}()
        finally:
            assert "torch" not in sys.modules
    """
    installed = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, cwd=REPO)
    assert installed.returncode == 0, installed.stderr
    executable = subprocess.run([REPO / "cache" / f"{stem}.py", "--help"], capture_output=True, text=True)
    assert installed.stdout == executable.stdout
    assert importlib.import_module(module).__doc__.strip() in installed.stdout


def test_console_script_ends_with_the_exit_code_of_main(tmp_path):
    (tmp_path / "a.png").touch()
    code = "from cachetrain.caching.commands.cache_status import run; run()"
    for root, returncode in ((tmp_path, 1), (tmp_path / "absent", 2)):
        done = subprocess.run(
            [sys.executable, "-c", code, "--data_root", root], capture_output=True, text=True, cwd=REPO
        )
        assert done.returncode == returncode and "Traceback" not in done.stderr
