"""The files in docs/cluster: what they start has the right rank, and options that the cache scripts have."""

import os
import re
import shlex
import socket
import subprocess
import sys

import pytest
import yaml
from cache_fixtures import files, make_tars, shard_command
from helpers import HANG_S, REPO, run_script

from cachetrain.caching.commands.create_img_sdxl import parse_args

FOLDER = REPO / "docs" / "cluster"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.sh"))
PROGRAM = "cachetrain-cache-img-sdxl"
# What Slurm says to the first and the last task of --array=3-4.
SLURM = [
    {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "2"} for task in ("3", "4")
]


def called(command, program, folder, **environment):
    """(environment, arguments) with which a command calls a program, in whose place a recorder stands."""
    recorder = folder / program
    recorder.write_text('#!/bin/bash\nenv -0 >"$RECORD.env"\nprintf "%s\\0" "$@" >"$RECORD.argv"\n')
    recorder.chmod(0o755)
    stand_in = {"PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(folder / "record")}
    subprocess.run(command, env=os.environ | stand_in | environment, check=True)
    entries, argv = ((folder / f"record.{kind}").read_text().split("\0")[:-1] for kind in ("env", "argv"))
    return dict(entry.split("=", 1) for entry in entries), argv


def example_of(script):
    """(variables, arguments) of the command in the comment of a script, as it would be typed."""
    text = (FOLDER / script).read_text()
    (example,) = re.findall(rf"^#   (.*docs/cluster/{script} {PROGRAM} .*\n(?:#       .*\n)+)", text, re.MULTILINE)
    words = shlex.split(example.replace("\\\n#", ""))
    start = words.index(f"docs/cluster/{script}")
    return dict(word.split("=") for word in words[:start] if re.match("[A-Z]+=", word)), words[start + 1 :]


def test_the_tasks_of_a_slurm_array_are_ranks_and_make_a_set(model_t5, tmp_path, monkeypatch):
    tars = make_tars(tmp_path / "tars")
    assert run_script(*shard_command("img", model_t5, tars, tmp_path / "plain")) == 0
    script, *argv = shard_command("img", model_t5, tars, tmp_path / "set")
    for rank, variables in enumerate(SLURM):
        environment, given = called([FOLDER / "slurm_array.sh", PROGRAM, *argv], PROGRAM, tmp_path, **variables)
        assert (environment["RANK"], environment["WORLD_SIZE"]) == (str(rank), "2")
        monkeypatch.setenv("RANK", environment["RANK"])
        monkeypatch.setenv("WORLD_SIZE", environment["WORLD_SIZE"])
        assert run_script(script, *given) == 0
    assert files(tmp_path / "set") == files(tmp_path / "plain")


def test_torchrun_gives_the_processes_of_all_machines_their_ranks(tmp_path):
    from torch.distributed.run import parse_args as launcher_args

    variables, command = example_of("torchrun.sh")
    _, argv = called([FOLDER / "torchrun.sh", *command], "torchrun", tmp_path, **variables, GPUS="4")
    launched = launcher_args(argv)
    assert (launched.nnodes, launched.node_rank, launched.nproc_per_node) == ("2", 0, "4")
    assert launched.master_addr == "10.0.0.1" and launched.no_python
    assert [launched.training_script, *launched.training_script_args] == command


def test_the_pods_of_a_kubernetes_job_are_ranks(tmp_path):
    spec = yaml.safe_load((FOLDER / "kubernetes_job.yaml").read_text())["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert spec["completionMode"] == "Indexed" and spec["template"]["spec"]["restartPolicy"] == "Never"
    assert variables == {"WORLD_SIZE": str(spec["completions"])}
    command = [*container["command"], *container["args"]]
    environment, argv = called(command, PROGRAM, tmp_path, JOB_COMPLETION_INDEX="5", **variables)
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("5", "8")
    assert parse_args(argv).out


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_example_in_a_script_has_options_that_there_are(script):
    _, (program, *argv) = example_of(script)
    assert program == PROGRAM
    assert parse_args(argv).engine == ("ray" if script == "ray.sh" else None)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_apart")
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_run_for_real_as_on_two_machines(script, model_t5, tmp_path):
    """Both machines are this one, and start at the same time."""
    tars = make_tars(tmp_path / "tars")
    assert run_script(*shard_command("img", model_t5, tars, tmp_path / "plain")) == 0
    command = [sys.executable, *shard_command("img", model_t5, tars, tmp_path / "set")]
    meeting = {"PORT": free_port(), "NODES": "2", "GPUS": "1"}
    of_script = {
        "slurm_array.sh": [(variables, command) for variables in SLURM],
        "torchrun.sh": [(meeting | {"HEAD": "127.0.0.1", "NODE": node}, command) for node in "01"],
        "ray.sh": [(meeting, [*command, "--engine", "ray"])],
    }[script]
    path = {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    processes = [
        subprocess.Popen([FOLDER / script, *argv], cwd=REPO, env=os.environ | path | variables)
        for variables, argv in of_script
    ]
    assert [process.wait(HANG_S) for process in processes] == [0] * len(processes)
    assert files(tmp_path / "set") == files(tmp_path / "plain")
