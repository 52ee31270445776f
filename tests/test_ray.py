"""--engine ray: the bytes and messages of a run without it; actors, nodes and drivers that die; nodes that join."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from cache_fixtures import damage_tars, files, make_tars, shard_command
from helpers import REPO, run_script, wait_until

from cachetrain.caching import ray_engine
from cachetrain.caching.tars import InputTar


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return make_tars(tmp_path_factory.mktemp("tars"))


def test_ray_makes_the_bytes_and_messages_of_a_run_without_it(tars, model_t5, tmp_path, monkeypatch, capfd):
    """Of tars with a row and a tar that fail; relative paths, and a node that was started by a launcher."""
    damage_tars(tars, tmp_path / "tars")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    told = []
    for out, engine in (("plain", ()), ("on_ray", ("--engine", "ray"))):
        assert run_script(*shard_command("img", model_t5, "tars", out, *engine)) == 1
        captured = capfd.readouterr()
        lines = captured.out.replace(out, "OUT").splitlines()
        told.append(([re.sub(r" in [0-9.]+ s, .*", "", line) for line in lines], captured.err.splitlines()))
    assert files(tmp_path / "on_ray") == files(tmp_path / "plain")
    assert len(files(tmp_path / "on_ray")) == 2
    assert told[0][0] == told[1][0] and sorted(told[0][1]) == sorted(told[1][1])
