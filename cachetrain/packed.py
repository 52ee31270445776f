"""Long lists of paths without a Python object each."""

import os
from array import array


class PackedStrings:
    """An append-only list of strings: their bytes one after another, and 8 more each for where they end.

    Forked loader workers share it, since reading it writes no reference counts into its memory. File names that are
    not UTF-8 survive, as they do in `os.fsdecode`.
    """

    def __init__(self):
        self._bytes, self._ends = bytearray(), array("Q")

    def append(self, string):
        self._bytes += os.fsencode(string)
        self._ends.append(len(self._bytes))

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, index):
        start = self._ends[index - 1] if index > 0 else 0
        return os.fsdecode(bytes(self._bytes[start : self._ends[index]]))
