"""cachetrain/data/many_files.py: packed strings, random subsets, and looking at many files."""

import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import HANG_S

from cachetrain.data import many_files
from cachetrain.data.many_files import PackedStrings, in_threads, random_subset


def test_packed_strings_are_a_list_of_any_file_names():
    names = ["a/b.jpg", "", "ü/ñ.png", os.fsdecode(b"not \xff utf-8.jpg"), "z" * 300]
    packed = PackedStrings()
    for name in names:
        packed.append(name)
    assert list(packed) == names and len(packed) == 5 and packed[-1] == names[-1]
    with pytest.raises(IndexError):
        packed[5]


def test_random_subset_gives_every_item_the_same_chance():
    counts = np.bincount([item for seed in range(3000) for item in random_subset(iter(range(10)), 3, seed)])
    assert counts.sum() == 9000 and np.abs(counts - 900).max() < 5 * (900 * 0.7) ** 0.5


def test_random_subset_keeps_the_order_and_repeats_with_its_seed():
    chosen = random_subset(range(1000), 50, seed=1)
    assert chosen == sorted(set(chosen)) and len(chosen) == 50
    assert chosen == random_subset(range(1000), 50, seed=1) != random_subset(range(1000), 50, seed=2)
    assert random_subset([1, 2], 0, seed=0) == random_subset([1, 2], 3, seed=0) == [1, 2]


def compute(item):
    return sum(range(2000)) and -item


def wait(item):
    time.sleep(0.001)
    return -item


@pytest.mark.parametrize("count", [0, 1, 64, 65, 1000])
@pytest.mark.parametrize("function", [compute, wait])
def test_in_threads_gives_every_result_with_its_item_in_order(function, count):
    assert list(in_threads(function, iter(range(count)))) == [(item, -item) for item in range(count)]


@pytest.mark.parametrize(("busy_s", "threads"), [(0.9, 1), (0.1, 8)])
def test_in_threads_uses_threads_where_items_wait_and_none_where_they_compute(busy_s, threads, monkeypatch):
    """The first 64 items take a second, of which they compute for `busy_s`; later ones wait for each other."""
    names, together, clock = set(), threading.Barrier(threads), SimpleNamespace(wall_s=10.0, busy_s=5.0)
    times = {"perf_counter": lambda: clock.wall_s, "thread_time": lambda: clock.busy_s}
    monkeypatch.setattr(many_files, "time", SimpleNamespace(**times))

    def noted(item):
        if item < 64:
            clock.wall_s, clock.busy_s = 11.0, 5.0 + busy_s
            return
        names.add(threading.get_ident())
        together.wait(HANG_S)

    list(in_threads(noted, range(64 + 2 * 8 * 64)))
    assert len(names) == threads


def test_in_threads_takes_few_items_ahead():
    taken = []
    results = in_threads(wait, (taken.append(item) or item for item in range(10**5)))
    for _ in range(100):
        next(results)
    assert len(taken) < 3000
    results.close()
