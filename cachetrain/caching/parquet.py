"""Reads parquet files of samples as img2dataset and Hugging Face's datasets write them, a row for each image.

The columns of a row are taken as the files of a sample in a tar: a.jpg or a.image, a.txt, a.mask.png. Images and
masks are bytes, or structs of bytes and path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cachetrain.caching.samples import ANY_IMAGE, Samples
from cachetrain.data.masks import MASK_SUFFIX
from cachetrain.data.variants import Captions, CaptionSettings
from cachetrain.log import counted

# The names of columns; the first one that is there counts.
_IMAGES = {"jpg": ".jpg", "jpeg": ".jpeg", "png": ".png", "webp": ".webp", "image": ANY_IMAGE}
_CAPTIONS = ("caption", "text", "txt")
_KEYS = ("key", "__key__")
_MASKS = ("mask",)

_BATCH = 256  # rows that are taken out of a row group at a time


class OpenParquet(Samples):
    """A parquet file in memory. Rows without an image are ignored: downloads that failed.

    Args:
        number: of the file; rows without a key are named by it and their place, as `00012_000345`.

    Raises:
        ValueError: it is damaged, or holds no images; or pyarrow is not installed.
    """

    def __init__(self, where: str, data: bytes, number: int):
        self._contents = {}  # path -> bytes
        self._lists = {}  # path of a list of captions -> their number
        files, faults, names = [], [], set()
        for place, (key, image, caption, mask, suffix) in enumerate(_rows(where, data)):
            name = f"{number:05d}_{place:06d}" if key is None else key
            if image is None:
                continue
            if name in names:
                faults.append((f"{where}#{name}{suffix}", f"row {place} has the key of another row"))
                continue
            names.add(name)
            if isinstance(caption, list):
                self._lists[f"{where}#{name}.txt"] = len(caption)
                caption = b"\n".join(b" ".join((one or b"").splitlines()) for one in caption)
            for one, content in {suffix: image, ".txt": caption, MASK_SUFFIX: mask}.items():
                if content is not None:
                    files.append((name, one))
                    self._contents[f"{where}#{name}{one}"] = content
        super().__init__(where, files, faults)

    def read(self, path: str) -> bytes:
        return self._contents[path]

    def captions(self, pair, settings: CaptionSettings) -> Captions:
        number = self._lists.get(pair.caption_file, 1)
        if number > 1 and "lines" not in settings.captions:
            raise ValueError(
                f"{pair.image}: has {counted(number, 'caption')}; pass --captions lines to encode all of them"
            )
        return super().captions(pair, settings)


def check_installed(where: str) -> None:
    """Checks that parquet files can be read; `where` says which, in the error message.

    Raises:
        ValueError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(f"{where}: parquet needs pyarrow; run `pip install -e .[parquet]`") from None


def has_images(where: str, data: bytes) -> bool:
    """Whether a parquet file has a column of images; `data`: the end of the file, with its footer.

    Raises:
        ValueError: it is damaged, or pyarrow is not installed.
    """
    with _opened(where, data) as file:
        return bool(_columns(file.schema_arrow)[1])


def _rows(where, data) -> Iterator[tuple]:
    """Yields (key, image, caption, mask, suffix of the image) of each row; what a row lacks is None."""
    with _opened(where, data) as file:
        columns = _columns(file.schema_arrow)
        if columns[1] is None:
            found, expected = map(", ".join, (file.schema_arrow.names, _IMAGES))
            raise ValueError(f"{where}: has no column of image bytes, found {found}; expected one of {expected}")
        # Not all of a row group at once: its columns are in memory twice meanwhile.
        for batch in file.iter_batches(_BATCH, columns=[*filter(None, columns)], use_threads=False):
            values = [_values(batch, name) for name in columns]
            for key, *rest in zip(*values, strict=True):
                yield (_text(key), *rest, _IMAGES[columns[1]])


def _columns(schema):
    """The names of the columns of (key, image, caption, mask); None: there is none."""
    from pyarrow import types

    def is_bytes(kind):
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        return types.is_binary(kind) or types.is_large_binary(kind)

    def is_text(kind):
        if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
            kind = kind.value_type
        return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or is_bytes(kind)

    def first(names, is_right):
        return next((name for name in names if name in schema.names and is_right(schema.field(name).type)), None)

    return [
        first(_KEYS, lambda _: True),
        first(_IMAGES, is_bytes),
        first(_CAPTIONS, is_text),
        first(_MASKS, is_bytes),
    ]


def _values(batch, name):
    """The values of a column, texts in bytes; None: of a column that is not there."""
    import pyarrow
    from pyarrow import compute, types

    if name is None:
        return [None] * len(batch)
    column = batch.column(name)
    if types.is_struct(column.type):
        column = compute.struct_field(column, "bytes")
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_list(column.type) or types.is_large_list(column.type):
        column = column.cast(pyarrow.large_list(pyarrow.large_binary()))
    elif types.is_string(column.type) or types.is_large_string(column.type) or types.is_string_view(column.type):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()


def _text(key):
    """The name of a sample of this key; bytes that are no UTF-8 remain, as in names of files."""
    return key.decode("utf-8", "surrogateescape") if isinstance(key, bytes) else None if key is None else str(key)


@contextmanager
def _opened(where, data):
    """Opens the bytes of a parquet file; what is wrong with them is a ValueError that names it."""
    check_installed(where)
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(pyarrow.BufferReader(data), page_checksum_verification=True) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{where}: is no whole parquet file ({reason}); copy or download it again") from error
