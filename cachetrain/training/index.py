"""The list of all (image sidecar, text sidecar) pairs, as arrays that loader workers share."""

import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cachetrain.bulk import PackedStrings, in_threads
from cachetrain.sidecar import NULL_STEM, RUN_KEYS, SUFFIXES, read_header


class PairIndex:
    """Pairs under some directories; what their headers say; no per-pair Python object.

    Attributes:
        shapes: distinct latent shapes (C, h, w); `shape_ids` uint16 [N] points into them.
        tokens: uint16 [N], text length in tokens.
        text_width: D of the embeddings.
        image_header, text_header: of the first pair.
    """

    def __init__(self, directories, image_suffix, text_suffix):
        """Walks `directories` and reads every header once.

        Raises:
            ValueError: no pairs; unreadable, foreign-shaped or mixed caches (two differing files are named).
        """
        self.image_suffix, self.text_suffix = image_suffix, text_suffix
        self._stems, self.unpaired, self._starts = PackedStrings(), 0, set()
        for directory in directories:
            start = len(self._stems)
            self._starts.add(start)
            for stem in self._paired_stems(directory):
                self._stems.append(stem)
            if len(self._stems) == start:
                raise ValueError(
                    f"{directory}: no pairs of *{image_suffix} and *{text_suffix}; run the cache scripts on it first"
                )
        self._read_headers()

    def __len__(self):
        return len(self._stems)

    def stem(self, i):
        """Path of pair `i` without a suffix."""
        return self._stems[i]

    @property
    def image_settings(self):
        """The settings that made the image caches, as a dict; {} where they are not recorded."""
        return json.loads(self.image_header.metadata.get("settings") or "{}")

    @property
    def text_settings(self):
        """The settings that made the text caches, as a dict; {} where they are not recorded."""
        return json.loads(self.text_header.metadata.get("settings") or "{}")

    @property
    def masked(self):
        """Whether padding is hidden from cross-attention: T5 yes, CLIP no. Headerless caches go by their suffix."""
        kinds = {suffix: kind for kind, suffix in SUFFIXES.items()}
        return (self.text_header.metadata.get("kind") or kinds.get(self.text_suffix)) != "txt_clipl"

    def image_path(self, i):
        return self.stem(i) + self.image_suffix

    def text_path(self, i):
        return self.stem(i) + self.text_suffix

    def _paired_stems(self, directory):
        """Yields the paths without suffix that have both sidecars, sorted within each folder; counts the others."""
        if not Path(directory).is_dir():
            raise ValueError(f"{directory}: no such directory")
        image_suffix, text_suffix, visited = self.image_suffix, self.text_suffix, set()
        for folder, subfolders, names in os.walk(directory, followlinks=True):
            if (real := os.path.realpath(folder)) in visited:  # links may lead in circles
                subfolders.clear()
                continue
            visited.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            names = [name for name in names if name[0] != "."]
            images = {name.removesuffix(image_suffix) for name in names if name.endswith(image_suffix)}
            texts = {name.removesuffix(text_suffix) for name in names if name.endswith(text_suffix)}
            texts.discard(NULL_STEM)
            yield from (os.path.join(folder, stem) for stem in sorted(images & texts))
            self.unpaired += len(images ^ texts)

    def _read_headers(self):
        shapes, self.num_foreign = {}, 0
        self.shape_ids, self.tokens = np.zeros(len(self), np.uint16), np.zeros(len(self), np.uint16)
        self.image_header, self.text_header = self._headers(0)
        self.text_width, first_in_directory = self.text_header.shapes["emb"][1], 0
        pairs = in_threads(self._headers, range(len(self)))
        for i, (image, text) in tqdm(pairs, desc="headers", total=len(self), unit="pair", disable=None):
            if i in self._starts:  # another directory may hold another size
                first_in_directory, images_here = i, image
                self._check_image(0, self.image_header, i, image, but="settings")
            if image.run_identity != images_here.run_identity:
                self._check_image(first_in_directory, images_here, i, image)
            if text.run_identity != self.text_header.run_identity:
                check_same_run(self.text_header, text, self.text_path(0), self.text_path(i))
            if text.shapes["emb"][1] != self.text_width:
                raise ValueError(f"{self.text_path(i)}: emb is {text.shapes['emb']}, {self.text_path(0)} has "
                                 f"{self.text_header.shapes['emb']}; encode both with one model")  # fmt: skip
            self.shape_ids[i] = shapes.setdefault(image.shapes["latent"], len(shapes))
            self.tokens[i] = text.shapes["emb"][0]
            self.num_foreign += image.foreign or text.foreign
        self.shapes = list(shapes)

    def _check_image(self, first, first_header, other, other_header, but=None):
        check_same_run(first_header, other_header, self.image_path(first), self.image_path(other), but)

    def _headers(self, i):
        stem, headers = self.stem(i), []
        for suffix, name, rank in ((self.image_suffix, "latent", 3), (self.text_suffix, "emb", 2)):
            header = read_header(stem + suffix)
            if len(header.shapes.get(name, ())) != rank:
                raise ValueError(
                    f"{stem}{suffix}: expected a tensor {name!r} of {rank} dimensions, found {header.shapes}"
                )
            headers.append(header)
        return headers


def null_caption_path(directories, text_suffix):
    """Path of the first `_null_caption` among the data directories, or None."""
    paths = (Path(directory) / (NULL_STEM + text_suffix) for directory in directories)
    return next((path for path in paths if path.exists()), None)


def check_same_run(first, other, first_path, other_path, but=None):
    """Raises a ValueError that names both files where their headers say different encoders or settings.

    Args:
        but: a key of RUN_KEYS that may differ.
    """
    for key, a, b in zip(RUN_KEYS, first.run_identity, other.run_identity, strict=True):
        if a != b and key != but:
            raise ValueError(
                f"mixed caches: {first_path} and {other_path} differ in {key}: {a} against {b}; "
                "run the cache script again on all of them"
            )
