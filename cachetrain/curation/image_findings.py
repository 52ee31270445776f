"""Collects what is found in a folder of images, lists it, shows it as a page, and moves images away."""

import heapq
import os
import shutil
from argparse import Namespace
from collections import defaultdict

import numpy as np
from PIL import Image

from cachetrain.curation.page import MAX_ITEMS, Item, Section, write_page
from cachetrain.curation.pictures import look_at, near_groups, thumbnail_of
from cachetrain.data.captions import Pair
from cachetrain.data.masks import mask_file

_SAME_COLORS = 16  # of 255: mean difference of two images of 4 x 4 pixels, above which they are no near duplicates


class Findings:
    """Adds images one by one. Memory per image: its path, hashes and measurements, and no more than 16 pixels.

    Args:
        args: of check_images.py: data_root, findings, min_side, max_aspect, distance, top.
    """

    def __init__(self, args: Namespace):
        self.args = args
        self.num_images = 0
        self._pairs = []
        self._found = defaultdict(list)  # finding -> list of (index of the image, remark)
        self._sha256, self._phash, self._ranks = [], [], []
        self._quality = {}  # index -> (number of pixels, sharpness)
        self._colors = {}  # index -> uint8 [4, 4, 3]

    def add(self, pair: Pair) -> None:
        picture = look_at(pair.image, self.args.min_side, self.args.max_aspect)
        index, self.num_images = self.num_images, self.num_images + 1
        self._pairs.append(pair)
        for name, remark in picture.faults.items():
            self._found[name.replace(" ", "-")].append((index, remark))
        if picture.sha256:
            self._sha256.append((picture.sha256, index))
        if picture.phash is not None:
            self._phash.append((picture.phash, index))
            self._colors[index] = np.array(picture.small.resize((4, 4), Image.Resampling.BOX))
            self._quality[index] = picture.size[0] * picture.size[1], picture.sharpness
            self._ranks.append((picture.sharpness, picture.grain, index))

    def find_duplicates(self) -> None:
        """To be called once all images are added."""
        same = defaultdict(list)
        for sha256, index in self._sha256:
            same[sha256].append(index)
        again = {index for group in same.values() for index in group[1:]}
        for group in same.values():
            self._add_group("duplicate", group)
        hashes = [(phash, index) for phash, index in self._phash if index not in again]
        for group in near_groups(np.array([phash for phash, _ in hashes], np.uint64), self.args.distance):
            indices = [hashes[place][1] for place in group]
            for alike in self._of_same_colors(sorted(indices, key=self._quality.get, reverse=True)):
                self._add_group("near-duplicate", alike)

    def lists(self) -> dict[str, list[tuple[str, str]]]:
        """Finding -> list of (path, remark), those asked for; then the ranks."""
        wanted = {name: self._found[name] for name in self.args.findings if self._found[name]}
        blurred = heapq.nsmallest(self.args.top, ((sharp, index) for sharp, _, index in self._ranks))
        grainy = heapq.nlargest(self.args.top, ((grain, index) for _, grain, index in self._ranks))
        wanted["rank: most blurred"] = [(index, f"sharpness {value:.0f}") for value, index in blurred]
        wanted["rank: most grainy"] = [(index, f"grain {value:.1f}") for value, index in grainy]
        return {
            name: [(self._pairs[index].image, remark) for index, remark in entries]
            for name, entries in wanted.items()
        }

    def to_move(self) -> list[Pair]:
        """The images with findings asked for, without ranks, and without the first of each group of duplicates."""
        indices = {index for name in self.args.findings for index, _ in self._found[name]}
        return [self._pairs[index] for index in sorted(indices)]

    def write_page(self, path: str) -> None:
        root, sections = self.args.data_root, []
        for name, entries in self.lists().items():
            items = []
            for image, remark in self._with_originals(name, entries):
                url = thumbnail_of(image) if len(items) < MAX_ITEMS else None
                items.append(Item(os.path.relpath(image, root), (remark,), image=url))
            sections.append(Section(name, _NOTES.get(name, ""), items, total=len(entries)))
        write_page(path, f"Images of {root}", sections)

    def _with_originals(self, name, entries):
        """Yields the entries; of duplicates, the first of each group before the others."""
        last = None
        for image, remark in entries:
            if name.endswith("duplicate") and remark != last:
                last, first = remark, remark.removeprefix("of ")
                yield os.path.join(self.args.data_root, first), "kept"
            yield image, remark

    def _of_same_colors(self, group):
        """Yields the parts of a group with about the colors of their first image; hashes are of gray levels."""
        while group:
            differences = [self._colors[index].astype(int) - self._colors[group[0]] for index in group]
            same = [np.abs(difference).mean() <= _SAME_COLORS for difference in differences]
            yield [index for index, one in zip(group, same, strict=True) if one]
            group = [index for index, one in zip(group, same, strict=True) if not one]

    def _add_group(self, name, group):
        """All but the first of a group are findings, each with the first one's name."""
        first = os.path.relpath(self._pairs[group[0]].image, self.args.data_root)
        self._found[name] += [(index, f"of {first}") for index in group[1:]]


_NOTES = {
    "duplicate": "Equal files, each group after the first of it",
    "near-duplicate": "Images of the same shapes and colors, each group after its largest and sharpest",
    "rank: most blurred": "The smallest variance of the Laplacian; flat drawings are here, too",
    "rank: most grainy": "The largest estimate of noise; fine textures are here, too",
}


def move_pair(pair: Pair, root: str, target: str, dry_run: bool) -> None:
    """Moves an image, its captions and its mask to the same relative path under `target`, over nothing that exists.

    Raises:
        OSError, ValueError: there is something of the name, or a link that would point elsewhere from there.
    """
    moves = []
    for path in filter(None, (pair.image, *pair.caption_files, mask_file(pair.image))):
        destination = os.path.join(target, os.path.relpath(path, root))
        if os.path.lexists(destination):
            raise ValueError(f"{path}: not moved, {destination} exists")
        if os.path.islink(path) and not os.path.isabs(os.readlink(path)):
            raise ValueError(f"{path}: not moved, is a link to a path relative to its folder")
        moves.append((path, destination))
    for path, destination in () if dry_run else moves:
        os.makedirs(os.path.dirname(destination), exist_ok=True)
        shutil.move(path, destination)
