"""Orders of an epoch: all samples shuffled at once, and --shuffle_window, which reads from few shards at a time."""

import time
import tracemalloc
import zlib
from collections import Counter
from itertools import chain, count, pairwise

import numpy as np
import pytest
from helpers import T5, run_script
from runs import RESUME, Runs, content
from torch.utils.data import DataLoader

from cachetrain.data import order, rng
from cachetrain.data import pairs as listing
from cachetrain.data.batching import BatchSampler
from cachetrain.data.dataset import SampleKey
from cachetrain.data.index import PairIndex
from cachetrain.data.order import LANES, Table, WindowOrder, table_of
from cachetrain.data.split import split_index

REPEATS = {"once": [1] * 6, "whole": [1, 0, 2, 1, 3, 1], "drawn": [1, 0, 2, 0.5, 2.25, 0.1]}


class Index:
    """As much of a PairIndex as the orders need: blocks of 3 to 7 pairs, three latent shapes, one of them rare."""

    def __init__(self, num_blocks, repeats="once", choices=1):
        self.blocks = np.cumsum([0, *np.random.default_rng(0).integers(3, 8, num_blocks)]) * choices
        self.repeats = np.resize(np.repeat(REPEATS[repeats], choices), self.blocks[-1]).astype(np.float32)
        self.shape_ids = np.random.default_rng(1).choice(3, self.blocks[-1], p=[0.6, 0.35, 0.05]).astype(np.uint16)
        self.shapes = [(4, 8, 8), (4, 8, 6), (4, 6, 8)]
        self.choices = choices

    varies, counts_of_blocks = PairIndex.varies, PairIndex.counts_of_blocks

    def __len__(self):
        return len(self.repeats)

    def block_of(self, samples):
        return np.searchsorted(self.blocks, samples, side="right") - 1


def epoch_of(window_order, epoch):
    """(samples, repeats) of an epoch, and the lengths of its chunks."""
    chunks = []
    for number in count():
        of_epoch, *visits = window_order.chunk(number)
        if of_epoch == epoch:
            chunks.append(visits)
        if of_epoch > epoch:
            samples, repeats = (np.concatenate(arrays) for arrays in zip(*chunks, strict=True))
            return samples, repeats, [len(visits) for visits, _ in chunks]


def random_index(monkeypatch, *args):
    """An Index and few enough lanes for several rounds."""
    monkeypatch.setattr(order, "LANES", 4)
    return Index(*args)


# What an epoch visits


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("choices", [1, 2])
def test_an_epoch_visits_each_pair_as_often_as_the_order_of_the_whole_epoch(repeats, choices):
    index = Index(70, repeats, choices)
    window_order, drawn = WindowOrder(table_of(index), 3, 1), []
    for epoch in range(3):
        samples, numbers, lengths = epoch_of(window_order, epoch)
        expected = [array.tolist() for array in rng.epoch_order(3, epoch, index.repeats, choices)]
        of_pairs = Counter(zip((samples // choices).tolist(), numbers.tolist(), strict=True))
        assert of_pairs == Counter(zip((np.array(expected[0]) // choices).tolist(), expected[1], strict=True))
        assert len(lengths) == 3  # rounds of 32, 32 and 6 blocks
        drawn += (samples % choices).tolist()
    assert choices == 1 or 0.4 < np.mean(drawn) < 0.6


def test_blocks_are_permuted_anew_for_each_epoch_and_lanes_take_turns():
    index = Index(2 * LANES + 5)
    index.blocks = np.arange(2 * LANES + 6) * 4
    index.repeats, index.shape_ids = np.ones(index.blocks[-1], np.float32), np.zeros(index.blocks[-1], np.uint16)
    window_order, orders = WindowOrder(table_of(index), 3, 2), []
    for epoch in range(2):
        samples, _, (first, last) = epoch_of(window_order, epoch)
        blocks = rng.permutation(3, epoch, 2 * LANES + 5)
        for start, end, of_round in ((0, first, blocks[: 2 * LANES]), (first, first + last, blocks[2 * LANES :])):
            turns = index.block_of(samples[start:end]).reshape(-1, min(LANES, len(of_round)))
            for lane in range(turns.shape[1]):
                assert set(turns[:, lane]) == set(of_round[lane::LANES])
        orders.append(samples.tolist())
    assert orders[0] != orders[1]


def test_no_two_lanes_rounds_epochs_or_seeds_have_the_same_order():
    index = Index(1)
    index.blocks = np.arange(3 * LANES + 1) * 20
    index.repeats, index.shape_ids = np.ones(index.blocks[-1], np.float32), np.zeros(index.blocks[-1], np.uint16)
    of_seeds = [[WindowOrder(table_of(index), seed, 1).chunk(number)[1] for number in range(9)] for seed in (0, 1)]
    orders = [tuple(rows) for chunks in of_seeds for chunk in chunks for rows in (chunk % 20).reshape(20, LANES).T]
    assert len(set(orders)) == len(orders) == 2 * 9 * LANES
    assert all(sorted(rows) == list(range(20)) for rows in orders)


def test_rounds_of_all_blocks_mix_all_samples_and_smaller_ones_as_much_as_their_share():
    """Of the variance of a sample's place in the epoch, a block explains what rounds do: 1 - 1 / rounds^2."""
    index = Index(1)
    index.blocks = np.arange(4 * LANES + 1) * 64
    index.repeats, index.shape_ids = np.ones(index.blocks[-1], np.float32), np.zeros(index.blocks[-1], np.uint16)
    for window, rounds in ((1, 4), (2, 2), (4, 1), (9, 1)):
        window_order, explained = WindowOrder(table_of(index), 0, window), []
        for epoch in range(4):
            places = np.argsort(epoch_of(window_order, epoch)[0]).reshape(4 * LANES, 64)
            explained.append(places.mean(1).var() / places.var())
            row = np.corrcoef(places.argsort(1).argsort(1).ravel(), np.tile(np.arange(64), 4 * LANES))[0, 1]
            assert abs(row) < 0.05  # neighbours in a shard are no neighbours in the order
        assert abs(np.mean(explained) - (1 - 1 / rounds**2)) < 0.02


# Batches


def test_batches_are_of_one_shape_and_what_fills_none_waits_also_for_the_next_epoch(monkeypatch):
    index = random_index(monkeypatch, 14, "drawn")
    batches = list(BatchSampler(index, 5, 3, 60, window=1))
    filling, expected = {}, []
    for epoch in range(6):
        samples, repeats, _ = epoch_of(WindowOrder(table_of(index), 3, 1), epoch)
        for sample, repeat in zip(samples.tolist(), repeats.tolist(), strict=True):
            filling.setdefault(index.shape_ids[sample], []).append(SampleKey(epoch, sample, repeat))
            if len(filling[index.shape_ids[sample]]) == 5:
                expected.append(filling.pop(index.shape_ids[sample]))
    assert len(expected) > 60 and batches == expected[:60]
    assert sum(batch[0].epoch < batch[-1].epoch for batch in batches) > 3
    assert {len({index.shape_ids[key.sample] for key in batch}) for batch in batches} == {1}


def test_a_round_reads_from_lanes_times_window_shards_and_a_batch_from_those_of_two_rounds_at_most(monkeypatch):
    index = random_index(monkeypatch, 40)
    index.shape_ids[:] = 0
    window_order = WindowOrder(table_of(index), 3, 2)
    rounds = [set(index.block_of(window_order.chunk(number)[1]).tolist()) for number in range(5)]
    assert [len(blocks) for blocks in rounds] == [4 * 2] * 5 and set().union(*rounds) == set(range(40))
    both = [first | second for first, second in zip([set(), *rounds], [*rounds, set()], strict=True)]
    batches = BatchSampler(index, 5, 3, len(index) // 5, window=2)
    read = [set(index.block_of([key.sample for key in batch]).tolist()) for batch in batches]
    assert all(any(blocks <= near for near in both) for blocks in read)


class Keys:
    """A data set that gives back what it is asked for."""

    def __getitem__(self, key):
        return key


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_do_not_change_the_batches(workers, monkeypatch):
    index = random_index(monkeypatch, 14, "drawn")
    whole = [sorted(batch) for batch in BatchSampler(index, 8, 5, 30, window=1)]
    for ranks in (1, 2, 4):
        samplers = [BatchSampler(index, 8 // ranks, 5, 30, rank=rank, ranks=ranks, window=1) for rank in range(ranks)]
        parts = [DataLoader(Keys(), batch_sampler=s, num_workers=workers, collate_fn=list) for s in samplers]
        assert [sorted(chain(*shares)) for shares in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize(
    ("repeats", "choices", "batch_size", "ranks"),
    [("once", 1, 4, 1), ("whole", 1, 3, 2), ("drawn", 1, 1, 1), ("drawn", 1, 6, 1), ("drawn", 2, 5, 1),
     ("drawn", 1, 47, 1)],
)  # fmt: skip
def test_batches_from_any_number_on_are_the_tail_of_all(repeats, choices, batch_size, ranks, monkeypatch):
    index = random_index(monkeypatch, 14, repeats, choices)
    number = int(2.4 * index.repeats.sum() / choices / batch_size / ranks) + 2  # of batches

    def batches(first):
        return BatchSampler(index, batch_size, 3, number, strata=2, ranks=ranks, first=first, window=1)

    whole = batches(0)
    expected = list(whole)
    assert expected[-1][0].epoch >= 2
    for first in range(number):
        tail = batches(first)
        assert list(tail) == expected[first:]
        assert tail.waiting == whole.waiting and (tail.trained == whole.trained).all()


def test_without_a_window_batches_are_those_of_earlier_versions():
    checksums = []
    for repeats, choices in (
        ([1] * 60, 1),
        ([1, 2, 0, 0.5, 2.25, 0.1] * 10, 1),
        ([1, 1, 2.5, 2.5, 0.3, 0.3] * 10, 2),
    ):
        index = Index(1)
        index.repeats, index.choices = np.array(repeats, np.float32), choices
        index.shape_ids = (np.arange(60) % 7 // 3).astype(np.uint16)
        keys = [key[:3] for batch in BatchSampler(index, 4, 5, 60, first=7) for key in batch]
        checksums.append(zlib.crc32(np.array(keys, np.int64).tobytes()))
    assert checksums == [0xDA8C3EAE, 0xE8E706B6, 0xD1E41E8E]


class ManyShapes:
    """Shape ids of 100 million samples in shards of 2048, made when they are asked for."""

    def __init__(self, histogram):
        self.histogram = histogram

    def __getitem__(self, samples):
        shards, shape_ids = samples // 2048, np.empty(len(samples), np.uint16)
        by_shard = np.argsort(shards, kind="stable")
        for places in np.split(by_shard, np.flatnonzero(np.diff(shards[by_shard])) + 1):
            shard = int(shards[places[0]])
            of_shard = np.repeat(np.arange(9, dtype=np.uint16), self.histogram[shard])
            shape_ids[places] = np.random.default_rng(shard).permutation(of_shard)[samples[places] % 2048]
        return shape_ids


def test_batch_40000_of_100_million_samples_is_entered_within_3_seconds_and_300_mb():
    shards = 48829
    histogram = np.random.default_rng(0).multinomial(2048, [0.5, *[0.5 / 8] * 8], shards)
    once = np.broadcast_to(np.float32(1), shards * 2048)
    table = Table(np.arange(shards + 1) * 2048, histogram, ManyShapes(histogram), once)
    window_order, started_s = WindowOrder(table, 7, 4), time.process_time()
    tracemalloc.start()
    entry = window_order.entry(40000, 2048)
    visits, trained = window_order.chunk(entry.chunk), window_order.trained(entry)
    (_, peak), cpu_s = tracemalloc.get_traced_memory(), time.process_time() - started_s
    tracemalloc.stop()
    assert cpu_s < 3 and peak < 300e6
    num_waiting = sum(map(len, entry.waiting.values()))
    assert entry.made <= 40000 < entry.made + len(visits[1]) / 2048 + 9
    assert entry.made * 2048 + num_waiting == entry.chunk * 4 * LANES * 2048 and visits[0] == 0
    assert trained.sum() == entry.made * 2048


# Sets and runs


def pack(folder, out, rows):
    assert run_script("cache/pack_shards.py", "--data_root", folder, "--out", out, "--rows", rows) == 0
    return out


@pytest.fixture(scope="module")
def packed(shapes, tmp_path_factory):
    return pack(shapes, tmp_path_factory.mktemp("order") / "set", 7)


def test_a_folder_counts_as_blocks_and_has_the_order_of_its_shard_set(shapes, packed, monkeypatch):
    monkeypatch.setattr(listing, "FOLDER_BLOCK", 7)
    folder, shard_set = PairIndex([shapes], *T5), PairIndex([packed], *T5)
    assert folder.blocks.tolist() == shard_set.blocks.tolist() == [0, 7, 14, 21, 24]
    monkeypatch.setattr(order, "LANES", 2)
    assert list(BatchSampler(folder, 4, 0, 18, window=1)) == list(BatchSampler(shard_set, 4, 0, 18, window=1))
    monkeypatch.setattr(listing, "FOLDER_BLOCK", 2048)
    sizes = PairIndex([packed, shapes], (T5[0], T5[0]), T5[1])
    assert sizes.blocks.tolist() == [0, 14, 28, 42, 48, 96]  # two samples of each pair


def test_blocks_of_a_part_are_what_is_left_of_each(packed):
    index = PairIndex([packed], *T5)
    for part in split_index(index, 0.3):
        kept, names = set(map(part.stem, range(len(part)))), names_of_blocks(part)
        left = [[name for name in of_block if name in kept] for of_block in names_of_blocks(index)]
        assert names == [of_block for of_block in left if of_block] and len(kept) == len(list(chain(*names)))


def names_of_blocks(index):
    return [list(map(index.stem, range(*ends))) for ends in pairwise(index.blocks)]


def test_a_run_with_a_window_resumes_bit_exact_and_other_windows_or_shards_are_refused(
    shapes, packed, model_t5, tmp_path, monkeypatch
):
    monkeypatch.setattr(order, "LANES", 2)
    runs, flags = Runs(packed, model_t5, tmp_path), ["--batch_size", 5, "--shuffle_window", 1]
    whole = runs.new()
    samples = runs.train(whole, *flags, "--max_steps", 6, "--save_steps", 3)
    assert samples == [
        [key.sample for key in batch] for batch in BatchSampler(PairIndex([packed], *T5), 5, 0, 6, window=1)
    ]
    run = runs.interrupted(whole, 3)
    assert runs.train(run, *flags, "--max_steps", 6, *RESUME) == samples[3:]
    assert content(run, 6) == content(whole, 6)
    for other, window, now in ((packed, 2, "2, 4 blocks"), (packed, 0, "0 now"), (shapes, 1, "1, 1 block ")):
        runs.data = other
        with pytest.raises(ValueError, match=rf"not be the run .*: shuffle_window: 1, 4 blocks \(.*\) then, {now}"):
            runs.train(run, *flags, "--shuffle_window", window, "--max_steps", 7, *RESUME)
