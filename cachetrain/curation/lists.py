"""Reads lists of captions, as other programs write them, row by row.

Formats: Hugging Face imagefolder (metadata.jsonl, .csv, .parquet), kohya's meta_cap.json and meta_lat.json, and the
.json beside each image of img2dataset.
"""

import argparse
import csv
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from cachetrain.data.walk import IMAGE_SUFFIXES, image_stems, is_image, walk_folders
from cachetrain.reading import open_regular

LISTS = (".jsonl", ".csv", ".parquet")
_IMAGE_KEY = "file_name"
_CSV_FIELD_BYTES = 2**24  # csv's own limit of 128 kB is below long captions with their other columns


class Row(NamedTuple):
    """One row of a list: where it stands, the image as the list names it, its caption (None: not text).

    Attributes:
        fault: why the row as a whole cannot be read.
    """

    where: str
    image: str | None
    caption: str | None
    fault: str | None = None


def caption_key(text: str) -> str:
    """An argparse type: the column or key of the captions."""
    if text == _IMAGE_KEY:
        raise argparse.ArgumentTypeError(f"{text} holds the names of the images; choose another key")
    return text


def find_lists(path: str, on_error: Callable[[str, str], None]) -> Iterator[str]:
    """Yields `path` if it is a file; of a folder all metadata.*, meta_*.json, and the .json of images.

    Raises:
        ValueError: there is nothing of this name.
    """
    if os.path.isfile(path):
        yield path
        return
    if not os.path.isdir(path):
        raise ValueError(f"{path}: no such file or directory")
    keep = (*LISTS, ".json", *IMAGE_SUFFIXES)
    for folder in walk_folders(path, set(), lambda name: name.lower().endswith(keep), on_error):
        stems = image_stems(folder.names)
        for name in folder.names:
            stem, suffix = os.path.splitext(name)
            is_list = stem == "metadata" if suffix in LISTS else stem.startswith("meta_") or stem in stems
            if is_list and not is_image(name):
                yield os.path.join(folder.path, name)


def read_rows(path: str, caption_key: str | None = None) -> Iterator[Row]:
    """Yields the rows of a list, also those without a usable image or caption.

    Args:
        caption_key: column or key of the captions; None: `text`, in .json `caption` and `tags`.

    Raises:
        OSError, ValueError: the list cannot be read, or has no column of captions.
    """
    suffix = os.path.splitext(path)[1].lower()
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet, ".json": _json}
    if suffix not in readers:
        raise ValueError(f"{path}: expected a list that ends with {', '.join(readers)}")
    try:
        yield from readers[suffix](path, caption_key)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error


def _jsonl(path, caption_key):
    key = caption_key or "text"
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _row_of(f"{path}:{number}", _parsed(line), key)


def _csv(path, caption_key):
    key = caption_key or "text"
    csv.field_size_limit(_CSV_FIELD_BYTES)
    lines = _CsvLines(_lines(path))
    rows = csv.reader(lines, strict=True)
    columns = None
    while True:
        where = f"{path}:{lines.begin_row()}"
        try:
            fields = next(rows, None)
        except csv.Error as error:
            if columns is None:
                raise ValueError(f"{where}: not CSV ({error})") from error
            lines.give_back()
            yield Row(where, None, None, f"not CSV: {error}")
            continue
        if columns is None:
            columns = fields or []
            _check_columns(path, columns, key)
        elif fields is None:
            return
        elif len(fields) > len(columns):
            yield Row(where, None, None, "more fields than columns; quote texts that hold a comma")
        elif fields:
            yield _row_of(where, dict(zip(columns, fields, strict=False)), key)


class _CsvLines:
    """The lines of a CSV, of which a row that is broken can give back all but its first."""

    def __init__(self, lines):
        self._lines = lines
        self._given_back = deque()
        self._row = []
        self._number = 1

    def __iter__(self):
        return self

    def __next__(self):
        self._row.append(self._given_back.popleft() if self._given_back else next(self._lines))
        return self._row[-1]

    def begin_row(self):
        """Returns the number of the line with which the next row begins."""
        self._number += len(self._row)
        self._row = []
        return self._number

    def give_back(self):
        self._given_back.extendleft(reversed(self._row[1:]))
        del self._row[1:]


def _parquet(path, caption_key):
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path}: needs pyarrow; run `pip install -e .[parquet]`") from None
    key, number = caption_key or "text", 0
    try:
        with open_regular(path) as raw, parquet.ParquetFile(raw) as file:
            _check_columns(path, file.schema_arrow.names, key)
            for batch in file.iter_batches(columns=[_IMAGE_KEY, key]):
                for row in batch.to_pylist():
                    number += 1
                    yield _row_of(f"{path}: row {number}", row, key)
    except arrow.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from error


def _json(path, caption_key):
    """Kohya's {image: {"caption": ..., "tags": ...}}, or img2dataset's {"caption": ...} of the image of this name."""
    content = _parsed("".join(_lines(path)))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object with an entry per image, or with the caption of one")
    if content and all(isinstance(value, dict) for value in content.values()):
        for image, entry in content.items():
            yield Row(f"{path}: {image}", image, _kohya_caption(entry, caption_key))
    else:
        caption = content.get(caption_key or "caption")
        stem = os.path.splitext(os.path.basename(path))[0]
        yield Row(path, stem, caption if isinstance(caption, str) else None)


def _kohya_caption(entry, caption_key):
    """As its trainer reads it: the caption, then the tags."""
    parts = [entry.get(key) for key in ((caption_key,) if caption_key else ("caption", "tags"))]
    texts = [part for part in parts if isinstance(part, str)]
    return ", ".join(text for text in texts if text.strip()) if texts else None


def _row_of(where, row, key):
    row = row if isinstance(row, dict) else {}
    image, caption = row.get(_IMAGE_KEY), row.get(key)
    return Row(where, image if isinstance(image, str) else None, caption if isinstance(caption, str) else None)


def _check_columns(path, columns: Iterable[str], key):
    for column in (_IMAGE_KEY, key):
        if column not in columns:
            hint = "; name the captions with --caption_key" if column == key else ""
            raise ValueError(f"{path}: has no column {column}, only {', '.join(map(str, columns)) or 'none'}{hint}")


def _parsed(text):
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _lines(path):
    with open_regular(path) as file:
        for number, line in enumerate(io.BufferedReader(file)):
            yield line.decode("utf-8-sig" if number == 0 else "utf-8")
