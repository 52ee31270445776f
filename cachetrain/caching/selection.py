"""Which sidecars a run has to make: its share of the files, minus what is fresh."""

import os

from tqdm import tqdm

from cachetrain.caching import ranks
from cachetrain.caching.freshness import CORRUPT, FOREIGN, FRESH, sidecar_state
from cachetrain.data.many_files import in_threads
from cachetrain.data.scan import Pairs, scan
from cachetrain.data.sidecar import sidecar_path


def find_pairs(args, tally):
    """Yields all pairs under --data_root.

    Raises:
        ValueError: there are none.
    """
    empty = True
    for pair in scan(args.data_root, tally.fail):
        empty = False
        yield pair
    if empty and not tally.counts["failed"]:
        raise ValueError(f"no images under {', '.join(args.data_root)}")


def select(pairs, source_of, wanted, args, tally):
    """Returns, as Pairs, this rank's share of those whose sidecar has to be made, and counts the others.

    Args:
        pairs: iterable of Pair, consumed as it comes.
        source_of: Pair -> freshness.Source.
        wanted: header fields of this run.
    """

    def check(pair):
        if args.overwrite:
            return None, {}
        try:
            return sidecar_state(sidecar_path(pair.image, args.cache_suffix), source_of(pair), wanted, args.full)
        except (OSError, ValueError) as error:
            return error, {}

    selected = Pairs()
    mine = (pair for pair in pairs if ranks.is_mine(pair.image))
    with tqdm(desc="checking", unit="image", disable=None, leave=False) as progress:
        for pair, (state, metadata) in in_threads(check, mine):
            progress.update()
            if isinstance(state, Exception):
                tally.fail(pair.image, state)
                continue
            tally.counts[state] += 1
            if state == CORRUPT:
                tally.say(f"{sidecar_path(pair.image, args.cache_suffix)}: damaged; making it again")
            if state == FRESH:
                tally.observe(pair.image, metadata)
            elif state != FOREIGN:
                selected.append(pair)
    return selected


def model_fields(args, model_dir):
    """Header fields that say which model: a hub id with the commit that was fetched, or an absolute path."""
    if os.path.isdir(os.path.expanduser(args.model)):
        return {"model": str(model_dir), "revision": ""}
    return {"model": args.model, "revision": model_dir.name}
