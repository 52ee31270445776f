"""Real processes for the fault tests, at 20 ms instead of 6 s a start, and a disk that fails or stops on demand.

Run as a program it imports everything once, loads nothing, and forks a cache script per request. The child leads a
process group of its own and runs the script as `python cache/create_x.py ...` would.
"""

import atexit
import builtins
import gc
import importlib
import io
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path

from helpers import HANG_S, REPO

from cachetrain.caching.writer import Writer
from cachetrain.modeling import load


def watching_open(before, after=lambda *_: None, real_open=open):
    """Returns an open() that calls before(operation, path) and after(operation, path, None) around each "open" for
    writing and each "write", of which each half reaches the disk alone."""

    def watched_open(path, mode="r", *args, **kwargs):
        if not set("wax+") & set(mode) or isinstance(path, int):
            return real_open(path, mode, *args, **kwargs)
        before("open", path)
        file = real_open(path, mode, *args, **kwargs)
        after("open", path, None)
        write = file.write

        def watched_write(data):
            for half in (data[: len(data) // 2], data[len(data) // 2 :]):
                before("write", path)
                write(half)
                file.flush()
                after("write", path, None)
            return len(data)

        file.write = watched_write
        return file

    return watched_open


@contextmanager
def watched_disk(before):
    """Calls before(operation, path) ahead of every operation by which Python code here changes a file.

    Operations: "open" for writing, "write" (of each half of the data, which reaches the disk alone), "fsync",
    "replace". Threads take turns to replace: when one is to do so for the n-th time, n - 1 files have their names.
    """
    real_open, real_replace, real_fsync = io.open, os.replace, os.fsync
    turn = threading.Lock()

    def watched_replace(source, target, **kwargs):
        with turn:
            before("replace", target)
            real_replace(source, target, **kwargs)

    def watched_fsync(file):
        before("fsync", file)
        real_fsync(file)

    io.open = builtins.open = watching_open(before)
    os.replace, os.fsync = watched_replace, watched_fsync
    try:
        yield
    finally:
        io.open = builtins.open = real_open
        os.replace, os.fsync = real_replace, real_fsync


class FullDisk:
    """A `before` for `watched_disk`: from operation number `after` on no space is left. `hit`: it came to that."""

    def __init__(self, after):
        self.left, self.hit = after, False

    def __call__(self, operation, path):
        self.left -= 1
        if self.left < 0:
            self.hit = True
            # As the system says it: write and fsync do not know the file's name.
            raise OSError(
                ENOSPC, os.strerror(ENOSPC), *([os.fspath(path)] if operation in ("open", "replace") else [])
            )


class Gate:
    """A `before` for `watched_disk` that stops a process at one point of its work.

    Occurrence number `number` of `operation`, and every later one, waits while the file `marker` exists; the first
    to wait creates it. Other operations pass.
    """

    def __init__(self, operation, number, marker):
        self.operation, self.left, self.marker = operation, number, marker
        self.lock = threading.Lock()

    def __call__(self, operation, path):
        if operation != self.operation:
            return
        with self.lock:
            self.left -= 1
            if self.left == 0:
                os.close(os.open(self.marker, os.O_WRONLY | os.O_CREAT))
        while self.left <= 0 and os.path.exists(self.marker):
            time.sleep(0.002)


def watch_steps(before):
    """Calls before(operation, None) at steps of a cache script's main thread.

    Operations: "resolve", where it looks for the model, its first step; "load", where it starts to load the model
    (all sidecars have been checked then, and none has been made); "collect", where it waits for the oldest batch that
    is being written.
    """
    real_resolve, real_pick, real_collect = load.resolve_model, load.pick_device, Writer._collect

    def watched_resolve(*args, **kwargs):
        before("resolve", None)
        return real_resolve(*args, **kwargs)

    def watched_pick(*args, **kwargs):
        before("load", None)
        return real_pick(*args, **kwargs)

    def watched_collect(writer):
        before("collect", None)
        real_collect(writer)

    load.resolve_model, load.pick_device, Writer._collect = watched_resolve, watched_pick, watched_collect


class Forks:
    """Starts scripts as children of one process that has imported everything."""

    def __init__(self, log_dir):
        self.log_dir, self.started = log_dir, []
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPO
        )

    def close(self):
        for fork in self.started:  # what a failed test left behind
            fork.signal(signal.SIGKILL, group=True)
        self.server.stdin.close()
        self.server.wait(HANG_S)

    def start(self, script, *argv, pauses=(), max_bytes=-1, **env):
        """Starts cache/<script>.py.

        Args:
            pauses: a list of (operation, number): where it stops until `resume`, see Gate. Operations: those of
                `watched_disk` and `watch_steps`.
            max_bytes: of a file that it writes, by RLIMIT_FSIZE; -1: no limit.
            env: environment variables.
        """
        log = self.log_dir / f"{len(self.started)}.log"
        log.touch()  # it may be killed before it writes a word
        request = {"script": f"cache/{script}.py", "argv": [str(argument) for argument in argv], "log": str(log)}
        markers = [log.with_suffix(f".{operation}") for operation, _ in pauses]
        request["gates"] = [(*pause, str(marker)) for pause, marker in zip(pauses, markers, strict=True)]
        request["max_bytes"] = max_bytes
        request["env"] = {key: str(value) for key, value in env.items()}
        self.started.append(Fork(self, self.ask(request), log, markers))
        return self.started[-1]

    def ask(self, request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())


class Fork:
    """A started script; `pid` is its process and its group."""

    def __init__(self, forks, pid, log, markers):
        self.forks, self.pid, self.log, self.markers, self.code = forks, pid, log, markers, None

    def poll(self):
        """Exit code (negative: the signal that killed it), or None while it runs."""
        if self.code is None:
            self.code = self.forks.ask({"poll": self.pid})
        return self.code

    def until(self, condition):
        """Waits until `condition()` or until the script has ended; kills it and raises TimeoutError if it hangs."""
        deadline_s = time.monotonic() + HANG_S
        while self.poll() is None and not condition():
            if time.monotonic() > deadline_s:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(f"still running after {HANG_S} s:\n{self.output}")
            time.sleep(0.002)

    def until_paused(self):
        """Waits until the script is where each of `pauses` stops it."""
        self.until(lambda: all(marker.exists() for marker in self.markers))
        assert self.poll() is None, f"ended before it came to its pause:\n{self.output}"

    def resume(self):
        for marker in self.markers:
            marker.unlink()

    def wait(self):
        self.until(lambda: False)
        return self.code

    def signal(self, number, group=False):
        """Signals the process, or with `group` also those it started; nothing if it has ended."""
        if self.poll() is None:
            (os.killpg if group else os.kill)(self.pid, number)

    def hears(self, number):
        """Whether it has a handler for this signal."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1)

    @property
    def output(self):
        return self.log.read_text()


def _serve():
    """Answers requests until stdin ends; in a forked child returns the request to run."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                os.setpgid(0, 0)
                return request
            os.setpgid(answer, answer)  # here too: whoever comes first, the group exists before the answer
        print(json.dumps(answer), flush=True)
    return None


def _run(request):
    log = os.open(request["log"], os.O_WRONLY)
    for stream, file in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(file, stream)
    os.environ.update(request["env"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_bytes"], resource.RLIM_INFINITY))
    sys.argv = [request["script"], *request["argv"]]
    sys.stdout.reconfigure(line_buffering=True)  # what is printed shows at once
    gates = [Gate(*gate) for gate in request["gates"]]

    def before(operation, path):
        for gate in gates:
            gate(operation, path)

    watch_steps(before)
    with watched_disk(before):
        try:
            runpy.run_path(request["script"], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        # The end of a process but for its last part, in which all modules are torn down one by one.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    for module in (
        "diffusers.models.autoencoders.autoencoder_kl",
        "transformers.models.t5.modeling_t5",
        "transformers.models.t5.tokenization_t5",
        "torch.distributed",
        "cachetrain.caching.encoders",
        "cachetrain.caching.image_run",
        "cachetrain.caching.text_run",
        "cachetrain.modeling.t5_projection",
        "cachetrain.modeling.text_encoders",
    ):
        importlib.import_module(module)
    gc.freeze()  # children share it all
    wanted = _serve()
    if wanted is not None:
        _run(wanted)
