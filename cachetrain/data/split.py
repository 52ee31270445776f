"""Lists the pairs that a run's flags name, split into training and validation pairs that share no folder."""

from __future__ import annotations

import hashlib
import os
import shlex
from argparse import Namespace
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from cachetrain.data import rng
from cachetrain.data.headers import check_same_run
from cachetrain.data.index import PairIndex
from cachetrain.data.near import fetch_set, near_directory
from cachetrain.data.objects import is_url
from cachetrain.data.saved_index import IndexFiles
from cachetrain.data.unused import MULTIPLY, repeats_in_name
from cachetrain.log import counted, info, warn

if TYPE_CHECKING:
    from cachetrain.distributed import World


def open_index(args: Namespace, world: World, save_index: bool = False) -> tuple[PairIndex, PairIndex | None]:
    """Lists the pairs that the trainer's flags name; returns (training pairs, validation pairs or None).

    The ranks of a machine share one list in memory.

    Args:
        save_index: write index files.
    """
    suffixes, index_files = (args.imgcache_suffix, args.txtcache_suffix), IndexFiles(save_index and world.main)
    index = PairIndex(
        [near(directory, args, world) for directory in args.train_data_dir],
        *suffixes,
        args.dir_weights,
        args.force_txtcache,
        world,
        kohya_repeats=args.kohya_repeats,
        every_size=args.sizes == "all",
        index_files=index_files,
    )
    if world.main:
        _warn_of_what_is_listed(index)
    if args.val_split or args.overfit or not args.val_data_dir:
        return world.share(lambda: _parts(index, args), index.places)
    directories = [near(directory, args, world) for directory in args.val_data_dir]
    held_out = PairIndex(directories, *suffixes, one_text=args.force_txtcache, world=world, index_files=index_files)
    for path, header in held_out.image_headers.items():
        check_same_run(index.image_header, header, index.image_path(0), path, may_differ="settings")
    check_same_run(index.text_header, held_out.text_header, index.text_path(0), held_out.text_path(0))
    check_apart(index, held_out)
    return world.share(lambda: (index, held_out), (index.places, held_out.places))


def _parts(index, args):
    """(training pairs, validation pairs or None) of the pairs of --train_data_dir."""
    if args.overfit:
        pairs = np.sort(rng.permutation(args.seed, 0, index.num_pairs)[: args.overfit])
        return index.subset(index.samples_of(pairs)), None
    return split_index(index, args.val_split) if args.val_split else (index, None)


def near(directory: str, args: Namespace, world: World) -> str:
    """Returns the directory, or that of its copy in --shard_cache, once the first rank of this machine has made it.

    Raises:
        ValueError, OSError: of near.fetch_set; on all ranks.
    """
    if not is_url(directory):
        return directory
    if not args.shard_cache:
        raise ValueError(f"{directory}: training from object storage needs --shard_cache, a directory for its shards")
    failure = None
    if world.first_of_machine:
        images = args.imgcache_suffix
        suffixes = {images} if isinstance(images, str) else set(images)
        suffixes |= set() if args.force_txtcache else {args.txtcache_suffix}
        try:
            fetch_set(directory, args.shard_cache, suffixes)
        except (ValueError, OSError) as error:
            if world.ranks == 1:
                raise
            failure = error
    if failure := next(filter(None, world.gather(failure)), None):  # the other ranks wait here
        raise failure
    return str(near_directory(directory, args.shard_cache))


def split_positions(names: Iterable[str], share: float) -> np.ndarray:
    """Selects the names to validate on: those whose hash, scaled to [0, 1), is below `share`.

    A name's hash alone decides, so adding or removing other names never moves a name to the other side.

    Args:
        share: about how large a part of the names is selected, in (0, 1).

    Returns:
        bool [N], True for validation.
    """
    limit = share * 2**64
    hashes = (hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in names)
    return np.fromiter((int.from_bytes(digest, "big") < limit for digest in hashes), bool)


def split_index(index: PairIndex, share: float) -> tuple[PairIndex, PairIndex]:
    """Splits an index by the names of its pairs; returns (training pairs, validation pairs).

    Raises:
        ValueError: one side would be empty.
    """
    validates = split_positions((index.relative_name(i) for i in range(len(index))), share)
    if not 0 < validates.sum() < len(index):
        number = validates.sum() // index.sizes
        raise ValueError(
            f"--val_split {share}: selects {number} of {counted(index.num_pairs, 'pair')}, expected some but not "
            "all; use another share, more data, or --val_data_dir"
        )
    return index.subset(np.flatnonzero(~validates)), index.subset(np.flatnonzero(validates))


def check_apart(index: PairIndex, val_index: PairIndex) -> None:
    """Checks that no folder or linked file is used for both training and validation; symbolic links are resolved.

    Raises:
        ValueError: a folder or file of --val_data_dir is also trained on.
    """
    validation_folders = {os.path.realpath(folder): folder for folder in _folders(val_index)}
    for folder in _folders(index):
        if (real_path := os.path.realpath(folder)) in validation_folders:
            raise ValueError(
                f"--val_data_dir: {validation_folders[real_path]} is also trained on, as {folder} of "
                "--train_data_dir; move the validation pairs to a separate folder, or use --val_split"
            )
    for linking, other in ((index, val_index), (val_index, index)):
        folders = set(map(os.path.realpath, _folders(other)))
        linked = {image for image, _ in other.links.targets}
        for image, _ in linking.links.targets:
            if os.path.dirname(image) in folders or image in linked:
                raise ValueError(
                    f"--val_data_dir: {image} is validated and trained on, through a link in "
                    f"{'--train_data_dir' if linking is index else '--val_data_dir'}; remove the link, or use "
                    "--val_split"
                )


def _folders(index):
    """The distinct folders of an index's pairs, sorted."""
    return sorted({os.path.dirname(index.stem(i)) for i in range(len(index))})


def _warn_of_what_is_listed(index):
    """Warns of what a user may not expect in the list of pairs, or miss there."""
    pairs = counted(index.num_pairs, "pair")
    if index.num_foreign:
        warn(f"the caches of {index.num_foreign} of {pairs} have no header and cannot be verified")
    if index.num_unpaired:
        suffixes = " + ".join((*index.image_suffixes, index.text_suffix))
        warn(f"not used: {counted(index.num_unpaired, 'sidecar')} without a partner ({suffixes})")
    if index.num_without_image:
        roots = shlex.join(word for directory in index.directories for word in ("--data_root", directory))
        warn(
            f"no image beside {index.num_without_image} of {pairs}, which train all the same; if the images were "
            f"deleted: cache/cache_status.py {roots} --prune"
        )
    if index.num_without_pair:
        without = counted(index.num_without_pair, "image")
        info(f"not used: {without} without both caches; cache/cache_status.py lists what is missing")
    if index.links.num_repeated:
        info(f"listed again through links, and counted once: {counted(index.links.num_repeated, 'pair')}")
    if index.num_with_variants:
        info(
            f"captions of {index.num_with_variants} of {pairs} have variants: each visit draws one; validation and "
            "samples use the first, the caption as written"
        )
    if index.num_alone:
        info(f"in directories of sidecars alone, without images: {index.num_alone} of {pairs}")
    folders = index.numbered_folders
    numbered = counted(len(folders), "folder")
    if folders and index.kohya_repeats:
        first = f"{folders[0]}: {repeats_in_name(folders[0]):g}"
        info(f"--kohya_repeats: repeats {numbered} by the number in the name, the first {first}")
    elif folders:
        warn(
            f"not used: the number in front of {numbered}, the first {folders[0]}; to repeat the "
            f"images, pass --kohya_repeats, or write the number into a {MULTIPLY} there"
        )
