"""Splits pairs into training and validation pairs, and checks that no folder is used for both."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cachetrain.data.index import PairIndex


def split_positions(names: Iterable[str], share: float) -> np.ndarray:
    """Selects the names to validate on: those whose hash, scaled to [0, 1), is below `share`.

    A name's hash alone decides, so adding or removing other names never moves a name to the other side.

    Args:
        share: about how large a part of the names is selected, in (0, 1).

    Returns:
        bool [N], True for validation.
    """
    limit = share * 2**64
    hashes = (hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in names)
    return np.fromiter((int.from_bytes(digest, "big") < limit for digest in hashes), bool)


def split_index(index: PairIndex, share: float) -> tuple[PairIndex, PairIndex]:
    """Splits an index by the names of its pairs; returns (training pairs, validation pairs).

    Raises:
        ValueError: one side would be empty.
    """
    validates = split_positions((index.relative_name(i) for i in range(len(index))), share)
    if not 0 < validates.sum() < len(index):
        raise ValueError(
            f"--val_split {share}: selects {validates.sum()} of {len(index)} pairs, expected some but not all; use "
            "another share, more data, or --val_data_dir"
        )
    return index.subset(np.flatnonzero(~validates)), index.subset(np.flatnonzero(validates))


def check_apart(index: PairIndex, val_index: PairIndex) -> None:
    """Checks that no folder is used for both training and validation; symbolic links are resolved.

    Raises:
        ValueError: a folder of --val_data_dir is also trained on.
    """
    validation_folders = {os.path.realpath(folder): folder for folder in _folders(val_index)}
    for folder in _folders(index):
        if (real_path := os.path.realpath(folder)) in validation_folders:
            raise ValueError(
                f"--val_data_dir: {validation_folders[real_path]} is also trained on, as {folder} of "
                "--train_data_dir; move the validation pairs to a separate folder, or use --val_split"
            )


def _folders(index):
    """The distinct folders of an index's pairs, sorted."""
    return sorted({os.path.dirname(index.stem(i)) for i in range(len(index))})
