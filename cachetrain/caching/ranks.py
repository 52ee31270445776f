"""One cache run over several processes, started by torchrun or any launcher that sets RANK and WORLD_SIZE."""

import json
import os
import time
import zlib
from datetime import timedelta


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def is_mine(path):
    """Whether this process encodes `path`: by a hash of the path, so that processes whose listings differ (files are
    being added) still agree."""
    return zlib.crc32(os.fsencode(path)) % world_size() == rank()


def exchange(record):
    """Returns the records of all ranks in their order. Waits for the slowest; the only place where ranks meet.

    Args:
        record: what `json` can write.
    """
    if world_size() == 1:
        return [record]
    from torch.distributed import rendezvous

    # A key-value store of the launcher's: no process group, since the ranks never compute together.
    store, me, size = next(rendezvous("env://", timeout=timedelta(days=30)))
    store.set(f"cachetrain/{me}", json.dumps(record))
    records = [json.loads(store.get(f"cachetrain/{other}")) for other in range(size)]
    store.add("cachetrain/read", 1)
    while me == 0 and store.add("cachetrain/read", 0) < size:
        time.sleep(0.05)  # rank 0 may be the one that serves the store: it leaves last
    return records
