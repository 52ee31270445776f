"""The list of all (image sidecar, text sidecar) pairs, as arrays that loader workers share."""

import copy
import json
import os
import zlib
from bisect import bisect_right
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cachetrain.data import rng
from cachetrain.data.many_files import PackedStrings, in_threads
from cachetrain.data.sidecar import NULL_STEM, RUN_KEYS, SUFFIXES, read_header
from cachetrain.data.split import check_apart, split_index
from cachetrain.data.walk import walk_folders
from cachetrain.log import warn
from cachetrain.modeling.conditioning import check_shapes

MULTIPLY = "multiply.txt"


class PairIndex:
    """Pairs under some directories; what their headers say; no per-pair Python object.

    Attributes:
        shapes: distinct latent shapes (C, h, w); `shape_ids` uint16 [N] points into them.
        tokens: uint16 [N], text length in tokens.
        text_widths: {name of each text tensor: its width D}.
        repeats: float32 [N], how often each pair comes up in an epoch, on average.
        image_header, text_header: of the first pair.
        num_unpaired: sidecars without a partner; num_foreign: pairs with a cache that has no header.
    """

    def __init__(self, directories, image_suffix, text_suffix, repeats=None, one_text=None, world=None):
        """Walks `directories` and reads every header once; with several ranks, each its share of them.

        Args:
            repeats: for each directory, how often its pairs come up in an epoch; default 1. Multiplied by the number
                in the nearest multiply.txt in or above a pair's folder, up to the directory.
            one_text: path of the one text sidecar that goes with every image; other text sidecars are not looked at.
            world: World, when several ranks read together.

        Raises:
            ValueError: no pairs; unreadable, foreign-shaped or mixed caches (two differing files are named).
        """
        self.image_suffix = image_suffix
        self.text_suffix = text_suffix
        self.one_text = one_text
        self.directories = [os.fspath(directory) for directory in directories]
        self.num_unpaired = 0
        self._stems, self._starts, self._positions, folder_repeats = PackedStrings(), [], None, []
        for directory, number in zip(self.directories, repeats or [1.0] * len(self.directories), strict=True):
            self._starts.append(len(self._stems))
            for multiple, stems in self._folders(directory):
                for stem in stems:
                    self._stems.append(stem)
                folder_repeats.append((number * multiple, len(stems)))
            if len(self._stems) == self._starts[-1]:
                wanted = f"*{image_suffix}" + ("" if one_text else f" and *{text_suffix}")
                raise ValueError(f"{directory}: no pairs of {wanted}; run the cache scripts on it first")
        self.repeats = np.repeat(*(np.array(column) for column in zip(*folder_repeats, strict=True)))
        self.repeats = self.repeats.astype(np.float32)
        self._check_repeats()
        self._read_headers(world)

    def __len__(self):
        return len(self._stems) if self._positions is None else len(self._positions)

    @property
    def samples_per_epoch(self):
        """Samples of an epoch, a float: fractions of a pair's repeats are drawn anew in each."""
        return float(self.repeats.sum(dtype=np.float64))

    def subset(self, positions):
        """Returns a PairIndex of the pairs at `positions` (int array), which shares this one's paths.

        Raises:
            ValueError: none of the pairs ever comes up.
        """
        part = copy.copy(self)
        part._positions = np.asarray(positions) if self._positions is None else self._positions[positions]
        for name in ("shape_ids", "tokens", "repeats"):
            setattr(part, name, getattr(self, name)[positions])
        part._check_repeats()
        return part

    def stem(self, i):
        """Path of pair `i` without a suffix."""
        return self._stems[i if self._positions is None else int(self._positions[i])]

    def relative_name(self, i):
        """Path of pair `i` without a suffix, seen from its data directory."""
        place = i if self._positions is None else int(self._positions[i])
        return os.path.relpath(self._stems[place], self.directories[bisect_right(self._starts, place) - 1])

    def checksum(self):
        """A number that tells lists of pairs apart: names in their data directories, order, sizes, repeats, encoders.

        A second for a million pairs.
        """
        total, directory = 0, -1
        for place, stem in enumerate(self._stems):
            directory += directory + 1 < len(self._starts) and place == self._starts[directory + 1]
            total = zlib.crc32(os.fsencode(stem[len(self.directories[directory]) :].lstrip(os.sep)), total)
        positions = [] if self._positions is None else [np.asarray(self._positions, np.int64)]
        for array in (*positions, self.shape_ids, self.tokens, self.repeats):
            total = zlib.crc32(np.ascontiguousarray(array).tobytes(), total)
        encoders = repr((self.shapes, self.image_header.run_identity, self.text_header.run_identity))
        return zlib.crc32(encoders.encode(), total)

    @property
    def image_settings(self):
        """The settings that made the image caches, as a dict; {} where they are not recorded."""
        return json.loads(self.image_header.metadata.get("settings") or "{}")

    @property
    def text_settings(self):
        """The settings that made the text caches, as a dict; {} where they are not recorded."""
        return json.loads(self.text_header.metadata.get("settings") or "{}")

    @property
    def text_kind(self):
        """A key of conditioning.KINDS. Headerless caches go by their suffix; another suffix stands for T5."""
        kinds = {suffix: kind for kind, suffix in SUFFIXES.items()}
        return self.text_header.metadata.get("kind") or kinds.get(self.text_suffix, "txt_t5cache")

    def image_path(self, i):
        return self.stem(i) + self.image_suffix

    def text_path(self, i):
        return self.one_text or self.stem(i) + self.text_suffix

    def _check_repeats(self):
        if len(self.repeats) and self.samples_per_epoch < 1:
            raise ValueError(
                f"an epoch of {len(self.repeats)} pairs has {self.samples_per_epoch:g} samples; check --repeats, "
                f"--train_data_dir DIR:REPEATS and {MULTIPLY}"
            )

    def _folders(self, directory):
        """Yields (the number in multiply.txt that counts there, paths without suffix that have both sidecars, sorted)
        of each folder; counts sidecars without a partner."""
        if not Path(directory).is_dir():
            raise ValueError(f"{directory}: no such directory")
        wanted = (self.image_suffix, self.text_suffix)
        multiples = {}  # of the folders whose number is not 1, by path
        for folder, names in walk_folders(
            directory, set(), lambda name: name == MULTIPLY or name.endswith(wanted), _warn_of_skipped_folder
        ):
            multiple = multiples.get(os.path.dirname(folder), 1.0)
            if MULTIPLY in names:
                multiple = _read_multiple(os.path.join(folder, MULTIPLY))
            if multiple != 1.0:
                multiples[os.path.dirname(os.path.join(folder, ""))] = multiple
            yield multiple, self._paired(folder, names)

    def _paired(self, folder, names):
        image_suffix, text_suffix = self.image_suffix, self.text_suffix
        images = {name.removesuffix(image_suffix) for name in names if name.endswith(image_suffix)}
        texts = {name.removesuffix(text_suffix) for name in names if name.endswith(text_suffix)}
        texts.discard(NULL_STEM)
        if self.one_text:
            texts = images
        self.num_unpaired += len(images ^ texts)
        return [os.path.join(folder, stem) for stem in sorted(images & texts)]

    def _read_headers(self, world):
        shapes, self.num_foreign = {}, 0
        rank, ranks = (world.rank, world.ranks) if world else (0, 1)
        self.shape_ids, self.tokens = np.zeros(len(self), np.uint16), np.zeros(len(self), np.uint16)
        self.image_header, self.text_header = self._headers(0)
        _, self.text_widths = check_shapes(self.text_kind, self.text_path(0), self.text_header.shapes)
        firsts = [self._headers(start)[0] for start in self._starts]
        for start, image in zip(self._starts, firsts, strict=True):  # another directory may hold another size
            self._check_image(0, self.image_header, start, image, may_differ="settings")
        pairs = in_threads(self._headers, range(rank, len(self), ranks))
        total = len(range(rank, len(self), ranks))
        for i, (image, text) in tqdm(
            pairs, desc="headers", total=total, unit="pair", disable=None if not rank else 1
        ):
            directory = bisect_right(self._starts, i) - 1
            if image.run_identity != firsts[directory].run_identity:
                self._check_image(self._starts[directory], firsts[directory], i, image)
            if text.run_identity != self.text_header.run_identity:
                check_same_run(self.text_header, text, self.text_path(0), self.text_path(i))
            self.tokens[i], widths = check_shapes(self.text_kind, self.text_path(i), text.shapes)
            if widths != self.text_widths:
                raise ValueError(
                    f"{self.text_path(i)}: its tensors are {widths} wide, those of {self.text_path(0)} "
                    f"{self.text_widths}; encode both with one model"
                )
            self.shape_ids[i] = shapes.setdefault(image.shapes["latent"], len(shapes))
            self.num_foreign += image.foreign or text.foreign
        self.shapes = list(shapes)
        if ranks > 1:
            self._merge(world)

    def _merge(self, world):
        """Puts together what each rank read of its share, and makes sure that all ranks list the same pairs."""
        of_this_rank = (len(self), self.stem(0), self._stems.checksum(), self.shapes, self.num_foreign)
        others = world.gather(of_this_rank)
        if len({other[:3] for other in others}) > 1:
            listed = "; ".join(f"{number} from {first} on" for number, first, *_ in others)
            raise ValueError(f"the ranks list different pairs: {listed}; wait until the cache scripts are done")
        shapes = sorted({shape for other in others for shape in other[3]})
        share = slice(world.rank, None, world.ranks)
        places = np.array([shapes.index(shape) for shape in self.shapes] or [0], np.uint16)
        self.shape_ids[share] = places[self.shape_ids[share]]
        self.shapes, self.num_foreign = shapes, sum(other[4] for other in others)
        for name in ("shape_ids", "tokens"):  # each rank's array is 0 outside its share
            setattr(self, name, world.sum_array(getattr(self, name)))

    def _check_image(self, first, first_header, other, other_header, may_differ=None):
        paths = self.image_path(first), self.image_path(other)
        check_same_run(first_header, other_header, *paths, may_differ=may_differ)

    def _headers(self, i):
        """Headers of the image and of the text sidecar of pair `i`."""
        path = self.image_path(i)
        image = read_header(path)
        if len(image.shapes.get("latent", ())) != 3:
            raise ValueError(f"{path}: expected a tensor 'latent' of 3 dimensions, found {image.shapes}")
        return image, self.text_header if self.one_text and i else read_header(self.text_path(i))


def _warn_of_skipped_folder(folder, reason):
    warn(f"{folder}: {reason}; its sidecars are not used")


def _read_multiple(path):
    text = Path(path).read_text(encoding="utf-8").strip()
    try:
        multiple = float(text)
    except ValueError:
        multiple = -1.0
    if not 0 <= multiple < float("inf"):
        raise ValueError(
            f"{path}: {text[:40]!r}; expected one number, how often the images of this folder come up in an epoch"
        )
    return multiple


def null_caption_path(directories, text_suffix):
    """Path of the first `_null_caption` among the data directories, or None."""
    paths = (Path(directory) / (NULL_STEM + text_suffix) for directory in directories)
    return next((path for path in paths if path.exists()), None)


def check_same_run(first, other, first_path, other_path, *, may_differ=None):
    """Raises a ValueError that names both files where their headers say different encoders or settings.

    Args:
        may_differ: a key of RUN_KEYS.
    """
    for key, a, b in zip(RUN_KEYS, first.run_identity, other.run_identity, strict=True):
        if a != b and key != may_differ:
            raise ValueError(
                f"mixed caches: {first_path} and {other_path} differ in {key}: {a} against {b}; "
                "run the cache script again on all of them"
            )


def open_index(args, world):
    """Lists the pairs; returns (PairIndex to train on, PairIndex to validate on or None)."""
    suffixes = args.imgcache_suffix, args.txtcache_suffix
    index = PairIndex(args.train_data_dir, *suffixes, args.dir_weights, args.force_txtcache, world)
    if index.num_foreign and world.main:
        warn(f"{index.num_foreign} of {len(index)} pairs have caches without a header: they cannot be verified")
    if index.num_unpaired and world.main:
        warn(f"{index.num_unpaired} sidecars have no partner ({' + '.join(suffixes)}): not used")
    if args.overfit:
        return index.subset(np.sort(rng.permutation(args.seed, 0, len(index))[: args.overfit])), None
    if args.val_split:
        return split_index(index, args.val_split)
    if not args.val_data_dir:
        return index, None
    held_out = PairIndex(args.val_data_dir, *suffixes, one_text=args.force_txtcache, world=world)
    check_same_run(
        index.image_header, held_out.image_header, index.image_path(0), held_out.image_path(0), may_differ="settings"
    )
    check_same_run(index.text_header, held_out.text_header, index.text_path(0), held_out.text_path(0))
    check_apart(index, held_out)
    return index, held_out
