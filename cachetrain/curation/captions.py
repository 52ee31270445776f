"""Reads all captions of a folder, and judges their style."""

import argparse
from collections.abc import Iterator

from cachetrain.curation.tags import split_tags
from cachetrain.data.captions import Pair, read_caption
from cachetrain.data.walk import find_images
from cachetrain.log import describe

_MIN_TAGS, _MAX_WORDS_PER_TAG = 3, 3


def add_captions_option(parser: argparse.ArgumentParser) -> None:
    """Adds --captions, as the text cache scripts have it, for `read_all`."""
    parser.add_argument(
        "--captions",
        choices=("files",),
        help="files: all of a.txt, a.caption, a.long.txt and so on are captions of a.jpg; default: the first of them",
    )


def read_all(root: str, failures: list[str], captions: str | None = None) -> Iterator[tuple[Pair, str]]:
    """Yields each image under a folder with its caption; adds what cannot be read to `failures`.

    Args:
        captions: of --captions; "files" yields an image once for each of its caption files, as Pair.caption_file.

    Raises:
        ValueError: there are no images.
    """
    empty = True
    for pair in find_images(
        [root], lambda *error: failures.append(": ".join(error)), all_captions=captions == "files"
    ):
        empty = False
        for file in pair.caption_files or (None,):
            one = Pair(pair.image, file)
            try:
                yield one, read_caption(one).text
            except (OSError, ValueError) as error:
                failures.append(describe(error))
    if empty and not failures:
        raise ValueError(f"no images under {root}")


def is_tags(text: str) -> bool:
    """Whether a caption is a list of tags rather than a sentence."""
    tags = split_tags(text)
    return len(tags) >= _MIN_TAGS and sum(len(tag.split()) for tag in tags) <= _MAX_WORDS_PER_TAG * len(tags)
