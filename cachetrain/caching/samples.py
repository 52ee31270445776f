"""The samples of one input, a tar or a parquet file: images, and captions and masks by the names of the images.

The files of a sample share their name up to the first dot of its last part: `a.jpg`, `a.txt`, `a.mask.png`,
`a.json`. An input is read whole, so that what happens to it later changes nothing: one that cannot be read fails as a
whole, and none of its rows is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from cachetrain.data.captions import CAPTION_SUFFIXES, MAX_CAPTION, Caption, Pair, caption_order
from cachetrain.data.masks import MASK_SUFFIX
from cachetrain.data.sidecar import NULL_STEM
from cachetrain.data.variants import Captions, CaptionSettings, caption_files, captions_of
from cachetrain.data.walk import IMAGE_SUFFIXES
from cachetrain.log import counted
from cachetrain.reading import decoded, json_object

MAX_INPUT = 2**36  # bytes; more are not read
ANY_IMAGE = ".image"  # the suffix of an image of which only the content says the format

_IMAGES = IMAGE_SUFFIXES | {ANY_IMAGE}
_JSON = ".json"
_MAX_NAME = 255  # bytes


def is_image(suffix: str) -> bool:
    """Whether a file with this suffix, all of its name from the first dot on, is the image of its sample."""
    return suffix.lower() in _IMAGES


class Samples:
    """The samples of an input that have an image.

    Attributes:
        where: path or address of the input.
        pairs: list of Pair, with paths as `00012.tar#a.jpg`. The caption is in a.txt, else in a.caption, else in
            "caption" of a.json.
        faults: list of (path, reason): images that are none of the pairs, whatever the run.

    Args:
        files: (name of the sample, suffix) of each file.

    Raises:
        ValueError: there are no images.
    """

    def __init__(self, where: str, files: Iterable[tuple[str, str]], faults: Iterable[tuple[str, str]] = ()):
        self.where = where
        self.pairs = []
        self.faults = list(faults)
        self._suffixes = {}  # name of a sample -> list of suffixes
        for name, suffix in files:
            self._suffixes.setdefault(name, []).append(suffix)
        for name, suffixes in self._suffixes.items():
            self._add(name, suffixes)
        if not self.pairs:
            raise ValueError(": ".join(self.faults[0]) if self.faults else f"{where}: holds no images")

    def name(self, pair: Pair) -> str:
        """The name of a sample."""
        return os.path.splitext(pair.image)[0][len(self.where) + 1 :]

    def drop_long_names(self, suffix: str) -> list[Pair]:
        """Takes the pairs out of `pairs` whose sidecars of this suffix no file could be; returns them."""
        kept, dropped = [], []
        for pair in self.pairs:
            longest = max(len(os.fsencode(part)) for part in f"{self.name(pair)}{suffix}".split("/"))
            (dropped if longest > _MAX_NAME else kept).append(pair)
        self.pairs = kept
        return dropped

    def read(self, path: str) -> bytes:
        """The bytes of a file."""
        raise NotImplementedError

    def mask(self, image: str) -> str | None:
        """The path of the mask of an image; None if there is none."""
        stem = os.path.splitext(image)[0]
        return stem + MASK_SUFFIX if MASK_SUFFIX in self._suffixes[stem[len(self.where) + 1 :]] else None

    def captions(self, pair: Pair, settings: CaptionSettings) -> Captions:
        """The captions of a sample.

        Raises:
            ValueError: there is none, there are too many, or one is no UTF-8 text or has more than MAX_CAPTION bytes.
        """
        if "files" in settings.captions:
            files = [s for s in self._suffixes[self.name(pair)] if s.lower().endswith(CAPTION_SUFFIXES)]
            first, *more = [self._path(self.name(pair), s) for s in sorted(files, key=caption_order)] or [None]
            pair = Pair(pair.image, first or pair.caption_file, tuple(more))
        if pair.caption_file is None:
            raise ValueError(f"{pair.image}: has no caption")
        return captions_of(pair, [self._caption(path) for path in caption_files(pair, settings)], settings)

    def _caption(self, path):
        data = self.read(path)
        if len(data) > MAX_CAPTION:
            raise ValueError(f"{path}: has {counted(len(data), 'byte')}, expected at most {MAX_CAPTION:,}")
        text = decoded(path, data)
        if path.lower().endswith(_JSON):
            text = json_object(path, text).get("caption")
            if not isinstance(text, str):
                raise ValueError(f'{path}: has no text under "caption"')
        # Not the file's time: the same sample in another input gives the same sidecar.
        return Caption(text.strip(), str(len(data)), "0")

    def _path(self, name, suffix):
        return f"{self.where}#{name}{suffix}"

    def _add(self, name, suffixes):
        """Adds the Pair of a sample if it has an image."""
        images = list(filter(is_image, suffixes))
        if not images:
            reason = "is no image, as the name of a sample ends at its first dot; rename it"
            others = (suffix for suffix in suffixes if suffix.lower() != MASK_SUFFIX)
            self.faults += [(self._path(name, s), reason) for s in others if s.lower().endswith(tuple(_IMAGES))]
            return
        image, *others = (self._path(name, suffix) for suffix in images)
        for other in others:
            self.faults.append((other, f"would share its sidecar with {image}; rename one of the two images"))
        if name.startswith("/") or ".." in name.split("/") or os.path.basename(name) == NULL_STEM:
            self.faults.append((image, "no sidecar can have this name; rename the image"))
            return
        captions = sorted((suffix for suffix in suffixes if suffix.lower() in CAPTION_SUFFIXES), key=caption_order)
        captions += [suffix for suffix in suffixes if suffix.lower() == _JSON]
        self.pairs.append(Pair(image, self._path(name, captions[0]) if captions else None))
