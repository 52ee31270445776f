"""One cache run over several processes, started by torchrun or any launcher that sets RANK and WORLD_SIZE."""

import json
import os
import socket
import time
import zlib
from contextlib import contextmanager, suppress

_POLL_S = 0.2


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def is_mine(path):
    """Whether this process encodes `path`: by a hash of the path, so that processes whose listings differ (files are
    being added) still agree."""
    return zlib.crc32(os.fsencode(path)) % world_size() == rank()


@contextmanager
def meeting(record, part=None):
    """Around what rank 0 does with the account of the whole run; the only place where ranks meet.

    Every rank waits for the slowest before, and for rank 0 after: a launcher may end the others as soon as one of
    them ends with an exit code that is not 0. Waiting is asking, so that signals are heard.

    Args:
        record: what `json` can write.
        part: a temporary file that belongs to it. It is touched while this rank waits, for hours perhaps: other runs
            remove temporary files that nobody has written to for an hour.

    Yields:
        the records of all ranks in their order.

    Raises:
        OSError: the launcher, or the rank that stands in for it, is gone.
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
        if me == 0:  # last, since it may be the one that serves the store
            _wait(store, [f"leaves/{other}" for other in range(size)])
    except DistError as error:
        raise OSError(f"the other ranks cannot be reached any more ({error}); what was encoded is kept") from error


def _store(part):
    """The launcher's key-value store, or one that rank 0 serves. No process group: ranks never compute together."""
    from torch.distributed import PrefixStore, TCPStore

    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as error:
        raise ValueError(f"WORLD_SIZE is set and {error} is not; start all ranks with torchrun") from None
    launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serve = rank() == 0 and not launched
    while not serve:
        try:
            socket.create_connection(address, timeout=10).close()
            break
        except OSError as error:
            if launched:
                raise OSError(f"the launcher does not answer ({error}); what was encoded is kept") from error
            _sleep(part)  # rank 0 is not that far yet
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
