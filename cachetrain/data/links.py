"""Finds pairs that are links to the files of other pairs, so that a pair counts once however often it is linked."""

import os
from collections.abc import Collection

from cachetrain.data.walk import Folder


class Links:
    """The pairs among those listed so far whose sidecars are symbolic links.

    Attributes:
        targets: {(real path of the image sidecar, of the text sidecar)}.
        num_repeated: number of pairs left out because another one has the same files.
    """

    def __init__(self, image_suffix: str, text_suffix: str):
        self._suffixes = (image_suffix, text_suffix)
        self.targets = set()
        self.num_repeated = 0

    def without_repeated(self, folder: Folder, stems: list[bytes], visited: Collection[str]) -> list[bytes]:
        """Returns the stems whose files are not those of a pair listed before.

        Args:
            folder: with the names of its links.
            stems: of the pairs in it, as the file system encodes them.
            visited: real paths of all folders listed so far, this one included.
        """
        if not folder.links and not self.targets:
            return stems
        real_folder = os.path.realpath(folder.path)
        kept = [stem for stem in stems if self._is_new(folder, real_folder, os.fsdecode(stem), visited)]
        self.num_repeated += len(stems) - len(kept)
        return kept

    def _is_new(self, folder, real_folder, stem, visited):
        names = [stem + suffix for suffix in self._suffixes]
        if folder.links.isdisjoint(names):
            return tuple(os.path.join(real_folder, name) for name in names) not in self.targets
        files = tuple(os.path.realpath(os.path.join(folder.path, name)) for name in names)
        (place, name), (text_place, text_name) = map(os.path.split, files)
        a_pair = name.removesuffix(self._suffixes[0]) == text_name.removesuffix(self._suffixes[1])
        if files in self.targets or (a_pair and place == text_place and place in visited):
            return False
        self.targets.add(files)
        return True
