"""Fills the page template with the data of the runs."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from cachetrain.atomic import atomic_write

_TEMPLATE = Path(__file__).with_name("page.html")


def write_page(path: str | os.PathLike, runs: Sequence[dict]) -> int:
    """Writes a self-contained HTML page.

    Args:
        runs: one or two dicts from `run.read_run`.

    Returns:
        size of the page in bytes.
    """
    # "<" could end or nest the script element that holds the data.
    data = json.dumps({"runs": runs}, allow_nan=False).replace("<", "\\u003c")
    head, tail = _TEMPLATE.read_text(encoding="utf-8").split("__REPORT_DATA__")
    page = (head + data + tail).encode()
    atomic_write(path, page)
    return len(page)
