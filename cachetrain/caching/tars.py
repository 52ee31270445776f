"""Reads tars of samples as img2dataset and webdataset write them: 00012.tar with `a.jpg`, `a.txt` and `a.json` each.

The members of a sample share their name up to the first dot of its last part. A tar is read whole, so that what
happens to it later changes nothing: a tar that cannot be read fails as a whole, and none of its rows is left out.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from typing import NamedTuple

from cachetrain.data import objects
from cachetrain.data.captions import CAPTION_SUFFIXES, MAX_CAPTION, Caption, Pair
from cachetrain.data.variants import Captions, CaptionSettings, captions_of
from cachetrain.data.walk import IMAGE_SUFFIXES
from cachetrain.log import counted
from cachetrain.reading import decoded, json_object, read_with_stat

MAX_TAR = 2**36  # bytes; more are not read

_TAR = re.compile(r"(?:.*[^0-9])?(?P<number>[0-9]+)\.tar")
_JSON = ".json"


class InputTar(NamedTuple):
    """A tar in a listing.

    Attributes:
        where: its path or address.
        state: its ETag, or size and modification time: another one counts as another content.
    """

    number: int
    name: str
    where: str
    state: str

    @property
    def content(self) -> tuple[str, str]:
        """What says which content the tar has, for the name of its shard."""
        return self.name, self.state


class InputTars:
    """The tars in a directory or in object storage.

    Attributes:
        tars: list of InputTar, sorted by number.

    Raises:
        ValueError: there are none, or two of one number.
        OSError: they cannot be listed.
    """

    def __init__(self, where: str):
        self.store = objects.open_store(where) if objects.is_url(where) else None
        root = where.rstrip("/")
        self.tars = []
        for name, state in sorted((_remote_states if self.store else _local_states)(self.store or root)):
            if match := _TAR.fullmatch(name):
                self.tars.append(InputTar(int(match["number"]), name, f"{root}/{name}", state))
        if not self.tars:
            raise ValueError(f"{where}: no tars like 00000.tar; omit --out to cache a folder of images")
        self.tars.sort()
        for first, second in zip(self.tars, self.tars[1:], strict=False):
            if first.number == second.number:
                raise ValueError(f"{first.where} and {second.where} have one number; give each tar its own")

    def open(self, tar: InputTar) -> OpenTar:
        """Reads a tar.

        Raises:
            OSError: it cannot be read, or has changed since it was listed.
            ValueError: it is damaged, not whole, or holds no images.
        """
        if self.store is None:
            data, stat = read_with_stat(tar.where, MAX_TAR)
            state = _file_state(stat)
        else:
            data, entry = objects.read(self.store, tar.name)
            state = _object_state(entry)
        if state != tar.state:
            raise OSError(f"{tar.where}: has changed since it was listed; run again")
        return OpenTar(tar.where, data)


def _local_states(root):
    with os.scandir(root) as entries:
        return [(entry.name, _file_state(entry.stat())) for entry in entries if entry.is_file()]


def _remote_states(store):
    return [(entry["path"], _object_state(entry)) for entry in objects.entries_in(store)]


def _file_state(stat):
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _object_state(entry):
    return entry["e_tag"] or f"{entry['size']} {entry['last_modified'].isoformat()}"


class OpenTar:
    """A tar in memory.

    Attributes:
        pairs: list of Pair, those samples that have an image; their paths are those of members, `00012.tar#a.jpg`.
            The caption is in a.txt, else in a.caption, else in "caption" of a.json.
    """

    def __init__(self, where: str, data: bytes):
        self.where = where
        self._data = data
        self._members = {}  # path -> (offset, size)
        samples = {}  # name -> {suffix: path}
        for name, *place in _members(where, data):
            self._members[path := f"{where}#{name}"] = place
            stem, suffix = _split(name)
            if stem:
                samples.setdefault(stem, {})[suffix.lower()] = path
        self.pairs = list(filter(None, map(_pair, samples.values())))
        if not self.pairs:
            raise ValueError(f"{where}: holds no images")

    def name(self, pair: Pair) -> str:
        """The name of a sample: that of its members without a suffix."""
        return os.path.splitext(pair.image)[0][len(self.where) + 1 :]

    def read(self, path: str) -> bytes:
        """The bytes of a member."""
        offset, size = self._members[path]
        return self._data[offset : offset + size]

    def captions(self, pair: Pair, settings: CaptionSettings) -> Captions:
        """The captions of a sample.

        Raises:
            ValueError: there is none, it is not UTF-8 text or has more than MAX_CAPTION bytes, or there are too many.
        """
        path = pair.caption_file
        if path is None:
            raise ValueError(f"{pair.image}: has no caption, neither .txt nor .json in the tar")
        data = self.read(path)
        if len(data) > MAX_CAPTION:
            raise ValueError(f"{path}: has {counted(len(data), 'byte')}, expected at most {MAX_CAPTION:,}")
        text = decoded(path, data)
        if path.lower().endswith(_JSON):
            text = json_object(path, text).get("caption")
            if not isinstance(text, str):
                raise ValueError(f'{path}: has no text under "caption"')
        # Not the member's time: the same sample in another tar gives the same sidecar.
        return captions_of(pair, [Caption(text.strip(), str(len(data)), "0")], settings)


def _members(where, data):
    """Yields (name, offset, size) of the regular files in a tar; raises ValueError if it is not whole."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.isfile() and not member.issparse():
                    yield member.name.removeprefix("./"), member.offset_data, member.size
            end = tar.offset
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{where}: is no whole tar ({error}); copy or download it again") from error
    # tarfile takes a damaged header for the end, and the end of a file, too.
    if data[end : end + tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"{where}: is no whole tar (it has no end); copy or download it again")


def _split(name):
    """`a/b.c.jpg` -> `a/b`, `.c.jpg`; `` for hidden files."""
    folder, _, base = name.rpartition("/")
    stem = base.partition(".")[0]
    return (f"{folder}/{stem}" if folder and stem else stem), base[len(stem) :]


def _pair(members):
    """The Pair of a sample {suffix: path}; None without an image."""
    images = [path for suffix, path in members.items() if suffix in IMAGE_SUFFIXES]
    captions = [members[suffix] for suffix in (*CAPTION_SUFFIXES, _JSON) if suffix in members]
    return Pair(images[0], captions[0] if captions else None) if images else None
