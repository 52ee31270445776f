"""Puts together what is encoded caption by caption: the variants of an image are in one sidecar."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cachetrain.data.captions import Pair
from cachetrain.data.sidecar import NULL_STEM
from cachetrain.data.variants import Captions

if TYPE_CHECKING:
    import torch

_MAX_SHARED = 256  # encoded captions kept for images of later chunks

Texts = tuple[str, ...]  # the captions of an image


class Embedded(NamedTuple):
    """The tensors of the caption at `index` of a list; num_tokens of the sequence are text, the rest is padding."""

    index: int
    tensors: "dict[str, torch.Tensor]"
    num_tokens: int
    truncated: bool


class Assembly:
    """Keeps encoded captions until all variants of an image are there. Each caption is encoded once.

    Images whose captions are the same are one group. If images have several captions, they are taken in chunks, the
    longest first, so that few captions are in memory. A caption that a later chunk needs, too, is kept; if there are
    more than _MAX_SHARED of these, the oldest are encoded again.

    Args:
        images_of: {captions: the images that have them}.
        chunk_size: about how many captions are encoded before the next images are taken.

    Attributes:
        num_images: {caption: number of images that have it, null captions not counted}.
    """

    def __init__(self, images_of: Mapping[Texts, Sequence[tuple[Pair, Captions]]], chunk_size: int):
        self.images_of = images_of
        self.num_images = Counter()
        self._chunk_size = chunk_size
        self._uses = Counter()  # caption -> number of groups that still need it
        self._encoded = {}  # caption -> Embedded
        self._users = {}  # caption of this chunk -> groups that wait for it
        self._num_missing = Counter()  # group of this chunk -> number of its captions that are not encoded yet
        for texts, images in images_of.items():
            nulls = sum(os.path.basename(pair.image) == NULL_STEM for pair, _ in images)
            for text in texts:
                self._uses[text] += 1
                self.num_images[text] += len(images) - nulls

    def chunks(self) -> Iterator[tuple[list[str], list[tuple[Texts, list[Embedded]]]]]:
        """Yields (captions to encode next, groups that need none of them, as in `add`), chunk by chunk.

        The caller passes what it encodes to `add`. If no image has several captions, there is one chunk.
        """
        if all(len(texts) == 1 for texts in self.images_of):
            yield self._start(self.images_of)
            return
        chunk, num_captions = [], 0
        for texts in sorted(self.images_of, key=lambda texts: -max(map(len, texts))):
            chunk.append(texts)
            num_captions += len(texts)
            if num_captions >= self._chunk_size:
                yield self._start(chunk)
                chunk, num_captions = [], 0
        if chunk:
            yield self._start(chunk)

    def add(self, captions: Sequence[str], batch: Iterable[Embedded]) -> list[tuple[Texts, list[Embedded]]]:
        """Adds a batch of the captions; returns (captions, their Embedded) of each group that is complete now."""
        complete = []
        for item in batch:
            self._encoded[captions[item.index]] = item
            for texts in self._users.pop(captions[item.index]):
                self._num_missing[texts] -= 1
                if not self._num_missing[texts]:
                    complete.append(self._take(texts))
        return complete

    def _start(self, chunk):
        for text in list(self._encoded)[:-_MAX_SHARED]:
            del self._encoded[text]
        self._users, self._num_missing, complete = {}, Counter(), []
        for texts in chunk:
            for text in texts:
                if text not in self._encoded:
                    self._users.setdefault(text, []).append(texts)
                    self._num_missing[texts] += 1
        complete = [self._take(texts) for texts in chunk if not self._num_missing[texts]]
        return list(self._users), complete

    def _take(self, texts):
        embedded = [self._encoded[text] for text in texts]
        for text in texts:
            self._uses[text] -= 1
            if not self._uses[text]:
                del self._encoded[text]
        return texts, embedded
