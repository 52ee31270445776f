"""The page: a template with the runs' values in it."""

import json
from pathlib import Path

from cachetrain.atomic import atomic_write

_TEMPLATE = Path(__file__).with_name("page.html")


def write_page(path, runs):
    """Writes a self-contained HTML page.

    Args:
        runs: list of one or two dicts of `run.read_run`.

    Returns:
        its size in bytes.
    """
    # "<" could end or nest the script element that holds the data.
    data = json.dumps({"runs": runs}, allow_nan=False).replace("<", "\\u003c")
    head, tail = _TEMPLATE.read_text(encoding="utf-8").split("__REPORT_DATA__")
    page = (head + data + tail).encode()
    atomic_write(path, page)
    return len(page)
