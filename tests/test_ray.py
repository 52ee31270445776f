"""--engine ray: the bytes and messages of a run without it; actors, nodes and drivers that die; nodes that join."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from cache_fixtures import damage_tars, files, make_tars, shard_command
from helpers import HANG_S, REPO, run_script, wait_until

from cachetrain.caching import ray_engine
from cachetrain.caching.inputs import Input

pytestmark = pytest.mark.usefixtures("ray_apart")


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


class FakeRay:
    """Stands in for Ray: calls are answered one at a time, at most `places` actors have a place.

    Args:
        dies: which actor dies at which tar: function of (number of the actor, tar; None while it starts).
    """

    exceptions = SimpleNamespace(RayError=OSError, RayTaskError=ValueError)

    def __init__(self, places, dies):
        self.places = places
        self.dies = dies
        self.num_started = 0

    def new_actor(self):
        number = self.num_started = self.num_started + 1
        return SimpleNamespace(
            start=SimpleNamespace(remote=lambda: (number, None)),
            make=SimpleNamespace(remote=lambda tar: (number, tar)),
        )

    def wait(self, calls, timeout):
        at_work = [call for call in calls if call[1]]
        free = self.places() - len(at_work)
        starting = [call for call in calls if not call[1]]
        assert at_work or (starting and free > 0), "it hangs"
        return (starting[: max(0, free)] or at_work[:1]), calls

    def get(self, call):
        if self.dies(*call):
            raise OSError("died")
        return call


def results(places, dies, num_tars=12):
    """What comes of tars: ({number of a tar: number of its actor, or why the last one died}, FakeRay)."""
    ray = FakeRay(places, dies)
    tars = [Input(number, "", "", "") for number in range(num_tars)]
    pairs = list(ray_engine._results(ray, ray.new_actor, tars))
    assert len(pairs) == num_tars
    return {tar.number: made if isinstance(made, str) else made[0] for tar, made in pairs}, ray


def test_actors_take_all_places_and_more_when_nodes_join():
    made, ray = results(lambda: 2, lambda *_: False)
    assert set(made.values()) == {1, 2} and ray.num_started <= 4
    done = []
    made, ray = results(lambda: 1 if len(done) < 5 else 3, lambda _, tar: tar and done.append(tar))
    assert set(made.values()) == {1, 2, 3}


def test_tars_of_actors_that_died_are_made_by_others():
    made, _ = results(lambda: 2, lambda actor, tar: actor <= 2 and tar and tar.number > 2)
    assert {actor for number, actor in made.items() if number > 2} == {3, 4}


def test_a_tar_at_which_each_actor_dies_is_given_up_and_the_others_are_made():
    made, ray = results(lambda: 2, lambda _, tar: tar and tar.number == 4)
    assert {number: made for number, made in made.items() if isinstance(made, str)} == {4: "died"}
    assert ray.num_started <= 8
    with pytest.raises(OSError, match="cannot start"):
        results(lambda: 2, lambda _, tar: tar is None)


@pytest.mark.parametrize(
    ("flags", "world_size", "message"),
    [
        ((), "1", "--engine needs --out"),
        (("--out", "set"), "2", "starts the processes itself"),
        (("--out", "set", "--overwrite"), "1", "--overwrite cannot be combined with --out"),
    ],
)
def test_what_ray_cannot_do_is_refused(flags, world_size, message, tars, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ValueError, match=message):
        run_script(*shard_command("txt", tmp_path, tars, None, "--engine", "ray", *flags))


def test_a_cluster_that_does_not_answer_is_named_at_once(tars, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(OSError, match=r"cannot connect to Ray at RAY_ADDRESS=127\.0\.0\.1:9: .*refused"):
        run_script(*shard_command("txt", tmp_path, tars, tmp_path / "set", "--engine", "ray"))


def test_the_address_of_a_cluster_that_is_gone_is_not_tried(tars, tmp_path, monkeypatch, capfd):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    addresses = []

    def init(address=None, **_):
        addresses.append(address)
        raise RuntimeError("no further")

    monkeypatch.setattr(ray, "init", init)
    left = Path(os.environ["RAY_TMPDIR"]) / "ray" / "ray_current_cluster"
    left.parent.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        for address in (None, f"127.0.0.1:{server.getsockname()[1]}", "127.0.0.1:9"):
            if address:
                left.write_text(address)
            with pytest.raises(OSError, match="cannot connect to Ray: no further"):
                run_script(*shard_command("txt", tmp_path, tars, tmp_path / "set", "--engine", "ray"))
    assert addresses == [None, None, "local"]
    assert "127.0.0.1:9, does not answer; starting Ray here" in capfd.readouterr().err


# On a cluster of several nodes, all on this machine


@pytest.fixture(scope="module")
def made(tars, model_t5, tmp_path_factory):
    out = tmp_path_factory.mktemp("sets") / "set"
    assert run_script(*shard_command("img", model_t5, tars, out)) == 0
    return out


RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class Stage:
    """A cluster without the slow parts of one, on which actors wait at each tar until `open` lets them through.

    Attributes:
        cluster: Ray's; its head runs no actors.
    """

    SMALL: ClassVar = {"object_store_memory": 100 * 2**20, "include_dashboard": False}

    def __init__(self, folder):
        from ray.cluster_utils import Cluster

        self.folder = folder
        (folder / "sitecustomize.py").write_text(
            "import os, time\n"
            "import cachetrain.reading as files\n"
            f"RANKS = {RANKS}\n"
            "original = files.read_with_stat\n"
            "def read_with_stat(path, *limit):\n"
            "    name = os.path.basename(path)\n"
            "    if not name.endswith('.tar'):\n"
            "        return original(path, *limit)\n"
            f"    with open({str(folder / 'log')!r}, 'a') as log:\n"
            "        log.write(' '.join(map(str, (os.getpid(), name, *map(os.environ.get, RANKS)))) + '\\n')\n"
            f"    while not os.path.exists(os.path.join({str(folder)!r}, name)):\n"
            "        time.sleep(0.05)\n"
            "    return original(path, *limit)\n"
            "files.read_with_stat = read_with_stat\n"
        )
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **self.SMALL})
        self.driver = None

    def add_node(self):
        with pytest.MonkeyPatch.context() as patch:
            for name in RANKS:  # as on nodes that a launcher has started
                patch.setenv(name, "3")
            return self.cluster.add_node(num_cpus=1, **self.SMALL)

    def start(self, *command):
        """Starts a command on the cluster."""
        environment = os.environ | {"RAY_ADDRESS": self.cluster.address}
        with open(self.folder / "out", "w") as out:
            self.driver = subprocess.Popen(
                [sys.executable, *command], cwd=REPO, env=environment, stdout=out, stderr=subprocess.STDOUT
            )

    def waiting(self, number):
        """The process ids of actors, one of which has come to each of `number` tars or more."""
        path = self.folder / "log"

        def lines():
            lines = path.read_text().splitlines() if path.exists() else []
            return lines if len(lines) >= number else None

        return [int(line.split()[0]) for line in wait_until(lines, lambda: self.driver.poll() is None)]

    def open(self, *numbers):
        for number in numbers:
            (self.folder / f"{number:05d}.tar").touch()

    def end(self):
        """The exit code of the command and what it printed."""
        code = self.driver.wait(HANG_S)
        return code, (self.folder / "out").read_text()


@pytest.fixture
def stage(tmp_path, monkeypatch):
    folder = tmp_path / "stage"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{REPO}")  # of all processes on the nodes
    stage = Stage(folder)
    yield stage
    if stage.driver and stage.driver.poll() is None:
        stage.driver.kill()
    stage.cluster.shutdown()


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_killed_actor_costs_nothing(tars, made, model_t5, stage, tmp_path):
    stage.add_node()
    stage.start(*shard_command("img", model_t5, tars, tmp_path / "set", "--engine", "ray"))
    stage.open(0)
    os.kill(stage.waiting(2)[-1], signal.SIGKILL)
    stage.open(1, 2)
    code, output = stage.end()
    assert code == 0 and "00001.tar: the process at it died; another one makes its shard" in output
    assert "3 shards of 3 inputs written" in output and "15 encoded" in output
    assert all(
        line.endswith(" None None None") for line in (stage.folder / "log").read_text().splitlines()
    )  # no ranks
    assert files(tmp_path / "set") == files(made)


@pytest.mark.slow
def test_nodes_that_join_are_used_and_those_that_leave_cost_nothing(tars, made, model_t5, stage, tmp_path):
    first = stage.add_node()
    stage.start(*shard_command("img", model_t5, tars, tmp_path / "set", "--engine", "ray"))
    (pid,) = stage.waiting(1)
    stage.add_node()
    assert len(set(stage.waiting(2))) == 2
    stage.cluster.remove_node(first, allow_graceful=False)
    wait_until(lambda: not is_alive(pid))
    stage.open(0, 1, 2)
    code, output = stage.end()
    assert code == 0 and "00000.tar: the process at it died" in output
    assert "3 shards of 3 inputs written" in output
    assert files(tmp_path / "set") == files(made)


@pytest.mark.slow
def test_a_killed_driver_ends_its_actors_and_the_command_started_again_makes_the_rest(
    tars, model_t5, stage, tmp_path
):
    stage.add_node()
    assert run_script(*shard_command("txt", model_t5, tars, tmp_path / "plain")) == 0
    command = shard_command("txt", model_t5, tars, tmp_path / "set", "--engine", "ray")
    stage.start(*command)
    stage.open(0)
    pid = stage.waiting(2)[-1]
    stage.driver.send_signal(signal.SIGKILL)
    stage.driver.wait()
    wait_until(lambda: not is_alive(pid))
    assert len(list(tmp_path.glob("set/*/*.tar"))) == 1
    stage.open(1, 2)
    stage.start(*command)
    code, output = stage.end()
    assert code == 0 and "2 shards of 3 inputs written" in output
    assert files(tmp_path / "set") == files(tmp_path / "plain")


@pytest.mark.slow
def test_a_signal_and_errors_of_actors_end_the_command_in_one_line(tars, model_t5, stage, tmp_path):
    stage.add_node()
    stage.start(*shard_command("img", model_t5, tars, tmp_path / "set", "--engine", "ray"))
    pid = stage.waiting(1)[0]
    stage.driver.send_signal(signal.SIGTERM)
    code, output = stage.end()
    assert code == 143
    assert re.fullmatch(r"stopped; run again to continue\. .*\n.*create_img_sdxl\.py: terminated\n", output)
    wait_until(lambda: not is_alive(pid))
    stage.start(*shard_command("img", tmp_path / "no_model", tars, tmp_path / "set", "--engine", "ray"))
    code, output = stage.end()
    assert code == 2
    assert re.fullmatch(r"stopped; .*\n.*create_img_sdxl\.py: node [0-9.]+: .*no_model.*\n", output)
