"""Files that tools are asked to write (pages, sheets, tables): over nothing but earlier ones of their own.

A mistyped or completed name can be that of an image, a caption or a sidecar, and no backup is kept.
"""

import argparse
import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from cachetrain.atomic import atomic_write
from cachetrain.reading import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

_SOFTWARE = 0x0131  # the EXIF tag
_MARK = "cachetrain sheet"
_END_BYTES = 2**16  # a mark lies within as many bytes of the beginning, or, of EXIF data in WEBP, of the end


class Output:
    """An argparse type: a file to write, of a name that is free or that of an earlier file of this kind.

    Args:
        kind: in words, for messages.
        suffixes: of which the name has one.
        mark: bytes that all files of this kind hold near their beginning or end, and hardly any others.
    """

    def __init__(self, kind: str, suffixes: tuple[str, ...], mark: bytes):
        self.kind = kind
        self.suffixes = suffixes
        self.mark = mark

    def __call__(self, text: str) -> Path:
        if not text.lower().endswith(self.suffixes):
            ends = " or ".join(self.suffixes)
            raise argparse.ArgumentTypeError(f"{text!r}: expected a file name that ends with {ends}")
        try:
            if not self._may_replace(text):
                raise argparse.ArgumentTypeError(
                    f"{text} exists, and is no {self.kind} that these tools wrote; choose another name, or delete it"
                )
        except FileNotFoundError:
            pass
        except OSError as error:
            raise argparse.ArgumentTypeError(f"{text}: {error.strerror}; choose another name") from error
        return Path(text)

    def _may_replace(self, path):
        with open_regular(path) as file:
            ends = file.read(_END_BYTES)
            file.seek(max(0, os.fstat(file.fileno()).st_size - _END_BYTES))
            ends += file.read(_END_BYTES)
        return not ends or self.mark in ends


page = Output("page", (".html",), b'<meta name="generator" content="cachetrain">')
sheet = Output("sheet", (".png",), _MARK.encode())
grid = Output("sheet", (".png", ".jpg", ".jpeg", ".webp"), _MARK.encode())
counts = Output("table of counts", (".csv",), b"folder,tag,count\r\n")
scores = Output("list of scores", (".json",), b'{\n "trained": {')
norm = Output("file of --norm", (".json",), b'{\n "scaling_factor": ')
single_file = Output("single file", (".safetensors",), b'"objective":"')  # of a model, or of an adapter


def check_apart(flag: str, out: str, root: str) -> None:
    """Checks that neither of a folder to write and --data_root lies in the other.

    Raises:
        ValueError: one does; `flag` names the first.
    """
    paths = [os.path.realpath(path) for path in (root, out)]
    if os.path.commonpath(paths) in paths:
        raise ValueError(f"{flag} {out}: must be apart from --data_root {root}")


def save_sheet(image: "Image", path: str | os.PathLike, **settings) -> None:
    """Writes a picture that `sheet` and `grid` recognize, a PNG with `settings` as text chunks; makes its directory.

    Raises:
        OSError, ValueError: it cannot be written, or is too large for the format of this suffix.
    """
    from PIL.Image import Exif, registered_extensions
    from PIL.PngImagePlugin import PngInfo

    exif, info, data = Exif(), PngInfo(), BytesIO()
    exif[_SOFTWARE] = _MARK
    for key, value in settings.items():
        info.add_itxt(key, str(value))
    image.save(data, registered_extensions()[Path(path).suffix.lower()], exif=exif, pnginfo=info)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, data.getvalue())
