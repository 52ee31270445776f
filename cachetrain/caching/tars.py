"""Reads tars of samples as img2dataset and webdataset write them: 00012.tar with `a.jpg`, `a.txt` and `a.json`."""

from __future__ import annotations

import io
import tarfile

from cachetrain.caching.samples import Samples, is_image


class OpenTar(Samples):
    """A tar in memory. Of two members of one name the last one counts, as for `tar xf`.

    Raises:
        ValueError: it is damaged, not whole, compressed, or holds no images.
    """

    def __init__(self, where: str, data: bytes):
        self._data = data
        self._places = {}  # path -> (offset, size)
        files, faults = {}, []
        for member in _members(where, data):
            name = member.name.removeprefix("./")
            stem, suffix = _split(name)
            if not member.isfile() or member.issparse():
                if stem and is_image(suffix):
                    faults.append((f"{where}#{name}", "is no plain file in the tar, but a link or sparse"))
            elif stem:
                files[stem, suffix] = None
                self._places[f"{where}#{name}"] = member.offset_data, member.size
        super().__init__(where, files, faults)

    def read(self, path: str) -> bytes:
        offset, size = self._places[path]
        return self._data[offset : offset + size]


def _members(where, data):
    """Yields the TarInfo of each member; raises ValueError if the tar is not whole."""
    if data.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
        raise ValueError(f"{where}: is compressed; unpack it to a plain tar")
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            yield from tar
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
