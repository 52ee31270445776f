"""What state folders of images and sidecars are in: one walk, one stat and one header read a sidecar, no writing."""

import os
from collections import Counter
from typing import NamedTuple

from tqdm import tqdm

from cachetrain.caching.freshness import (
    CORRUPT,
    FOREIGN,
    FRESH,
    MISSING,
    STALE,
    TOUCHED,
    caption_source,
    file_state,
    image_source,
    source_state,
)
from cachetrain.caching.inspect.caches import ORPHANED, UNREADABLE, Caches, Examples, Seen
from cachetrain.data import scan
from cachetrain.data.many_files import PackedStrings, in_threads
from cachetrain.data.sidecar import NULL_STEM, SUFFIXES, SidecarError, read_header

# How many files of an unknown suffix are opened to see whether they are sidecars: the first may be damaged.
_TRIES = 3
_MAX_LISTED = 20


class Item(NamedTuple):
    """A sidecar to look at.

    `pair` is None where no image has its stem; `near` is then the stem of an image that begins its name, if any:
    `a.256.img_sdxl` may be of `a.jpg` and have the suffix .256.img_sdxl.
    """

    suffix: str
    root: str
    path: str
    pair: scan.Pair | None
    near: str | None = None


class Status:
    """Looks at everything under some folders.

    Args:
        roots: directories.
        suffixes: of sidecars, besides the default ones and those that are found by their headers.
        verify: compare each sidecar's tensors with their hash, too.

    Attributes:
        caches: list of Caches, of the suffixes that were found or named.
        num_images; captions: Counter by suffix of the caption's file, "" for file names.
        damaged, unreadable, kept: Examples; kept: of orphans that must not be deleted, with the reason.
        orphans: PackedStrings, those that may be; they have `orphan_bytes`.
    """

    def __init__(self, roots, suffixes=(), verify=False):
        for root in roots:
            if not os.path.isdir(root):
                raise ValueError(f"--data_root {root}: no such directory")
        self.roots, self._verify = list(roots), verify
        self.num_images, self.captions, self._first_images = 0, Counter(), Examples()
        self.damaged, self.unreadable, self.kept = Examples(_MAX_LISTED), Examples(_MAX_LISTED), Examples(_MAX_LISTED)
        self.orphans, self.orphan_bytes = PackedStrings(), 0
        self._caches, self._tried = {}, Counter()
        kinds = {suffix: kind for kind, suffix in SUFFIXES.items()}
        for suffix in dict.fromkeys([*kinds, *suffixes]):
            self._know(suffix, kinds.get(suffix), named=suffix in suffixes)
        self._walk()
        found = [caches for caches in self._caches.values() if caches.named or caches.counts]
        self.caches = sorted(found, key=lambda caches: (caches.is_text, caches.suffix))
        for caches in self.caches:
            caches.settle()
            caches.counts[MISSING] = self.num_images - caches.counts.total() + caches.counts[ORPHANED]
            if caches.is_text:
                caches.nulls = {root: self._null_state(caches, root) for root in self.roots}

    @property
    def complete(self):
        """Whether each image has its sidecars, fresh (or foreign, which nobody can tell) and none of them mixed."""
        return bool(self.caches) and not self.unreadable.count and all(caches.complete for caches in self.caches)

    def _know(self, suffix, kind, named=False):
        self._caches[suffix] = caches = Caches(suffix, kind, named)
        for path in self._first_images.first:
            caches.examples[MISSING].add(path)
        # The longest first: a.256.img_sdxl is of suffix .256.img_sdxl where that is known.
        self._suffixes = tuple(sorted(self._caches, key=len, reverse=True))

    def _fail(self, path, reason):
        self.unreadable.add(f"{path}: {reason}")

    def _walk(self):
        with tqdm(desc="checking", unit="sidecar", disable=None, leave=False) as progress:
            for item, seen in in_threads(self._look, self._items()):
                progress.update()
                caches = self._caches[item.suffix]
                if isinstance(seen, Exception):
                    self._fail(item.path, seen)
                    caches.counts[UNREADABLE] += 1
                    continue
                caches.add(item, seen)
                if seen.state == CORRUPT:
                    self.damaged.add(item.path)
                if seen.state == ORPHANED:
                    self._add_orphan(item, seen)

    def _items(self):
        """Yields an Item per sidecar; counts images and captions, and notes images that have no sidecar."""
        visited = set()
        for root in self.roots:
            for folder, names in scan.walk_folders(root, visited, lambda name: True, self._fail):
                self._discover(folder, names)
                sidecars = {name for name in names if name.endswith(self._suffixes)}
                for pair in scan.pair_up(folder, names, self._fail):
                    self._count(pair)
                    stem = os.path.splitext(os.path.basename(pair.image))[0]
                    for suffix in self._suffixes:
                        if stem + suffix in sidecars:
                            sidecars.remove(stem + suffix)
                            yield Item(suffix, root, os.path.join(folder, stem + suffix), pair)
                        else:
                            self._caches[suffix].examples[MISSING].add(pair.image)
                stems = _image_stems(names) if sidecars else ()
                for name in sorted(sidecars):
                    suffix = next(suffix for suffix in self._suffixes if name.endswith(suffix))
                    if name != NULL_STEM + suffix:
                        yield Item(suffix, root, os.path.join(folder, name), None, _image_near(name, stems))

    def _discover(self, folder, names):
        """Learns suffixes that nobody named, from the headers of the first few files of each unknown suffix."""
        for name in names:
            suffix = os.path.splitext(name)[1]
            if not suffix or self._tried[suffix] >= _TRIES or suffix in self._caches or scan.is_source(name):
                continue
            self._tried[suffix] += 1
            try:
                path = os.path.join(folder, name)
                kind = os.path.isfile(path) and read_header(path).metadata.get("kind")
            except (OSError, SidecarError):
                continue
            if kind in SUFFIXES:
                self._know(suffix, kind)

    def _count(self, pair):
        self.num_images += 1
        self.captions[os.path.splitext(pair.caption_file)[1] if pair.caption_file else ""] += 1
        self._first_images.add(pair.image)

    def _look(self, item):
        """Returns Seen, or the exception that says why not. Runs on a thread."""
        try:
            num_bytes = os.stat(item.path).st_size
            state, header = file_state(item.path, self._verify and item.pair is not None)
            if item.pair is None:
                ours = _mentions_format(item.path) if state == CORRUPT else state != FOREIGN
                return Seen(ORPHANED, header, num_bytes, ours)
            if state is None:
                is_text = header.metadata.get("kind", "").startswith("txt")
                source = (caption_source if is_text else image_source)(item.pair)
                state = source_state(header.metadata, source)
        except (OSError, ValueError) as error:
            return error
        return Seen(FRESH if state == TOUCHED else state, header, num_bytes, state != FOREIGN)

    def _add_orphan(self, item, seen):
        if not seen.ours:
            self.kept.add(f"{item.path}: has no cachetrain header")
        elif item.near is not None:
            self.kept.add(f"{item.path}: may be of the image {item.near}; name its suffix with --cache_suffix")
        else:
            self.orphans.append(item.path)
            self.orphan_bytes += seen.num_bytes

    def _null_state(self, caches, root):
        path = os.path.join(root, NULL_STEM + caches.suffix)
        if not os.path.exists(path):
            return MISSING
        seen = self._look(Item(caches.suffix, root, path, scan.null_pair(root)))
        if isinstance(seen, Exception):
            self._fail(path, seen)
            return UNREADABLE
        caches.num_bytes += seen.num_bytes
        if seen.state == CORRUPT:
            self.damaged.add(path)
        if seen.state == FRESH and seen.header.run_identity != caches.majority.get(root, seen.header.run_identity):
            return STALE
        return seen.state


def delete_orphans(paths, fail):
    """Deletes those sidecars that still have no image beside them; returns their number.

    Args:
        fail: called as fail(path, reason) for one that cannot be deleted.
    """
    folder, stems, num_deleted = None, (), 0
    for path in paths:
        try:
            if os.path.dirname(path) != folder:
                stems = _image_stems(os.listdir(os.path.dirname(path)))
                folder = os.path.dirname(path)
            if _image_near(os.path.basename(path), stems) is None:
                os.unlink(path)
                num_deleted += 1
        except OSError as error:
            fail(path, error.strerror)
    return num_deleted


def _image_stems(names):
    return {stem for stem, suffix in map(os.path.splitext, names) if suffix.lower() in scan.IMAGE_SUFFIXES}


def _image_near(name, stems):
    return next((name[:i] for i, character in enumerate(name) if character == "." and name[:i] in stems), None)


def _mentions_format(path):
    with open(path, "rb") as file:
        return b'"cachetrain_format"' in file.read(65536)
