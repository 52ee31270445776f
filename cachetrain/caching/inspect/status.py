"""The state of folders of images and sidecars: one walk, one stat and one header read per sidecar, no writing."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tqdm import tqdm

from cachetrain.caching import freshness
from cachetrain.caching.freshness import CORRUPT, FOREIGN, FRESH, MISSING, STALE, TOUCHED
from cachetrain.caching.inspect.caches import ORPHANED, UNREADABLE, Caches, Examples, Inspection
from cachetrain.caching.messages import failure_line
from cachetrain.data import walk
from cachetrain.data.captions import Pair
from cachetrain.data.many_files import PackedStrings, in_threads
from cachetrain.data.masks import is_mask
from cachetrain.data.sidecar import NULL_STEM, SUFFIXES, SidecarError, read_header
from cachetrain.data.unused import Unused
from cachetrain.data.variants import CaptionSettings
from cachetrain.reading import open_regular

# How many files of an unknown suffix are opened to see whether they are sidecars: the first may be damaged.
_TRIES = 3
_MAX_LISTED = 20


class Item(NamedTuple):
    """A sidecar to inspect.

    Attributes:
        pair: None if there is no image of its stem.
        possible_image: the stem of an image that begins the name of such a sidecar: `a.256.img_sdxl` may belong to
            `a.jpg` and have the suffix .256.img_sdxl.
    """

    suffix: str
    root: str
    path: str
    pair: Pair | None
    possible_image: str | None = None


class Status:
    """Inspects all images and sidecars under some folders.

    Args:
        roots: directories.
        suffixes: of sidecars, besides the default ones and those that are recognised by their headers.
        verify: also compare the tensors of each sidecar with their hash.

    Attributes:
        caches: list of Caches, for the suffixes that were found or requested.
        num_images: number of images.
        captions: Counter of images by the suffix of their caption file, "" if the caption is the file name.
        num_more_captions: number of further caption files, as a.caption and a.long.txt beside a.txt.
        unused: Unused, which counts what else is in the folders.
        alone: list of the roots that hold sidecars and no images. Their sidecars are checked without sources.
        damaged, unreadable: Examples of sidecars, and of files and folders.
        kept: Examples of orphaned sidecars that must not be deleted, with the reason.
        orphans: PackedStrings of the orphaned sidecars that may be deleted; `orphan_bytes`: their size.
    """

    def __init__(self, roots: Iterable[str], suffixes: Iterable[str] = (), verify: bool = False):
        for root in roots:
            if not os.path.isdir(root):
                raise ValueError(f"--data_root {root}: no such directory")
        self.roots = list(roots)
        self.num_images = 0
        self.captions = Counter()
        self.num_more_captions = 0
        self.unused = Unused()
        self.alone = []
        self.damaged = Examples(_MAX_LISTED)
        self.unreadable = Examples(_MAX_LISTED)
        self.kept = Examples(_MAX_LISTED)
        self.orphans = PackedStrings()
        self.orphan_bytes = 0
        self._verify = verify
        self._first_images = Examples()
        self._caches = {}  # by suffix
        self._tried = Counter()  # by unknown suffix, the files that were opened
        kinds = {suffix: kind for kind, suffix in SUFFIXES.items()}
        for suffix in dict.fromkeys([*kinds, *suffixes]):
            self._add_suffix(suffix, kinds.get(suffix), requested=suffix in suffixes)
        self._inspect_all()
        found = [caches for caches in self._caches.values() if caches.requested or caches.counts]
        self.caches = sorted(found, key=lambda caches: (caches.is_text, caches.suffix))
        for caches in self.caches:
            caches.finish()
            caches.counts[MISSING] = self.num_images - caches.num_of_images
            if caches.is_text:
                caches.nulls = {root: self._null_state(caches, root) for root in self.roots}

    @property
    def complete(self) -> bool:
        """Whether each image has its sidecars, fresh (or foreign, whose state is unknown), and none are mixed."""
        return bool(self.caches) and not self.unreadable.count and all(caches.complete for caches in self.caches)

    def _add_suffix(self, suffix, kind, requested=False):
        self._caches[suffix] = caches = Caches(suffix, kind, requested)
        for path in self._first_images.first:
            caches.examples[MISSING].add(path)
        # The longest first: a.256.img_sdxl has the suffix .256.img_sdxl if that is known.
        self._suffixes = tuple(sorted(self._caches, key=len, reverse=True))

    def _fail(self, path, reason):
        self.unreadable.add(failure_line(path, reason))

    def _inspect_all(self):
        with tqdm(desc="checking", unit="sidecar", disable=None, leave=False) as progress:
            for item, inspection in in_threads(self._inspect, self._items()):
                progress.update()
                caches = self._caches[item.suffix]
                if isinstance(inspection, Exception):
                    self._fail(item.path, inspection)
                    caches.counts[UNREADABLE] += 1
                    caches.num_of_images += item.pair is not None
                    continue
                caches.add(item.root, item.path, inspection, has_image=item.pair is not None)
                if inspection.state == CORRUPT:
                    self.damaged.add(item.path)
                if inspection.state == ORPHANED:
                    self._add_orphan(item, inspection)

    def _items(self):
        """Yields an Item per sidecar; counts images and captions, and notes images that have no sidecar."""
        visited = set()
        for root in self.roots:
            if not walk.has_images(root):
                self.alone.append(root)
            for folder in walk.walk_folders(root, visited, lambda name: True, self._fail):
                self._discover(folder)
                for name in folder.names:
                    if not (_is_source(name) or name.endswith(self._suffixes)):
                        self.unused.add_file(name)
                yield from self._items_of_folder(root, folder)

    def _items_of_folder(self, root, folder):
        sidecars = {name for name in folder.names if name.endswith(self._suffixes)}
        for pair in walk.pair_up(folder, self._fail, self.unused, all_captions=True):
            self._count(pair)
            stem = os.path.splitext(os.path.basename(pair.image))[0]
            for suffix in self._suffixes:
                if stem + suffix in sidecars:
                    sidecars.remove(stem + suffix)
                    yield Item(suffix, root, os.path.join(folder.path, stem + suffix), pair)
                else:
                    self._caches[suffix].examples[MISSING].add(pair.image)
        stems = walk.image_stems(folder.names) if sidecars else ()
        for name in sorted(sidecars):
            suffix = next(suffix for suffix in self._suffixes if name.endswith(suffix))
            if name != NULL_STEM + suffix:
                yield Item(suffix, root, os.path.join(folder.path, name), None, walk.possible_image(name, stems))

    def _discover(self, folder):
        """Finds suffixes that were not requested, from the headers of the first few files of each unknown suffix."""
        for name in folder.names:
            suffix = os.path.splitext(name)[1]
            if not suffix or self._tried[suffix] >= _TRIES or suffix in self._caches or _is_source(name):
                continue
            self._tried[suffix] += 1
            try:
                path = os.path.join(folder.path, name)
                kind = os.path.isfile(path) and read_header(path).metadata.get("kind")
            except (OSError, SidecarError):
                continue
            if kind in SUFFIXES:
                self._add_suffix(suffix, kind)

    def _count(self, pair):
        self.num_images += 1
        self.captions[os.path.splitext(pair.caption_file)[1].lower() if pair.caption_file else ""] += 1
        self.num_more_captions += len(pair.more)
        self._first_images.add(pair.image)

    def _inspect(self, item):
        """Returns an Inspection, or the exception that prevented it. Runs on a thread."""
        try:
            num_bytes = os.stat(item.path).st_size
            alone = item.root in self.alone
            state, header = freshness.file_state(item.path, self._verify and (alone or item.pair is not None))
            if item.pair is None and alone:
                return Inspection(state or FRESH, header, num_bytes, state != FOREIGN)
            if item.pair is None:
                has_our_header = _mentions_format(item.path) if state == CORRUPT else state != FOREIGN
                return Inspection(ORPHANED, header, num_bytes, has_our_header)
            if state is None:
                if header.metadata.get("kind", "").startswith("txt"):
                    source = self._caption_source(item, header)
                else:
                    source = freshness.image_source(item.pair, freshness.has_mask_file(header.metadata))
                state = freshness.source_state(header.metadata, source)
        except (OSError, ValueError) as error:
            return error
        return Inspection(FRESH if state == TOUCHED else state, header, num_bytes, state != FOREIGN)

    def _caption_source(self, item, header):
        """The source of a text sidecar, with the settings that its header names."""
        settings = CaptionSettings.from_header(item.path, header.metadata)
        pair = item.pair if "files" in settings.captions else item.pair.with_one_file  # as the cache script finds it
        return freshness.caption_source(pair, settings)

    def _add_orphan(self, item, inspection):
        if not inspection.has_our_header:
            self.kept.add(f"{item.path}: has no cachetrain header")
        elif item.possible_image is not None:
            self.kept.add(
                f"{item.path}: may belong to the image {item.possible_image}; pass its suffix as --cache_suffix"
            )
        else:
            self.orphans.append(item.path)
            self.orphan_bytes += inspection.num_bytes

    def _null_state(self, caches, root):
        path = os.path.join(root, NULL_STEM + caches.suffix)
        if not os.path.exists(path):
            return MISSING
        inspection = self._inspect(Item(caches.suffix, root, path, walk.null_pair(root)))
        if isinstance(inspection, Exception):
            self._fail(path, inspection)
            return UNREADABLE
        caches.num_bytes += inspection.num_bytes
        if inspection.state == CORRUPT:
            self.damaged.add(path)
        identity = inspection.header.run_identity
        if inspection.state == FRESH and identity != caches.majority.get(root, identity):
            return STALE
        return inspection.state


def delete_orphans(paths: Iterable[str], on_error: Callable[[str, str], None]) -> int:
    """Deletes those sidecars that still have no image beside them; returns how many.

    Args:
        on_error: called with the path and the reason for each that cannot be deleted.
    """
    folder, stems, num_deleted = None, (), 0
    for path in paths:
        try:
            if os.path.dirname(path) != folder:
                stems = walk.image_stems(os.listdir(os.path.dirname(path)))
                folder = os.path.dirname(path)
            if walk.possible_image(os.path.basename(path), stems) is None:
                os.unlink(path)
                num_deleted += 1
        except OSError as error:
            on_error(path, error.strerror)
    return num_deleted


def _is_source(name):
    """Whether something is made from a file of this name."""
    return walk.is_source(name) or is_mask(name)


def _mentions_format(path):
    with open_regular(path) as file:
        return b'"cachetrain_format"' in (file.read(65536) or b"")
