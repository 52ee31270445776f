"""Freeze files of a shard set: makes one, finds those that are there."""

from __future__ import annotations

from collections.abc import Sequence

from cachetrain.caching.inspect.set_state import folders_among, inspect_shards
from cachetrain.data.freeze import Freeze, freeze_bytes, freeze_of, is_freeze, read_freeze
from cachetrain.data.set_files import Bucket, Directory, Entry, read_row
from cachetrain.data.shard_set import ShardSet
from cachetrain.data.shards import ShardIndex
from cachetrain.data.sidecar import SidecarError

_FIELD, _HEAD = b"freeze_format", 2**16  # is in the first bytes of a freeze file, so many


def freeze_set(files: Directory | Bucket, suffixes: Sequence[str]) -> tuple[Freeze, bool]:
    """Writes a freeze file into a set, unless it is there.

    Args:
        suffixes: of the sidecars of a pair, captions last.

    Returns:
        (what it says, whether it was written).

    Raises:
        ValueError: two folders hold sidecars of one suffix, or two shards have one number.
        SidecarError: a shard is damaged, or not of the set.
        OSError: the set cannot be read or written.
    """
    shard_set = _Indexes(files, suffixes)
    freeze = freeze_of(shard_set, shard_set.first_row)
    return freeze, files.put_new(freeze.file_name, freeze_bytes(freeze))


def find_freezes(files: Directory | Bucket, entries: Sequence[Entry]) -> dict[str, Freeze | str]:
    """{name of a freeze file: what it says, or what is wrong with it} among the files of a set."""
    found = {}
    for entry in entries:
        if "/" in entry.name or not entry.name.endswith(".safetensors"):
            continue
        if not is_freeze(entry.name):
            if entry.size and _FIELD in files.read(entry.name, 0, min(entry.size, _HEAD)):
                found[entry.name] = (
                    f"{files.path(entry.name)}: is a freeze file under another name; rename or delete it"
                )
        else:
            try:
                data = files.read(entry.name, 0, entry.size)
                found[entry.name] = read_freeze(files.path(entry.name), data)
            except (ValueError, OSError) as error:
                found[entry.name] = str(error)
    return found


class _Indexes(ShardSet):
    """A set, wherever it is, of which the indexes are read, one time each and in order."""

    def __init__(self, files: Directory | Bucket, suffixes: Sequence[str]):
        of_suffix = folders_among(files.entries())
        entries = {entry.name: entry for folders in of_suffix for folder in folders for entry in folder.entries}
        super().__init__(files.where, suffixes, entries)
        self._files = files
        names = [*self._alone, *(name for of_number in self.names for name in of_number)]
        self._inspected = inspect_shards(files, [entries[name] for name in names], verify=False, quiet=True)

    def _mapped(self, name: str, verify: bool = True) -> ShardIndex:
        entry, inspected = next(self._inspected)
        assert entry.name == name
        if inspected.index is None:
            raise SidecarError(inspected.problems[0])
        return inspected.index

    def first_row(self, index: ShardIndex) -> bytes:
        """The bytes of the first row of a shard, verified."""
        name = index.path[len(self._files.path("")) :]
        return read_row(self._files, name, index, 0)
