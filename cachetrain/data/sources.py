"""What --train_data_dir and --val_data_dir name: folders, shard sets and freeze files, here or in object storage."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from cachetrain.atomic import atomic_write
from cachetrain.data import objects
from cachetrain.data.fetcher import start_of
from cachetrain.data.freeze import Freeze, is_freeze, read_freeze
from cachetrain.data.near import INDEX, Fetcher, Near, near_directory
from cachetrain.data.order import LANES
from cachetrain.data.shard_set import ShardSet, folder_suffix, folders_of, shard_number, shards_in
from cachetrain.data.sidecar import NULL_STEM
from cachetrain.log import counted, info, warn
from cachetrain.reading import read_bytes

if TYPE_CHECKING:
    from cachetrain.distributed import World

MAX_FREEZE = 2**32  # bytes
_THREADS = 16


class Listing(NamedTuple):
    """What a set has.

    Attributes:
        names: of its shards.
        sizes: {name: bytes} of what is in object storage, of null captions too.
        freeze: content of the freeze file, if one is given.
    """

    names: list[str]
    sizes: dict[str, int]
    freeze: bytes | None = None


class Sources:
    """The directories that a run reads from.

    Attributes:
        directories: {what a flag names: directory on this machine}.
        pinned: for each directory, the names of the shards of a set, else None; what `Sources` takes when a
            run is resumed.
        fetcher: Fetcher of this process, or None.

    Args:
        names: what the flags name.
        pinned: of the run that is resumed.

    Raises:
        ValueError, OSError: a set cannot be listed, or a shard is gone; on all ranks.
    """

    def __init__(
        self, args: Namespace, world: World, names: list[str], pinned: Sequence[list[str] | None] | None = None
    ):
        self._args = args
        self.suffixes = _suffixes(args)
        of_names = dict(zip(names, pinned, strict=True)) if pinned and len(pinned) == len(names) else {}
        self.listings = _on_all(
            world, world.main, lambda: {name: _listed(name, of_names.get(name)) for name in names}
        )
        self.listings = {name: listing for name, listing in self.listings.items() if listing is not None}
        self.pinned = [
            self.listings[name].names if name in self.listings and self.listings[name].freeze is None else None
            for name in names
        ]
        self.directories = {name: self._directory_of(name) for name in names}
        self.fetcher = None
        if world.main and (args.shard_cache or args.shard_cache_gb) and not any(map(objects.is_url, names)):
            flag = "--shard_cache" if args.shard_cache else "--shard_cache_gb"
            warn(f"{flag} does nothing: no directory is in object storage")
        if any(map(objects.is_url, names)):
            self.fetcher = _on_all(world, world.first_of_machine, self._fetch, share=False)

    def close(self) -> None:
        """Ends the fetcher."""
        if self.fetcher:
            self.fetcher.close()

    def shard_sets(self, names: list[str]) -> dict[str, ShardSet]:
        """{directory: ShardSet} of what flags name, where it is a set."""
        return {self.directories[name]: self._shard_set(name) for name in names if name in self.listings}

    def freeze(self, name: str) -> Freeze | None:
        """The content of a freeze file; None if a flag names something else, or it lists other sidecars."""
        listing = self.listings.get(name)
        if listing is None or listing.freeze is None:
            return None
        freeze = read_freeze(name, listing.freeze)
        return freeze if freeze.common["suffixes"] == list(self.suffixes) else None

    def null_directories(self) -> list[str]:
        """Where the null caption may lie: in sets beside the captions that are read."""
        folders = []
        for name, directory in self.directories.items():
            of_text = {shard.partition("/")[0] for shard in self._needed(name)} if name in self.listings else set()
            of_text = {folder for folder in of_text if folder_suffix(folder) == self._args.txtcache_suffix}
            folders += [os.path.join(directory, folder) for folder in sorted(of_text)] or [directory]
        return folders

    def keep_all(self, directories: list[str]) -> list[tuple[str, str]]:
        """(directory, name) of all shards of sets in object storage that flags name."""
        return [
            (self.directories[name], shard)
            for name in directories
            if objects.is_url(name)
            for shard in self._needed(name)
        ]

    def _directory_of(self, name):
        set_name = _set_of(name)
        if not objects.is_url(name):
            return set_name
        if not self._args.shard_cache:
            raise ValueError(f"{name}: training from object storage needs --shard_cache, a directory for its shards")
        return str(near_directory(set_name, self._args.shard_cache))

    def _shard_set(self, name):
        near = Near(self.directories[name], _set_of(name)) if objects.is_url(name) else None
        return ShardSet(self.directories[name], self.suffixes, self._needed(name), near, self.listings[name].sizes)

    def _needed(self, name):
        """The shards of the sidecars that are read."""
        return [
            shard for shard in self.listings[name].names if folder_suffix(shard.partition("/")[0]) in self.suffixes
        ]

    def _fetch(self):
        """Starts the fetcher, and copies what is needed of each set before the first shard is read."""
        urls = {self.directories[name]: name for name in self.listings if objects.is_url(name)}
        sets = {directory: _set_of(name) for directory, name in urls.items()}
        limit = self._args.shard_cache_gb
        limit = int(limit * 2**30) if limit else None
        for directory in sets:
            Path(directory).mkdir(parents=True, exist_ok=True)
        fetcher = Fetcher(sets, limit)
        try:
            self._check_room(urls.values(), limit)
            for directory, name in urls.items():
                self._copy_first(name, Path(directory), objects.open_store(sets[directory]))
        except BaseException:
            fetcher.close()
            raise
        return fetcher

    def _check_room(self, names, limit):
        """Checks that what is read at a time fits: the shards of a round, and all that --val_data_dir names."""
        window, sizes = self._args.shuffle_window, {True: [], False: []}  # whether of training -> bytes of its shards
        for name in names:
            of_name = self.listings[name].sizes
            sizes[name in self._args.train_data_dir] += [of_name[shard] for shard in self._needed(name)]
        trained = sorted(sizes[True], reverse=True)
        needed = sum(trained[: LANES * window * len(self.suffixes)] if window else trained) + sum(sizes[False])
        flag = "--shard_cache_gb"
        if limit is None:
            directories = {Path(self.directories[name]) for name in names}
            there = sum(path.stat().st_size for directory in directories for path in directory.glob("*/*.tar"))
            limit, flag = there + shutil.disk_usage(self._args.shard_cache).free, "--shard_cache"
        if needed > limit:
            what = f"a round of --shuffle_window {window}" if window else "without --shuffle_window, all of it"
            raise ValueError(
                f"{flag}: {tqdm.format_sizeof(needed, 'B')} of {', '.join(names)} are read at a time ({what}), but "
                f"there is room for {tqdm.format_sizeof(limit, 'B')}; make room, or use a window of fewer shards, at "
                "least 1"
            )

    def _copy_first(self, name, directory, store):
        """Copies the null captions, and the indexes unless there is a freeze file."""
        listing = self.listings[name]
        null = f"{NULL_STEM}{self._args.txtcache_suffix}"
        for path in (path for path in listing.sizes if path.partition("/")[2] == null):
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(directory / path, objects.read(store, path)[0])
        if listing.freeze is not None:
            return
        missing = [shard for shard in self._needed(name) if not (directory / (shard + INDEX)).exists()]

        def copy(shard):
            (directory / shard).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(directory / (shard + INDEX), start_of(store, shard))

        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in tqdm(pool.map(copy, missing), desc="indexes", total=len(missing), unit="shard", disable=None):
                pass


def _suffixes(args):
    images = args.imgcache_suffix
    images = (images,) if isinstance(images, str) else tuple(images)
    return images if args.force_txtcache else (*images, args.txtcache_suffix)


def _on_all(world, mine, call, share=True):
    """Calls a function on some ranks; its error ends all of them. `share`: all get the result of the first rank."""
    result = failure = None
    if mine:
        try:
            result = call()
        except (ValueError, OSError) as error:
            if world.ranks == 1:
                raise
            failure = error
    if failure := next(filter(None, world.gather(failure)), None):  # the other ranks wait here
        raise failure
    return world.gather(result)[0] if share else result


def _set_of(name):
    """The directory or address of the set that a flag names."""
    return os.path.dirname(name) or os.curdir if is_freeze(name) else name


def _listed(name, pinned):
    """The Listing of a shard set or a freeze file; None for a folder of sidecars."""
    set_name = _set_of(name)
    if objects.is_url(name):
        store = objects.open_store(set_name)
        sizes = {entry["path"]: entry["size"] for entry in objects.entries_in(store)}
        data = objects.read(store, os.path.basename(name))[0] if is_freeze(name) else None
        there = [path for path in sizes if path.count("/") == 1 and _is_shard(path)]
        if not there:
            raise ValueError(f"{name}: no shards there; pack a folder with cache/pack_shards.py")
    else:
        if not is_freeze(name) and not folders_of(name):
            return None
        sizes, there = {}, shards_in(set_name)
        data = read_bytes(name, MAX_FREEZE) if is_freeze(name) else None
    names = there
    if data is not None:
        names = [shard for of_number in read_freeze(name, data).shards() for shard in of_number]
        pinned = names
    elif pinned is not None:
        names = pinned
        if new := set(there) - set(pinned):
            info(f"{name}: not used: {counted(len(new), 'shard')} that were added after the run started")
    if missing := sorted(set(names) - set(there)):
        raise ValueError(
            f"{set_name}/{missing[0]}: is gone, though {'the freeze file lists it' if data else 'the run uses it'}; "
            f"put it back ({counted(len(missing), 'shard')} missing), or "
            + ("make a new freeze file" if data else "start a new run")
        )
    return Listing(names, sizes, data)


def _is_shard(path):
    folder, _, base = path.rpartition("/")
    return folder_suffix(folder) is not None and shard_number(base) is not None
