"""Real processes for the fault tests, at 20 ms instead of 6 s a start, and a disk that fails or dawdles on demand.

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

REPO = Path(__file__).resolve().parent.parent
TIMEOUT_S = 60


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
    "replace".
    """
    real_open, real_replace, real_fsync = io.open, os.replace, os.fsync

    def watched_replace(source, target, **kwargs):
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


class Forks:
    """Starts scripts as children of one process that has imported everything."""

    def __init__(self, log_dir):
        self.log_dir, self.count = log_dir, 0
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPO
        )

    def close(self):
        self.server.stdin.close()
        self.server.wait(TIMEOUT_S)

    def start(self, script, *argv, slow_s=0.0, max_bytes=-1, **env):
        """Starts cache/<script>.py.

        Args:
            slow_s: how long each operation on a file that is being written takes.
            max_bytes: of a file that it writes, by RLIMIT_FSIZE; -1: no limit.
            env: environment variables.
        """
        self.count += 1
        log = self.log_dir / f"{self.count}.log"
        log.touch()  # it may be killed before it writes a word
        request = {"script": f"cache/{script}.py", "argv": [str(argument) for argument in argv], "log": str(log)}
        request |= {"slow_s": slow_s, "max_bytes": max_bytes, "env": {key: str(value) for key, value in env.items()}}
        return Fork(self, self.ask(request), log)

    def ask(self, request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())


class Fork:
    """A started script; `pid` is its process and its group."""

    def __init__(self, forks, pid, log):
        self.forks, self.pid, self.log, self.code = forks, pid, log, None

    def poll(self):
        """Exit code (negative: the signal that killed it), or None while it runs."""
        if self.code is None:
            self.code = self.forks.ask({"poll": self.pid})
        return self.code

    def until(self, condition, timeout_s=TIMEOUT_S):
        """Waits until `condition()` or until the script has ended; kills it and raises TimeoutError if neither."""
        deadline_s = time.monotonic() + timeout_s
        while self.poll() is None and not condition():
            if time.monotonic() > deadline_s:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(f"still running after {timeout_s} s:\n{self.output}")
            time.sleep(0.002)

    def wait(self, timeout_s=TIMEOUT_S):
        self.until(lambda: False, timeout_s)
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
    with watched_disk(lambda *_: time.sleep(request["slow_s"])):
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
