"""How the tools print failures."""

import sys
from collections.abc import Sequence

from cachetrain.log import printable

_MAX_LISTED = 20


def print_failures(failures: Sequence[str]) -> None:
    """Prints the first failures on stderr, and how many more there are."""
    for line in failures[:_MAX_LISTED]:
        print(printable(line), file=sys.stderr)
    if len(failures) > _MAX_LISTED:
        print(f"... and {len(failures) - _MAX_LISTED:,} more", file=sys.stderr)
