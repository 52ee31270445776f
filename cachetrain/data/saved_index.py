"""Index files, with which a later start neither lists the folders of a data directory nor reads headers.

    photos/.cachetrain/index.img_sdxl.txt_t5cache.safetensors    --save_index of train_from_cached.py on photos

A file says what the folders hold, and what the headers of the sidecars say. It counts for the folders whose times are
still the same: a file added, removed, renamed or replaced changes those of its folder. A sidecar that another program
writes over, without replacing it, does not; training verifies each one when it reads it. multiply.txt is read at each
start.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from errno import ENOTSUP
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cachetrain.atomic import is_abandoned, temporary_path
from cachetrain.data.folders import Listed, Pairs
from cachetrain.data.headers import Contents
from cachetrain.data.index_file import Known, Saved, read_index_file, split_names, write_index_file
from cachetrain.data.sidecar import SidecarError
from cachetrain.data.walk import Folder
from cachetrain.log import counted, describe, info, warn

if TYPE_CHECKING:
    from cachetrain.data.index import PairIndex

FOLDER = ".cachetrain"  # hidden, so that nothing that walks data directories looks into it

# File systems count time in steps of up to two seconds, within which a change does not show.
SETTLE_S = 2.0


class IndexFile:
    """The index file of one data directory.

    Args:
        directory: the data directory.
        suffixes: of the sidecars of a pair; pairs of others have a file of their own.
        save: whether the file is to be written.

    Attributes:
        path: of the file.
        known: Known; None: there is no file, or it is damaged.
        changed: paths of the folders listed so far that the file does not hold as they are.
        num_same: number of those that it does.
    """

    def __init__(self, directory: str, suffixes: Sequence[str], save: bool):
        self.directory = directory
        self.suffixes = tuple(suffixes)
        name = "".join(suffixes).replace(os.sep, "_")
        self.path = Path(directory) / FOLDER / f"index{name}.safetensors"
        self.save = save
        self.known = None
        self.changed = []
        self.num_same = 0
        self._saved = {}  # path in the directory -> Listed, with its stems in one string
        self._clock_s = 0.0  # by how much the clock of the file system is ahead
        self._places = [np.zeros(0, int)]  # of the pairs of each folder listed, in the file
        self._folders = []  # Saved
        try:
            if self.path.exists():
                self.known, self._saved = read_index_file(self.path, self.suffixes)
        except (OSError, ValueError) as error:
            reason = "damaged" if isinstance(error, SidecarError) else describe(error)
            warn(
                f"{self.path}: not used ({reason}), so all headers are read; delete it, or save it anew with "
                "--save_index"
            )

    def saved(self, path: str) -> Listed | None:
        """What the file says of a folder; None: nothing that is still true."""
        if self.known is None:
            return None
        listed = self._saved.get(self._relative(path))
        if listed is None or listed.times != _times(path):
            self.changed.append(path)
            return None
        self.num_same += 1
        return listed._replace(folder=Folder(path, []), stems=split_names(listed.stems))

    def places(self) -> np.ndarray:
        """int array, of each pair the place in the file, -1 of those that are not there."""
        return np.concatenate(self._places)

    def prepare(self) -> None:
        """Checks that the file can be written, and that times of folders tell of changes.

        Raises:
            OSError: the directory cannot be written to, or its file system keeps no times of folders.
        """
        folder = self.path.parent
        try:
            folder.mkdir(exist_ok=True)
            for entry in os.scandir(folder):
                if is_abandoned(entry.path):
                    os.unlink(entry.path)
            probe = temporary_path(self.path)
            probe.touch()
            now_s, times = probe.stat().st_mtime, _times(folder)
            probe.unlink()
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; --save_index cannot write there", str(folder)) from error
        self._clock_s = now_s - time.time()
        if now_s - max(times) / 1e9 > SETTLE_S:
            raise OSError(ENOTSUP, "has times that do not change with its files; omit --save_index", str(folder))

    def times_of(self, path: str) -> tuple[int, int] | None:
        """The times of a folder that is going to be listed; waits until its last change can be told from the next.

        None: it keeps changing, or cannot be read, or the file is not to be written.
        """
        if not self.save:
            return None
        for wait in (True, False):
            times = _times(path)
            age_s = time.time() + self._clock_s - max(times or [0]) / 1e9
            if times is None or age_s >= SETTLE_S:
                return times
            if wait:
                time.sleep(min(SETTLE_S, SETTLE_S - age_s))
        return None

    def add(self, pairs: Pairs, start: int) -> None:
        """Notes the pairs of a folder, which begin at number `start` of the whole index."""
        listed, count = pairs.listed, len(pairs.stems)
        if listed.first is None:
            self._places.append(np.full(count, -1))
        else:
            kept = set(pairs.stems) if count < len(listed.stems) else ()
            there = [stem in kept for stem in listed.stems] if kept or not count else slice(None)
            self._places.append(np.arange(listed.first, listed.first + len(listed.stems))[there])
        if self.save and listed.times and count == len(listed.stems):  # else some were listed before, elsewhere
            path, joined = self._relative(listed.folder.path), b"\0".join(listed.stems)
            self._folders.append(Saved(path, listed._replace(stems=()), joined, start, count))

    def write(self, index: PairIndex, contents: Contents, number: int) -> None:
        """Writes the file, with the folders that have not changed since they were listed.

        Args:
            number: of the directory in the index.
        """
        folders = [one for one in self._folders if one.listed.times == _times(one.listed.folder.path)]
        try:
            write_index_file(self.path, folders, self.suffixes, index, contents, number)
        except OSError as error:
            warn(f"{self.path}: not saved ({error.strerror}); the next start reads all headers again")
            return
        pairs = counted(sum(one.count for one in folders), "pair")
        left = len(self._places) - 1 - len(folders)
        info(
            f"{self.path}: saved, with {pairs} in {counted(len(folders), 'folder')}"
            + (f"; {counted(left, 'folder')} left out, which changed meanwhile or hold links" if left else "")
        )

    def _relative(self, path):
        return path[len(self.directory) :].lstrip(os.sep)


class IndexFiles:
    """The index files of the data directories of a run.

    Args:
        save: write those that are missing or no longer true.
    """

    def __init__(self, save: bool = False):
        self._save = save
        self._files = {}  # number of a directory with pairs -> IndexFile

    def open(self, directory: str, suffixes: Sequence[str]) -> IndexFile:
        file = IndexFile(directory, suffixes, self._save)
        if self._save and os.path.isdir(directory):
            file.prepare()
        return file

    def listed(self, file: IndexFile, number: int) -> dict[int, tuple[Known, np.ndarray]]:
        """Says what a file was good for in listing directory `number`.

        Returns:
            {number: (Known, places of the directory's pairs in it)}; {} if the file was good for nothing.
        """
        if self._save:
            self._files[number] = file
        if file.known is None:
            return {}
        if file.changed:
            total = counted(file.num_same + len(file.changed), "folder")
            info(
                f"{file.path}: {len(file.changed):,} of {total} changed since it was saved, and are read again, the "
                f"first {file.changed[0]}" + ("" if self._save else "; --save_index saves it anew")
            )
        else:
            info(f"{file.path}: used in place of reading headers")
        return {number: (file.known, file.places())} if file.num_same else {}

    def write(self, index: PairIndex, contents: Contents) -> None:
        """Writes the files of an index whose headers have been read, but not those that say the same already."""
        for number, file in self._files.items():
            if file.changed or file.known is None or not file.known.fits(index, number):
                file.write(index, contents, number)
        self._files = {}


def _times(folder):
    try:
        state = os.stat(folder)
    except OSError:
        return None
    return state.st_mtime_ns, state.st_ctime_ns
