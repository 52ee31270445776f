#!/usr/bin/env python3
"""Measures the std of cached text embeddings, and the factor that gives them unit variance.

    cache/check_text_cache_std.py photos/ --cache_suffix .txt_t5cache

Standard errors come from the differences between captions; `--num_images` measures a random subset. `_null_caption`
is shown, but does not count among the captions. Sidecars that are damaged or hold values that are not finite are
named and left out; the exit code is then 1, and 2 on any other error.
"""

import os
from collections import Counter

try:
    import numpy as np

    from cachetrain import cli
    from cachetrain.caching.inspect import statistics
    from cachetrain.data import many_files
    from cachetrain.data.sidecar import NULL_STEM
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None


def parse_args(argv=None):
    return statistics.parser(__doc__, ("txt_clipl", "txt_t5cache")).parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    null_paths, failures = [], []
    captions = without_null(statistics.find_paths(args), null_paths)
    paths = many_files.random_subset(captions, args.num_images, args.seed)
    values, norms, lengths, truncated = statistics.Moments(), statistics.Moments(), set(), Counter()
    for _, emb, header in statistics.read_tensors(paths, "emb", 2, same_encoder, failures):
        values.add(emb.reshape(1, -1))
        norms.add(np.linalg.norm(emb, axis=1)[None])
        lengths.add(len(emb))
        width, kind = emb.shape[1], header.metadata.get("kind")
        truncated[header.metadata.get("truncated")] += 1
    statistics.check_measured(values.num_groups, args, failures)
    tokens = f"{min(lengths)} to {max(lengths)} tokens of width {width}"
    unknown = f", {truncated[None]} whose header does not tell" if truncated[None] else ""
    print(f"{values.num_groups} captions of {tokens}, {truncated['1']} truncated{unknown}\n")
    report(values.statistics()[0], norms.statistics()[0], kind)
    for path, emb, _ in statistics.read_tensors(null_paths, "emb", 2, same_encoder, failures):
        print(f"{path}: std {emb.std():.5g}, shape {emb.shape} (not counted above)")
    if failures:
        print(f"{len(failures)} sidecars were left out, named above")
    return 1 if failures else 0


def without_null(paths, null_paths):
    """Yields the paths of captions; those of the unconditional embedding go to the list `null_paths`."""
    for path in paths:
        if os.path.basename(path).startswith(NULL_STEM + "."):
            null_paths.append(path)
        else:
            yield path


def same_encoder(header):
    """What all embeddings of one measurement have in common."""
    return {**{key: header.metadata.get(key) for key in ("encoder", "settings")}, "width": header.shapes["emb"][1]}


def report(values, norms, kind):
    """Prints the measurements, and the factor to train with."""
    factor = values.inverse_std
    print(f"mean        {values.mean}")
    print(f"std         {values.std}")
    print(f"token norm  {norms.mean} (mean L2 norm of a token's embedding)")
    print(f"1/std       {factor}")
    if kind == "txt_clipl":
        print("A UNet trained on CLIP knows its embeddings as they are: leave --text_scaling_factor at 1.")
    else:
        print(f"Unit variance, as projected T5 caches should have: std 1, {values.std.distance(1)}.")
        print(f"train_from_cached.py --text_scaling_factor {factor.rounded} gives it.")


if __name__ == "__main__":
    cli.run(main)
