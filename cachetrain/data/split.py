"""Which pairs validate and which train: a split by name, and a check that folders given for both are apart."""

import hashlib
import os

import numpy as np


def split_positions(names, share):
    """Which of `names` validate: those whose hash, as a fraction of 1, is below `share`.

    A name is always on the same side, whatever other names there are.

    Args:
        names: iterable of str.
        share: in (0, 1).

    Returns:
        bool [N].
    """
    limit = share * 2**64
    hashes = (hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in names)
    return np.fromiter((int.from_bytes(digest, "big") < limit for digest in hashes), bool)


def split_index(index, share):
    """Splits a PairIndex by the names of its pairs: returns (what is trained on, what validates).

    Raises:
        ValueError: one side would be empty.
    """
    validates = split_positions((index.relative_name(i) for i in range(len(index))), share)
    if not 0 < validates.sum() < len(index):
        raise ValueError(
            f"--val_split {share}: takes {validates.sum()} of {len(index)} pairs, so that one side is empty; use "
            "another share, more data, or --val_data_dir"
        )
    return index.subset(np.flatnonzero(~validates)), index.subset(np.flatnonzero(validates))


def check_apart(index, val_index):
    """Raises a ValueError that names a folder of --val_data_dir that is trained on as well, through links too."""
    validated = {os.path.realpath(folder): folder for folder in _folders(val_index)}
    for folder in _folders(index):
        if (real := os.path.realpath(folder)) in validated:
            raise ValueError(
                f"--val_data_dir: {validated[real]} is also trained on, as {folder} of --train_data_dir; keep the "
                "validation pairs in a folder of their own, or use --val_split"
            )


def _folders(index):
    """The distinct folders of an index's pairs, sorted."""
    return sorted({os.path.dirname(index.stem(i)) for i in range(len(index))})
