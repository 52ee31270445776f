"""How the tools print names, captions and failures, none of which can control a terminal."""

import sys
from collections.abc import Sequence

_MAX_LISTED = 20


def quoted(text: str) -> str:
    """A name or caption in one line: what is not printable is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def print_failures(failures: Sequence[str]) -> None:
    """Prints the first failures on stderr, and how many more there are."""
    for line in failures[:_MAX_LISTED]:
        print(quoted(line), file=sys.stderr)
    if len(failures) > _MAX_LISTED:
        print(f"... and {len(failures) - _MAX_LISTED:,} more", file=sys.stderr)
