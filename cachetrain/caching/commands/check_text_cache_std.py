"""Measures the std of cached text embeddings, and the factor that gives them unit variance.

    cache/check_text_cache_std.py photos/ --cache_suffix .txt_t5cache

All variants of a caption count. Standard errors come from the differences between captions; `--num_images` measures
a random subset. `_null_caption` is shown, but does not count among the captions. Sidecars that are damaged or hold
values that are not finite are named and left out; the exit code is then 1, and 2 on any other error.
"""

import os
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from cachetrain import cli
from cachetrain.caching.inspect import statistics
from cachetrain.caching.inspect.caches import TEXT_SCRIPTS
from cachetrain.caching.inspect.statistics import Moments, Statistics
from cachetrain.caching.messages import say
from cachetrain.data import many_files
from cachetrain.data.sidecar import NULL_STEM, Header, num_truncated
from cachetrain.log import counted


def parse_args(argv: list[str] | None = None) -> Namespace:
    return statistics.parser(__doc__, tuple(TEXT_SCRIPTS)).parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    null_paths, skipped = [], []
    captions = without_null(statistics.find_paths(args), null_paths)
    paths = many_files.random_subset(captions, args.num_images, args.seed)
    values, norms, lengths = Moments(), Moments(), Counter()
    num_cut = num_unknown = 0
    for _, emb, header in statistics.read_tensors(paths, "emb", 2, encoder_identity, skipped):
        values.add(emb.reshape(1, -1))
        norms.add(np.linalg.norm(emb, axis=1)[None])
        width, kind = emb.shape[1], header.metadata.get("kind")
        lengths.update(shape[0] for name, shape in header.shapes.items() if name.partition(".")[0] == "emb")
        num_cut += num_truncated(header.metadata)
        num_unknown += "truncated" not in header.metadata
    statistics.check_measured(values.num_groups, args, skipped)
    tokens = f"{min(lengths)} to {max(lengths)} tokens of width {width}"
    unknown = f", {num_unknown} whose header does not say" if num_unknown else ""
    variants = f" in {counted(lengths.total(), 'variant')}" if lengths.total() > values.num_groups else ""
    say(f"{counted(values.num_groups, 'caption')}{variants} of {tokens}, {num_cut} truncated{unknown}", "")
    print_factor(values.statistics()[0], norms.statistics()[0], kind)
    for path, emb, _ in statistics.read_tensors(null_paths, "emb", 2, encoder_identity, skipped):
        say(f"{path}: std {emb.std():.5g}, shape {emb.shape} (not counted above)")
    if skipped:
        say(f"left out, named above: {counted(len(skipped), 'sidecar')}")
    return 1 if skipped else 0


def without_null(paths: Iterable[str], null_paths: list[str]) -> Iterator[str]:
    """Yields the paths of captions; appends those of null captions to `null_paths`."""
    for path in paths:
        if os.path.basename(path).startswith(NULL_STEM + "."):
            null_paths.append(path)
        else:
            yield path


def encoder_identity(header: Header) -> dict:
    """What all embeddings of one measurement must have in common."""
    return {**{key: header.metadata.get(key) for key in ("encoder", "settings")}, "width": header.shapes["emb"][1]}


def print_factor(values: Statistics, norms: Statistics, kind: str | None) -> None:
    """Prints the measurements, and the factor to train with."""
    factor = values.inverse_std
    say(f"mean        {values.mean}")
    say(f"std         {values.std}")
    say(f"token norm  {norms.mean} (mean L2 norm of a token's embedding)")
    say(f"1/std       {factor}")
    if kind in ("txt_clipl", "txt_sdxl"):
        say("A UNet trained on CLIP knows its embeddings as they are: leave --text_scaling_factor at 1.")
    else:
        say(f"Projected T5 caches should have unit variance: std 1, {values.std.distance(1)}.")
        say(f"train_from_cached.py --text_scaling_factor {factor.rounded} gives them unit variance.")


run = partial(cli.run, main)  # the console script
