"""What a shard set holds: rows and bytes of each half, what made them, and what one half lacks."""

import os
from collections import Counter

import numpy as np
from tqdm import tqdm

from cachetrain.caching.messages import print_line, say
from cachetrain.data.shard_set import folders_of, numbered_shards
from cachetrain.data.shards import Shard
from cachetrain.data.sidecar import NULL_STEM
from cachetrain.log import counted


def report_set(root: str, verify: bool) -> bool:
    """Prints the state of a shard set.

    Args:
        verify: read all sidecars and compare them with their SHA-256.

    Returns:
        whether it is complete: one folder for each suffix, the same rows in each, nothing damaged.
    """
    complete, keys, names = True, {}, {}
    for suffix, folders in folders_of(root).items():
        if len(folders) > 1:
            complete = False
            print_line(f"{' and '.join(folders)} hold *{suffix} of other models or settings; move all but one away")
        for folder in folders:
            complete &= _report_folder(folder, suffix, verify, keys, names)
    everywhere = set.intersection(*map(set, keys.values()))
    for folder, of_folder in keys.items():
        others = set().union(*(other for name, other in keys.items() if name != folder))
        if missing := others - of_folder:
            complete = False
            first = os.fsdecode(min(names[key] for key in missing))
            say(f"{folder}: rows in other folders only, like {first}: {len(missing):,}")
    say(f"{root}: {counted(len(everywhere), 'pair')} in all halves")
    return complete


def _report_folder(folder, suffix, verify, keys, names):
    """Prints the state of the shards of one folder; adds its rows' keys and names. Returns whether all are intact."""
    num_damaged = num_bytes = num_masked = 0
    shapes, tokens, fields, of_folder = Counter(), Counter(), None, set()
    paths = numbered_shards(folder).values()
    for path in tqdm(paths, desc="verifying" if verify else "reading", unit="shard", disable=None, leave=False):
        try:
            shard = Shard(path)
        except (ValueError, OSError) as error:
            print_line(str(error))
            num_damaged += 1
            continue
        fields = shard.fields
        of_folder.update(row_keys := shard.arrays["key"].tolist())
        names.update(zip(row_keys, shard.names(), strict=True))
        num_bytes += os.path.getsize(path)
        num_masked += int(shard.arrays["masked"].sum())
        for place, count in zip(*np.unique(shard.arrays["shape"], return_counts=True), strict=True):
            shapes["x".join(map(str, fields["shapes"][place]))] += int(count)
        tokens.update(shard.arrays["tokens"].tolist())
        num_damaged += sum(not _is_intact(shard, row) for row in range(len(shard))) if verify else 0
    keys[folder] = of_folder
    size = tqdm.format_sizeof(num_bytes, "B")
    say(f"{folder}: {counted(len(paths), 'shard')}, {counted(len(of_folder), 'row')}, {size}")
    if fields:
        say(f"  encoder {fields['encoder'][:12]}, settings {fields['settings']}")
        sizes = ", ".join(f"{number:,} of {shape}" for shape, number in shapes.most_common(8) if shape)
        lengths = f"{min(tokens)} to {counted(max(tokens), 'token')}"
        say(f"  latents: {sizes}" if sizes else f"  captions of {lengths}")
    if num_masked:
        say(f"  {counted(num_masked, 'mask')}")
    if fields and not sizes:
        there = os.path.exists(os.path.join(folder, NULL_STEM + suffix))
        say(f"  null caption: {'there' if there else 'missing'}")
    if num_damaged:
        say(f"  damaged: {num_damaged:,}, named above")
    return not num_damaged


def _is_intact(shard, row):
    try:
        shard.read(row)
    except (ValueError, OSError) as error:
        print_line(str(error))
        return False
    return True
