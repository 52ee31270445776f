"""Writes findings as one HTML page: sections of items, each with a name, texts, a thumbnail or a bar."""

import base64
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from cachetrain.atomic import atomic_write

MAX_ITEMS = 500  # of a section; a page of more thumbnails opens slowly
THUMBNAIL_PIXELS = 192
_TEMPLATE = Path(__file__).with_name("page.html")


class Item(NamedTuple):
    """One entry of a section.

    Attributes:
        name: file or tag.
        texts: captions or remarks below it.
        value: number or size beside the name.
        share: length of its bar, 0 to 1; None: no bar.
        image: data: URL of its thumbnail, or None.
    """

    name: str
    texts: Sequence[str] = ()
    value: str = ""
    share: float | None = None
    image: str | None = None


class Section(NamedTuple):
    """A heading, a sentence on what is listed, and the items. `columns` head the texts, if given; `total` is how
    many are meant, if not each item."""

    heading: str
    note: str
    items: Sequence[Item]
    columns: Sequence[str] = ()
    total: int | None = None


def thumbnail(image: Image.Image) -> str:
    """An RGB image as a data: URL of at most THUMBNAIL_PIXELS a side."""
    image = image.copy()
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def write_page(path: str | os.PathLike, title: str, sections: Sequence[Section]) -> None:
    """Writes the page; of each section the first MAX_ITEMS items, and how many there are."""
    shown = [
        {
            **section._asdict(),
            "total": len(section.items) if section.total is None else section.total,
            "items": [item._asdict() for item in section.items[:MAX_ITEMS]],
        }
        for section in sections
    ]
    # "<" could end or nest the script element that holds the data. Names that are not UTF-8 stay escaped: \udc80.
    data = json.dumps({"title": title, "sections": shown}, allow_nan=False).replace("<", "\\u003c")
    head, tail = _TEMPLATE.read_text(encoding="utf-8").split("__PAGE_DATA__")
    atomic_write(path, (head + data + tail).encode())
