"""Lists the pairs that a run's flags name, split into training and validation pairs that share no folder."""

from __future__ import annotations

import hashlib
import os
import shlex
from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cachetrain.data import rng
from cachetrain.data.frozen import FrozenIndex
from cachetrain.data.headers import check_same_run
from cachetrain.data.index import PairIndex, places_of
from cachetrain.data.saved_index import IndexFiles
from cachetrain.data.sources import Sources
from cachetrain.data.unused import MULTIPLY, repeats_in_name
from cachetrain.log import counted, info, warn

if TYPE_CHECKING:
    from cachetrain.distributed import World


def open_index(
    args: Namespace, world: World, pinned: Sequence[list[str] | None] | None = None, save_index: bool = False
) -> tuple[PairIndex, PairIndex | None, Sources]:
    """Lists the pairs that the trainer's flags name. The ranks of a machine share one list in memory.

    Args:
        pinned: of the Sources of the run that is resumed.
        save_index: write index files.

    Returns:
        (training pairs, validation pairs or None, where they come from).
    """
    val_dirs = args.val_data_dir or []
    sources = Sources(args, world, [*args.train_data_dir, *val_dirs], pinned)
    try:
        return *_open_indexes(args, world, sources, IndexFiles(save_index and world.main)), sources
    except BaseException:
        sources.close()
        raise


def _open_indexes(args, world, sources, index_files):
    suffixes, names, val_dirs = (args.imgcache_suffix, args.txtcache_suffix), args.train_data_dir, args.val_data_dir
    every_size = args.sizes == "all"
    index, freeze = None, sources.freeze(names[0]) if len(names) == 1 else None
    if freeze and not (args.val_split or args.overfit):
        (shard_set,) = sources.shard_sets(names).values()
        index = FrozenIndex(freeze, shard_set, (args.dir_weights or [1.0])[0], every_size)
    index = index or PairIndex(
        [sources.directories[name] for name in names],
        *suffixes,
        args.dir_weights,
        args.force_txtcache,
        world,
        kohya_repeats=args.kohya_repeats,
        every_size=every_size,
        sets=sources.shard_sets(names),
        index_files=index_files,
    )
    if world.main:
        _warn_of_what_is_listed(index)
    shared = world.share if not isinstance(index, FrozenIndex) else lambda make, _: make()
    if args.val_split or args.overfit or not val_dirs:
        return shared(lambda: _parts(index, args), places_of(index.directories))
    directories, sets = [sources.directories[name] for name in val_dirs], sources.shard_sets(val_dirs)
    held_out = PairIndex(
        directories, *suffixes, one_text=args.force_txtcache, world=world, sets=sets, index_files=index_files
    )
    if sources.fetcher:
        sources.fetcher.keep(sources.keep_all(val_dirs))
    for path, header in held_out.image_headers.items():
        check_same_run(index.image_header, header, index.image_path(0), path, may_differ="settings")
    check_same_run(index.text_header, held_out.text_header, index.text_path(0), held_out.text_path(0))
    check_apart(index, held_out)
    return shared(lambda: (index, held_out), places_of([*index.directories, *directories]))


def _parts(index, args):
    """(training pairs, validation pairs or None) of the pairs of --train_data_dir."""
    if args.overfit:
        pairs = np.sort(rng.permutation(args.seed, 0, index.num_pairs)[: args.overfit])
        return index.subset(index.samples_of(pairs)), None
    return split_index(index, args.val_split) if args.val_split else (index, None)


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
    validation_folders = {os.path.realpath(folder): folder for folder in val_index.folders()}
    for folder in index.folders():
        if (real_path := os.path.realpath(folder)) in validation_folders:
            raise ValueError(
                f"--val_data_dir: {validation_folders[real_path]} is also trained on, as {folder} of "
                "--train_data_dir; move the validation pairs to a separate folder, or use --val_split"
            )
    for linking, other in ((index, val_index), (val_index, index)):
        folders = set(map(os.path.realpath, other.folders()))
        linked = {image for image, _ in other.links.targets}
        for image, _ in linking.links.targets:
            if os.path.dirname(image) in folders or image in linked:
                raise ValueError(
                    f"--val_data_dir: {image} is validated and trained on, through a link in "
                    f"{'--train_data_dir' if linking is index else '--val_data_dir'}; remove the link, or use "
                    "--val_split"
                )


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
