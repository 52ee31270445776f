"""Splits captions into tags, counts and edits them."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def split_tags(text: str, separator: str = ",") -> list[str]:
    """The tags of a caption, without white space around them; empty ones are left out."""
    return [tag for part in text.split(separator) if (tag := part.strip())]


def count_tags(text: str, separator: str | None) -> Counter:
    """How often each tag of a caption comes up in it; None: each word, in lower case."""
    return Counter(
        re.findall(r"\w+(?:['’-]\w+)*", text.lower()) if separator is None else split_tags(text, separator)
    )


@dataclass(frozen=True)
class TagEdit:
    """Changes to the tags of a caption, in the order of the fields.

    Attributes:
        remove: tags to remove.
        rename: (old, new) tags.
        first, last: tags to put at the beginning or the end, where they may stand already.
        regex: `remove` and the old tags are regular expressions that match whole tags; new ones may hold \\1.
    """

    remove: Sequence[str] = ()
    rename: Sequence[tuple[str, str]] = ()
    dedup: bool = False
    sort: bool = False
    first: Sequence[str] = ()
    last: Sequence[str] = ()
    regex: bool = False
    separator: str = ","

    def function(self) -> Callable[[str], str]:
        """Returns the function caption -> caption; one without a change returns its argument as it is.

        Raises:
            ValueError: a regular expression is none.
        """
        try:
            removed = [re.compile(tag if self.regex else re.escape(tag)) for tag in self.remove]
            renamed = [
                (re.compile(old), new) if self.regex else (re.compile(re.escape(old)), new.replace("\\", r"\\"))
                for old, new in self.rename
            ]
            for pattern, new in renamed:
                pattern.sub(new, "")  # parses the new tag too
        except (re.error, IndexError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression: {error}") from error

        def edit(text):
            tags = before = split_tags(text, self.separator)
            tags = [tag for tag in tags if not any(pattern.fullmatch(tag) for pattern in removed)]
            for pattern, new in renamed:
                tags = [match.expand(new) if (match := pattern.fullmatch(tag)) else tag for tag in tags]
            tags = list(dict.fromkeys(tags)) if self.dedup else tags
            tags = sorted(tags, key=str.casefold) if self.sort else tags
            ends = {*self.first, *self.last}
            tags = [*self.first, *(tag for tag in tags if tag not in ends), *self.last]
            return text if tags == before else f"{self.separator} ".join(tag for tag in tags if tag)

        return edit
