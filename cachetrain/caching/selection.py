"""Which sidecars a run has to make: those of its share of the files that are not fresh."""

import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from errno import ENAMETOOLONG
from functools import lru_cache
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from cachetrain.caching import ranks
from cachetrain.caching.freshness import CORRUPT, FOREIGN, FRESH, Source, file_state, is_of_others, sidecar_state
from cachetrain.caching.messages import print_line
from cachetrain.caching.summary import RunSummary
from cachetrain.data.captions import Pair
from cachetrain.data.many_files import in_threads
from cachetrain.data.sidecar import sidecar_path
from cachetrain.data.walk import Pairs, find_images
from cachetrain.modeling.names import is_local, split_subfolder

TOO_LONG = "the name of its sidecar would be too long; shorten the image's name"


def find_pairs(args: Namespace, summary: RunSummary, all_captions: bool = False) -> Iterator[Pair]:
    """Yields all pairs under --data_root; `all_captions`: with all caption files of each image.

    Raises:
        ValueError: there are none.
    """
    empty = True
    for pair in find_images(args.data_root, summary.fail, summary.leftovers, all_captions):
        empty = False
        yield pair
    if empty and not summary.counts["failed"]:
        raise ValueError(f"no images under {', '.join(args.data_root)}")


def select(
    pairs: Iterable[Pair],
    source_of: Callable[[Pair], Source],
    wanted: dict[str, str],
    args: Namespace,
    summary: RunSummary,
) -> Pairs:
    """Returns those pairs of this rank's share whose sidecar has to be made, and counts the others.

    A sidecar that could not be written counts as failed now, not when everything has been encoded.

    Args:
        pairs: consumed as they come.
        source_of: reads the state of the image or caption of a pair.
        wanted: header fields of this run.
    """

    def check(pair):
        path = sidecar_path(pair.image, args.cache_suffix)
        try:
            if args.overwrite:
                state, metadata = file_state(path)[0], {}
            else:
                state, metadata = sidecar_state(path, source_of(pair), wanted, args.full)
            if state == CORRUPT and is_of_others(path):
                raise ValueError(f"{path}: is some other file, no sidecar; delete it or use another --cache_suffix")
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) == ENAMETOOLONG:
                error = ValueError(TOO_LONG)
            return error, {}
        return (None, {}) if args.overwrite else (state, metadata)

    can_write = lru_cache(1024)(lambda folder: os.access(folder, os.W_OK | os.X_OK))
    selected = Pairs()
    mine = (pair for pair in pairs if ranks.is_mine(pair.image))
    with tqdm(desc="checking", unit=summary.unit, disable=None, leave=False) as progress:
        for pair, (state, metadata) in in_threads(check, mine):
            progress.update()
            if isinstance(state, Exception):
                summary.fail(pair.image, state)
                continue
            summary.counts[state] += 1
            if state == CORRUPT:
                print_line(f"{sidecar_path(pair.image, args.cache_suffix)}: damaged; making it again")
            if state == FRESH:
                summary.add_sidecar(pair.image, metadata)
            elif state != FOREIGN and can_write(os.path.dirname(pair.image)):
                selected.append(pair)
            elif state != FOREIGN:
                summary.fail(pair.image, "its sidecar cannot be written, as nothing can be in this folder")
    return selected


def model_fields(args: Namespace, model_dir: Path) -> dict[str, str]:
    """Header fields that name the model: an absolute path, or a Hugging Face model id and the commit fetched."""
    if is_local(args.model):
        return {"model": str(model_dir), "revision": ""}
    depth = len(PurePosixPath(split_subfolder(args.model)[1]).parts)
    return {"model": args.model, "revision": (model_dir, *model_dir.parents)[depth].name}
