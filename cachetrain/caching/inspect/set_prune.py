"""What is old in a shard set: folders of earlier runs, and shards of earlier states of their tars; deletes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from tqdm import tqdm

from cachetrain.caching.inspect.set_state import time_text, written
from cachetrain.caching.inspect.shard_status import FolderReport, SetReport
from cachetrain.caching.messages import say
from cachetrain.data.set_files import Bucket, Directory, Entry, read_indexes
from cachetrain.data.sidecar import SidecarError
from cachetrain.log import counted


class Old(NamedTuple):
    """A folder or a shard that a newer one replaces.

    Attributes:
        name, newer: of the two, relative to the set.
        entries: what is to be deleted, in this order: as long as a shard is there, the folder is found again.
        when, newer_when: when they were written, in words.
        kept: why it must not be deleted, or "".
    """

    name: str
    newer: str
    entries: list[Entry]
    when: str
    newer_when: str
    kept: str


def find_old(report: SetReport) -> list[Old]:
    """Finds what is old. It is kept unless the newer one has all of its shards and rows, undamaged, and is newer; if
    a freeze file lists it; and if what a freeze file lists is not known."""
    found = [_old_folder(one) for one in report.folders if one.newer]
    for half in report.halves:
        found += _old_shards(report.files, half)
    listed = {}  # shard -> freeze file
    for name, freeze in report.freezes.items():
        if not isinstance(freeze, str):
            listed |= dict.fromkeys(chain.from_iterable(freeze.shards()), name)
    unknown = min((name for name, freeze in report.freezes.items() if isinstance(freeze, str)), default=None)
    return [_kept_for_freeze(old, listed, unknown) for old in found]


def _kept_for_freeze(old, listed, unknown):
    if unknown:
        return old._replace(kept=f"it may be listed in {unknown}, which cannot be used")
    freezes = sorted({listed[entry.name] for entry in old.entries if entry.name in listed})
    return old._replace(kept=f"it is listed in {freezes[0]}") if freezes and not old.kept else old


def _old_folder(report: FolderReport) -> Old:
    folder, newer = report.folder, report.newer
    lacking = sorted(folder.shards.keys() - newer.folder.shards.keys())
    null = newer.folder.null
    num_fewer = sum(
        max(0, report.rows.get(entry.name, 0) - newer.rows.get(newer.current[number].name, 0))
        for number, entry in report.current.items()
        if not lacking
    )
    kept = ""
    if written(folder.entries)[1] == written(newer.folder.entries)[1]:
        kept = "both were written at the same time"
    elif lacking:
        kept = f"the newer one lacks {counted(len(lacking), 'shard')} of it, like {lacking[0]:05d}"
    elif folder.null and (null is None or null.name in newer.damaged):
        kept = f"the null caption of the newer one is {'damaged' if null else 'missing'}"
    elif newer.damaged:
        kept = f"{counted(len(newer.damaged), 'shard')} of the newer one cannot be used"
    elif num_fewer:
        kept = f"the newer one has {counted(num_fewer, 'row')} fewer"
    entries = [*([folder.null] if folder.null else []), *folder.entries]
    when, newer_when = (time_text(*written(one.entries)) for one in (folder, newer.folder))
    return Old(folder.name, newer.folder.name, entries, when, newer_when, kept)


def _old_shards(files: Directory | Bucket, half: FolderReport) -> Iterator[Old]:
    newest_of = {other: newest for newest, *others in half.folder.shards.values() for other in others}
    for other, index in read_indexes(files, newest_of):
        num_rows = 0 if isinstance(index, SidecarError) else len(index)
        yield _old_shard(half, newest_of[other], other, num_rows)


def _old_shard(half: FolderReport, newest: Entry, other: Entry, num_rows: int) -> Old:
    kept = "both were written at the same time" if newest.modified == other.modified else ""
    kept = kept or ("the newer one cannot be used" if newest.name in half.damaged else "")
    num_fewer = num_rows - half.rows.get(newest.name, 0)
    kept = kept or (f"the newer one has {counted(num_fewer, 'row')} fewer" if num_fewer > 0 else "")
    return Old(other.name, newest.name, [other], time_text(other.modified), time_text(newest.modified), kept)


def print_old(report: SetReport, found: Iterable[Old]) -> None:
    """Lists what is old, and what of it is kept."""
    say("", "older, which training refuses beside what is newer:")
    for old in found:
        size = tqdm.format_sizeof(sum(entry.size for entry in old.entries), "B")
        say(f"  {report.files.path(old.name)}: {counted(len(old.entries), 'file')}, {size}, written {old.when}")
        say(f"    newer: {old.newer}, written {old.newer_when}")
        if old.kept:
            say(f"    kept by --prune, since {old.kept}; delete what you do not need")
    entries = [entry for old in found for entry in old.entries if not old.kept]
    size = tqdm.format_sizeof(sum(entry.size for entry in entries), "B")
    if entries:
        say(f"{counted(len(entries), 'file')} to be deleted, {size}")


def delete_old(files: Directory | Bucket, found: Iterable[Old]) -> int:
    """Deletes what is old; returns the number of files. A call that was interrupted is finished by the next one.

    Raises:
        OSError: a file cannot be deleted.
    """
    names = [entry.name for old in found for entry in old.entries]
    with tqdm(total=len(names), desc="deleting", unit="file", disable=None, leave=False) as progress:
        for number in files.delete(names):
            progress.update(number - progress.n)
    say(f"{counted(len(names), 'file')} deleted")
    return len(names)
