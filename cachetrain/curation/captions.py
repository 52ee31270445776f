"""Reads all captions of a folder, and judges their style."""

from collections.abc import Iterator

from cachetrain.curation.tags import split_tags
from cachetrain.data.captions import Pair, read_caption
from cachetrain.data.walk import find_images
from cachetrain.log import describe

_MIN_TAGS, _MAX_WORDS_PER_TAG = 3, 3


def read_all(root: str, failures: list[str]) -> Iterator[tuple[Pair, str]]:
    """Yields each pair under a folder with its caption; adds what cannot be read to `failures`.

    Raises:
        ValueError: there are no images.
    """
    empty = True
    for pair in find_images([root], lambda *error: failures.append(": ".join(error))):
        empty = False
        try:
            yield pair, read_caption(pair).text
        except (OSError, ValueError) as error:
            failures.append(describe(error))
    if empty and not failures:
        raise ValueError(f"no images under {root}")


def is_tags(text: str) -> bool:
    """Whether a caption is a list of tags rather than a sentence."""
    tags = split_tags(text)
    return len(tags) >= _MIN_TAGS and sum(len(tag.split()) for tag in tags) <= _MAX_WORDS_PER_TAG * len(tags)
