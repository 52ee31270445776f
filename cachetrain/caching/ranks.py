"""One cache run over several processes, started by torchrun or any launcher that sets RANK and WORLD_SIZE."""

import json
import os
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_POLL_S = 0.2


def rank() -> int:
    return _number("RANK", 0)


def world_size() -> int:
    return _number("WORLD_SIZE", 1)


def _number(name, default):
    text = os.environ.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"the environment variable {name} is {text!r}, expected a number; unset it") from None


def is_mine(path: str | os.PathLike) -> bool:
    """Whether this process encodes `path`. Decided by a hash of the path, so that processes agree even if files are
    added while they list them."""
    return zlib.crc32(os.fsencode(path)) % world_size() == rank()


@contextmanager
def gather_records(record: dict, part: str | None = None) -> Iterator[list[dict]]:
    """Gathers one record from each rank; the body is what rank 0 then does with them.

    This is the only place where ranks wait for each other: before the body for the slowest rank, after it for rank 0,
    because a launcher may end all ranks as soon as one exits with a code other than 0. Waiting polls, so that signals
    are handled meanwhile.

    Args:
        record: of this rank; anything that `json` can write.
        part: a temporary file of this rank that the record names. It is touched while the rank waits, which may take
            hours: other runs remove temporary files that have not been written to for an hour.

    Yields:
        the records of all ranks, by rank.

    Raises:
        OSError: the launcher, or rank 0 in its place, is gone.
    """
    me, size = rank(), world_size()
    if size == 1:
        yield [record]
        return
    from torch.distributed import DistError

    try:
        store = _store(part)
        store.set(f"record/{me}", json.dumps(record))
        _wait(store, [f"record/{other}" for other in range(size)], part)
        yield [json.loads(store.get(f"record/{other}")) for other in range(size)]
        if me == 0:
            store.set("done", "")
        _wait(store, ["done"])
        store.set(f"leaves/{me}", "")
        if me == 0:  # leaves last, since it may be serving the store
            _wait(store, [f"leaves/{other}" for other in range(size)])
    except DistError as error:
        raise OSError(f"cannot reach the other ranks any more ({error}); what was encoded is kept") from error


def _store(part):
    """The launcher's key-value store, or one that rank 0 serves. No process group: ranks never compute together."""
    from torch.distributed import PrefixStore, TCPStore

    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as error:
        raise ValueError(f"WORLD_SIZE is set but {error} is not; start all ranks with torchrun") from None
    launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serve = rank() == 0 and not launched
    while not serve:
        try:
            socket.create_connection(address, timeout=10).close()
            break
        except OSError as error:
            if launched:
                raise OSError(f"the launcher does not answer ({error}); what was encoded is kept") from error
            _sleep(part)  # rank 0 does not serve it yet
    return PrefixStore("cachetrain", TCPStore(*address, is_master=serve, wait_for_workers=False))


def _wait(store, keys, part=None):
    while not store.check(keys):
        _sleep(part)


def _sleep(part):
    """Waits a little, and touches the file `part`, if any."""
    time.sleep(_POLL_S)
    if part:
        with suppress(FileNotFoundError):  # rank 0 has read it
            os.utime(part)
