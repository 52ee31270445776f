"""--engine ray: the shards of a set are made by actors, processes that Ray starts on the nodes of a cluster.

An actor gets one input at a time, makes its shard by the code of a run without Ray, and writes it by the same
create-only call. An actor, a node or the process here that dies loses the shards it was at.
"""

from __future__ import annotations

import io
import os
import signal
import socket
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from typing import NamedTuple

from tqdm import tqdm

from cachetrain import cli
from cachetrain.caching import ranks
from cachetrain.caching.inputs import Input, Inputs
from cachetrain.caching.messages import print_line
from cachetrain.caching.shard_run import Half, check_out_args, finish, shards_there
from cachetrain.caching.summary import RunSummary
from cachetrain.log import first_line

_CPUS = 4  # of an actor in a cluster without GPUs
_MAX_LOST = 3  # actors that may die at one input, or one after the other while they start
_POLL_S = 60


class Made(NamedTuple):
    """What an actor did with an input.

    Attributes:
        half: the Half of the shard.
        written: whether this call wrote it.
        record: of RunSummary.take.
        lines: what it printed on stderr.
    """

    half: Half
    written: bool
    record: dict
    lines: list[str]


def make_on_ray(cache: Callable[..., int], args: Namespace, summary: RunSummary) -> int:
    """Makes the shards that are missing; returns the exit code: 1 if a sample or an input failed.

    Args:
        cache: a run without Ray: cache(args, make=...), as `image_run.cache_images`. Actors call it.

    Raises:
        ValueError: options contradict each other, or Ray is not installed.
        OSError: the cluster cannot be reached, or an actor fails for another reason than its input.
    """
    if not args.out:
        raise ValueError("--engine needs --out; omit it to cache a folder of images")
    if ranks.world_size() > 1:
        raise ValueError("--engine ray starts the processes itself; run it once, without torchrun and WORLD_SIZE")
    check_out_args(args)
    inputs, there = Inputs(args.data_root[0]).inputs, shards_there(args.out)
    half, num_written, printed = None, 0, set()
    progress = tqdm(total=len(inputs), desc=summary.kind, unit="input", disable=None)
    with _cluster() as ray, summary.telling_what_was_done(), progress:
        new_actor = _actors_of(ray, cache, args)
        for one, made in _results(ray, new_actor, inputs):
            progress.update()
            if isinstance(made, str):
                summary.fail(one.where, f"{_MAX_LOST} processes died at it; the last one: {made}")
                continue
            half = made.half
            num_written += made.written
            summary.add(made.record)
            for line in dict.fromkeys(made.lines):
                if line not in printed:
                    print_line(line)
            printed.update(made.lines)
    if half is None:
        return summary.finish_alone()
    return finish(args, inputs, half, there, num_written, summary)


@contextmanager
def _cluster():
    """Connects to the cluster of RAY_ADDRESS, or starts one on this machine that ends with the body; yields ray."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs the package ray: pip install -e '.[cluster]'") from None
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        _check_answers(address)
        found = None if address or _started_here() else "local"
        with cli.deferred_signals() as came:  # Ray sets a handler of its own
            ray.init(found, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:
        where = f" at RAY_ADDRESS={address}" if address else ""
        raise OSError(f"cannot connect to Ray{where}: {first_line(error)}") from error
    try:
        for number in came:
            signal.raise_signal(number)
        yield ray
    except ray.exceptions.RayError as error:
        raise OSError(f"the connection to Ray is lost: {first_line(error)}") from error
    finally:
        ray.shutdown()


def _check_answers(address):
    """Raises OSError if nothing answers at `host:port`: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), port), timeout=10).close()


def _started_here():
    """Whether the cluster that was started on this machine answers, if any; Ray tries one that is gone, too."""
    try:
        from ray._private.utils import read_ray_address

        address = read_ray_address()
    except (ImportError, AttributeError, TypeError, OSError):  # another version of Ray, which may find it elsewhere
        return True
    try:
        _check_answers(address or "")
    except OSError:
        print_line(f"the Ray cluster that was started on this machine, {address}, does not answer; starting Ray here")
        return False
    return True


def _actors_of(ray, cache, args):
    """Returns a function that has Ray start an actor, as soon as a node has room for it."""
    on_gpu = args.device.startswith("cuda") if args.device else ray.cluster_resources().get("GPU", 0) > 0
    most_cpus = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    needs = {"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": max(1, min(_CPUS, most_cpus))}
    make = ray.remote(ShardMaker).options(**needs, max_restarts=0, max_task_retries=0)
    args = Namespace(**vars(args) | {"engine": None})
    return lambda: make.remote(cache, args, os.getcwd(), "GPU" if on_gpu else "CPU", needs["num_cpus"])


def _results(ray, new_actor, inputs: Sequence[Input]) -> Iterator[tuple[Input, Made | str]]:
    """Yields each input with what was made of it, or if _MAX_LOST actors died at it, with why.

    As many actors wait for a place as are at work, at least one, so that nodes that join are used, and a cluster that
    grows on demand grows. Ray ends an actor that nothing refers to any more.
    """
    left, lost = deque(inputs), Counter()
    calls = {}  # call that is waited for -> (actor, its input; None while it starts)
    while left or any(one for _, one in calls.values()):
        num_working = sum(one is not None for _, one in calls.values())
        while len(calls) - num_working < min(max(1, num_working), len(left)):
            actor = new_actor()
            calls[actor.start.remote()] = actor, None
        done, _ = ray.wait(list(calls), timeout=_POLL_S)
        if not done and not num_working:
            print_line("no node of the Ray cluster has room for a process so far; waiting")
        for call in done:
            actor, one = calls.pop(call)
            try:
                made = ray.get(call)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:  # the actor or its node died, or what it returned is lost
                lost[one] += 1
                reason = str(error).splitlines()[-1]
                if one and lost[one] < _MAX_LOST:
                    print_line(f"{one.where}: the process at it died; another one makes its shard")
                    left.appendleft(one)
                elif one:
                    yield one, reason
                elif lost[one] == _MAX_LOST:
                    raise OSError(f"processes cannot start on the Ray cluster: {reason}") from error
                continue
            if one:
                yield one, made
            else:
                lost[None] = 0
            if left:
                one = left.popleft()
                calls[actor.make.remote(one)] = actor, one


class ShardMaker:
    """An actor: loads the model once, and makes shards of the inputs that it is given.

    Args:
        cache: as of `make_on_ray`.
        folder: the working directory, to which relative paths refer if the node has it.
        resource, amount: what of its node the actor has.
    """

    def __init__(self, cache, args, folder, resource, amount):
        self.cache = cache
        self.args = args
        self.folder = folder
        self.share = resource, amount
        self.node = None  # its address
        self.run = self.encode = None

    def start(self) -> None:
        """Returns when the actor has a place."""
        import ray

        self.node = ray.util.get_node_ip_address()
        with suppress(OSError):
            os.chdir(self.folder)
        # A node may have been started by a launcher, whose ranks are no concern of its actors. Of the cores, each
        # takes its share.
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        here = ray.get_runtime_context().get_node_id()
        (has,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
        resource, amount = self.share
        os.environ["LOCAL_WORLD_SIZE"] = str(max(1, int(has.get(resource, 0) // amount)))

    def make(self, one: Input) -> Made:
        """Makes the shard of an input, unless it is there.

        Raises:
            OSError: as in a run without Ray, and where that raises ValueError; with the node.
        """
        try:
            with redirect_stderr(io.StringIO()) as lines:
                if self.run is None:
                    self.cache(self.args, make=self._keep)
                with self.run.summary.time_encoding():
                    written = self.run.make_one(one, self.encode)
        except (OSError, ValueError) as error:
            raise OSError(f"node {self.node}: {error}") from error
        return Made(self.run.half, written, self.run.summary.take(), lines.getvalue().splitlines())

    def _keep(self, run, encode):
        self.run, self.encode = run, encode
        return 0
