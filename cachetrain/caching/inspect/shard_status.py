"""What a shard set holds: rows and bytes of each half, what made them, and what one half lacks."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import numpy as np
from tqdm import tqdm

from cachetrain.caching.inspect.caches import Examples, differing
from cachetrain.caching.inspect.set_freeze import find_freezes
from cachetrain.caching.inspect.set_state import Folder, Inspected, folders_among, inspect_shards, time_text, written
from cachetrain.caching.messages import print_line, say
from cachetrain.data.freeze import Freeze
from cachetrain.data.set_files import Bucket, Directory, Entry
from cachetrain.data.shard_set import check_alike
from cachetrain.data.shards import ShardIndex, failed_rows
from cachetrain.data.sidecar import verified
from cachetrain.log import counted


class FolderReport:
    """What the shards of one folder hold; of two of one number, the newer one counts.

    Attributes:
        newer: FolderReport of the folder of the same suffix that was written last, None if it is this one.
        first: ShardIndex of its first shard.
        tokens: length of the shortest and of the longest caption.
        failed: Examples of rows that failed when the shards were made.
        missing: Examples of rows that other halves have; `lacking`: numbers of shards that others have.
        damaged: set of the names of shards with something wrong, and of a null caption, each named on stderr.
        rows: {name of a shard: number of its rows}.
    """

    def __init__(self, folder: Folder, newer: FolderReport | None = None):
        self.folder = folder
        self.newer = newer
        self.first = None
        self.num_rows = 0
        self.num_masked = 0
        self.num_damaged = 0
        self.shapes = Counter()
        self.tokens = []
        self.failed = Examples()
        self.missing = Examples()
        self.lacking = []
        self.damaged = set()
        self.rows = {}

    @property
    def current(self) -> dict[int, Entry]:
        """{number: its newest shard}."""
        return {number: entries[0] for number, entries in self.folder.shards.items()}

    @property
    def is_text(self) -> bool:
        """Whether it holds captions."""
        return self.first is not None and self.first.fields["kind"].startswith("txt")

    @property
    def lacks_null(self) -> bool:
        """Whether the null caption is missing."""
        return self.is_text and self.folder.null is None

    def add(self, entry: Entry, inspected: Inspected) -> None:
        """Adds a shard; names what is wrong with it."""
        index, problems = inspected
        if index is not None:
            try:
                self.first = self.first or index
                check_alike(self.first, index)
            except ValueError as error:
                problems.append(str(error))
            self.rows[entry.name] = len(index)
            self._add_rows(index)
        for problem in problems:
            print_line(problem)
        self.num_damaged += len(problems)
        if problems:
            self.damaged.add(entry.name)

    def _add_rows(self, index):
        self.num_rows += len(index)
        self.num_masked += int(index.arrays["masked"].sum())
        for place, count in zip(*np.unique(index.arrays["shape"], return_counts=True), strict=True):
            self.shapes["x".join(map(str, index.fields["shapes"][place]))] += int(count)
        tokens = [*self.tokens, *index.arrays["tokens"].tolist()]
        self.tokens = [min(tokens), max(tokens)]
        num_failed, first = failed_rows(index.fields)
        wanted = self.failed.limit - len(self.failed.first)
        self.failed.first += [f"{name}: {reason}" for name, reason in first[:wanted]]
        self.failed.count += num_failed

    def add_missing(self, number: int, others: list[ShardIndex], own: ShardIndex | None) -> None:
        """Adds the rows of a number that other halves have and this one lacks."""
        if own is None:
            self.lacking.append(number)
        own_keys = own.arrays["key"] if own else np.array([], np.uint64)
        others = [other for other in others if not np.array_equal(other.arrays["key"], own_keys)]
        rows = [np.flatnonzero(~np.isin(other.arrays["key"], own_keys)) for other in others]
        keys = [other.arrays["key"][selected] for other, selected in zip(others, rows, strict=True)]
        wanted = self.missing.limit - len(self.missing.first)
        names = (other.name(row) for other, of in zip(others, rows, strict=True) for row in of[:wanted].tolist())
        self.missing.first += list(dict.fromkeys(names))[:wanted]
        self.missing.count += len(np.unique(np.concatenate(keys))) if keys else 0


class SetReport:
    """The state of a shard set.

    Attributes:
        folders: list of FolderReport, those that training reads first.
        num_pairs: rows that all halves have.
        freezes: {name of a freeze file: Freeze, or what is wrong with it}.
        gone: {name of a freeze file: the shards that it lists and that are not there}.

    Args:
        verify: read all sidecars and compare them with their SHA-256.

    Raises:
        ValueError: it holds no shards.
        OSError: it cannot be listed.
    """

    def __init__(self, files: Directory | Bucket, verify: bool):
        self.files = files
        self.verify = verify
        self.num_pairs = 0
        entries = files.entries()
        of_suffix = folders_among(entries)
        if not of_suffix:
            raise ValueError(f"{files.where}: holds no shards; pack a folder with cache/pack_shards.py")
        self.folders = [FolderReport(folders[0]) for folders in of_suffix]
        for newest, folders in zip(list(self.folders), of_suffix, strict=True):
            self.folders += [FolderReport(folder, newest) for folder in folders[1:]]
        self.freezes = find_freezes(files, entries)
        there = {entry.name for entry in entries}
        self.gone = {name: _not_there(freeze, there) for name, freeze in self.freezes.items()}
        self._inspect()
        for report in self.folders if verify else ():
            self._verify_null(report)

    @property
    def halves(self) -> list[FolderReport]:
        """Those folders that are the newest of their suffix."""
        return [report for report in self.folders if report.newer is None]

    @property
    def complete(self) -> bool:
        """Whether all halves have the same rows, none failed and none are damaged, there is a null caption, and what
        freeze files list is there; older folders do not count."""
        if any(self.gone.values()) or any(isinstance(freeze, str) for freeze in self.freezes.values()):
            return False
        return not any(
            report.missing.count or report.failed.count or report.num_damaged or report.lacks_null
            for report in self.halves
        )

    def _inspect(self):
        places = sorted(
            (number, place, entry)
            for place, report in enumerate(self.folders)
            for number, entry in report.current.items()
        )
        of_entry = {entry.name: (number, self.folders[place]) for number, place, entry in places}
        results = inspect_shards(self.files, [entry for *_, entry in places], self.verify)
        for number, of_number in groupby(results, key=lambda result: of_entry[result[0].name][0]):
            indexes = {}  # FolderReport -> ShardIndex, None if it cannot be read
            for entry, inspected in of_number:
                _, report = of_entry[entry.name]
                report.add(entry, inspected)
                indexes[report] = inspected.index
            self._compare(number, {report: index for report, index in indexes.items() if report.newer is None})

    def _compare(self, number, indexes):
        """Finds what one of the halves {FolderReport: ShardIndex} of a number lacks."""
        readable = [index for index in indexes.values() if index is not None]
        for report in self.halves if readable else ():
            if report not in indexes or indexes[report] is not None:
                others = [index for other, index in indexes.items() if other is not report and index is not None]
                report.add_missing(number, others, indexes.get(report))
        if len(readable) == len(self.halves):
            keys = readable[0].arrays["key"]
            for other in (index.arrays["key"] for index in readable[1:]):
                keys = keys if np.array_equal(keys, other) else np.intersect1d(keys, other)
            self.num_pairs += len(keys)

    def _verify_null(self, report):
        null = report.folder.null
        try:
            if null:
                verified(self.files.path(null.name), self.files.read(null.name, 0, null.size))
        except (ValueError, OSError) as error:
            report.add(null, Inspected(None, [str(error)]))

    def print(self) -> None:
        """Prints a few lines on each folder."""
        for report in self.folders:
            self._print_folder(report)
        for name, freeze in self.freezes.items():
            self._print_freeze(name, freeze)
        say(f"{self.files.where}: {counted(self.num_pairs, 'pair')} in all halves")

    def _print_freeze(self, name, freeze):
        if isinstance(freeze, str):
            print_line(freeze)
        else:
            say(f"{self.files.path(name)}: {what_it_lists(freeze)}")
        if gone := self.gone[name]:
            say(f"  {counted(len(gone), 'shard')} of it gone, like {gone[0]}")

    def _print_folder(self, report):
        folder, entries = report.folder, list(report.current.values())
        size = tqdm.format_sizeof(sum(entry.size for entry in entries), "B")
        shards, rows = counted(len(entries), "shard"), counted(report.num_rows, "row")
        times = time_text(*written(entries))
        say(f"{self.files.path(folder.name)}: {shards}, {rows}, {size}, written {times}")
        if report.first:
            self._print_fields(report)
        if number := len(folder.entries) - len(entries):
            say(f"  {counted(number, 'older shard')} of the same numbers")
        if report.newer:
            say(f"  older than {report.newer.folder.name}{_difference(report)}")
        if report.lacking:
            others = "" if len(report.lacking) < 4 else ", ..."
            numbers = ", ".join(f"{number:05d}" for number in report.lacking[:3])
            say(f"  no shard of {counted(len(report.lacking), 'number')}: {numbers}{others}")
        if report.missing.count:
            others = ", ..." if report.missing.count > len(report.missing.first) else ""
            names = ", ".join(report.missing.first)
            say(f"  rows in other folders only: {report.missing.count:,}, {names}{others}")
        if report.failed.count:
            say(f"  rows that failed when the shards were made: {report.failed.count:,}")
            say(*(f"    {line}" for line in report.failed.first))
        if report.num_damaged:
            say(f"  damaged: {report.num_damaged:,}, named above")

    def _print_fields(self, report):
        fields = report.first.fields
        say(f"  encoder {fields['encoder'][:12]}, settings {fields['settings']}")
        if report.is_text:
            say(f"  captions of {report.tokens[0]} to {counted(report.tokens[1], 'token')}")
            say(f"  null caption: {'missing' if report.lacks_null else 'there'}")
        else:
            say(f"  latents: {', '.join(f'{number:,} of {shape}' for shape, number in report.shapes.most_common(8))}")
        if report.num_masked:
            say(f"  {counted(report.num_masked, 'mask')}")


def what_it_lists(freeze: Freeze) -> str:
    """`24 pairs in 4 shards each of .img_sdxl and .txt_t5cache`."""
    shards = counted(len(freeze.numbers), "shard")
    suffixes = freeze.common["suffixes"]
    return f"{counted(int(freeze.rows.sum()), 'pair')} in {shards} each of {' and '.join(suffixes)}"


def _not_there(freeze, names):
    if isinstance(freeze, str):
        return []
    return [name for of_number in freeze.shards() for name in of_number if name not in names]


def _difference(report):
    """In what a folder differs from the newer one of its suffix, in words."""
    if not (report.first and report.newer.first):
        return ""
    names = differing(report.first.run_identity, report.newer.first.run_identity)
    return f", differs in {', '.join(names)}" if names else ""
