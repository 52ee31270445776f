"""What an epoch visits, weights of folders, rare sizes, caches in memory, one text for all, malformed tensors."""

import os
import shutil
import signal
from collections import Counter
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLIP, T5, WIDE, digest, open_pairs, refused, run_script, train, wait_until, without_headers
from safetensors.torch import load_file, save_file

from cachetrain.caching import images
from cachetrain.data import dataset, ram, rng
from cachetrain.data.batching import BatchSampler
from cachetrain.data.dataset import SampleKey
from cachetrain.data.index import PairIndex
from cachetrain.data.loader import batches_of, never_wait_in_vain, pack, unpack
from cachetrain.data.sidecar import read_header, read_sidecar, write_sidecar
from cachetrain.distributed import World
from cachetrain.training import options
from cachetrain.training import run as opening

REQUIRED = ["--model", "x", "--output_dir", "x"]


class Index:
    """As much of a PairIndex as BatchSampler needs."""

    def __init__(self, repeats, shape_ids=None):
        self.repeats = np.array(repeats, np.float32)
        self.shape_ids = np.zeros(len(repeats), int) if shape_ids is None else np.array(shape_ids)
        self.choices = 1

    def __len__(self):
        return len(self.repeats)


def copied(shapes, folder, names=slice(None), suffixes=T5):
    """Copies the pairs of `shapes` whose place is in `names` to `folder`, the null captions too."""
    folder.mkdir(parents=True)
    stems = sorted(path.stem for path in shapes.glob("*.img_sdxl"))[names]
    for stem in [*stems, "_null_caption"]:
        for path in shapes.glob(f"{stem}.*"):
            if path.suffix in suffixes:
                shutil.copy(path, folder)
    return folder


def test_weights_are_the_mean_number_of_visits_and_fractions_are_drawn_anew_in_each_epoch():
    weights = np.array([1, 2, 0, 0.5, 2.25] * 20, np.float32)
    counts = np.array([np.bincount(rng.epoch_order(0, epoch, weights)[0], minlength=100) for epoch in range(400)])
    for i, weight in enumerate(weights):
        assert set(counts[:, i]) == {int(np.floor(weight)), int(np.ceil(weight))}
        spread = np.sqrt((weight % 1) * (1 - weight % 1) / 400)
        assert abs(counts[:, i].mean() - weight) <= 5 * spread
    assert len({row.tobytes() for row in counts}) == 400
    samples, repeats = rng.epoch_order(3, 7, weights)
    assert len(set(zip(samples.tolist(), repeats.tolist(), strict=True))) == len(samples)
    assert all(repeats[samples == 1].tolist().count(n) == 1 for n in (0, 1))
    plain, none = rng.epoch_order(0, 0, np.ones(50, np.float32))
    assert (plain == rng.permutation(0, 0, 50)).all() and not none.any()


def test_two_visits_of_one_epoch_have_noise_and_timesteps_of_their_own(shapes):
    pairs = open_pairs(PairIndex([shapes], *T5))
    first, second = pairs[SampleKey(0, 3, 0)], pairs[SampleKey(0, 3, 1)]
    assert torch.equal(first["latents"], second["latents"])
    assert abs(np.corrcoef(first["noise"].flatten(), second["noise"].flatten())[0, 1]) < 0.3
    assert first["timesteps"] != second["timesteps"]
    fixed = open_pairs(pairs.index, fixed=True)
    again = fixed[SampleKey(9, 3, 1)]
    assert torch.equal(again["noise"], first["noise"]) and again["timesteps"] == first["timesteps"]


def test_folder_weights_multiply_txt_and_repeats_multiply_and_the_nearest_file_counts(shapes, tmp_path):
    root = copied(shapes, tmp_path / "a", slice(0, 4))
    copied(shapes, root / "often", slice(4, 7))
    copied(shapes, root / "often" / "deep", slice(7, 8))
    copied(shapes, root / "often" / "never", slice(8, 10))
    (root / "often" / "multiply.txt").write_text("3\n")
    (root / "often" / "never" / "multiply.txt").write_text("0")
    other = copied(shapes, tmp_path / "b:1", slice(10, 12))  # a folder that looks weighted and is not
    argv = ["--train_data_dir", f"{root}:0.5", str(other), "--repeats", "2", *REQUIRED]
    args = options.parse_args("", argv)
    assert args.train_data_dir == [str(root), str(other)] and args.dir_weights == [1.0, 2.0]
    index = PairIndex(args.train_data_dir, *T5, args.dir_weights)
    by_folder = {index.stem(i).rsplit("/", 1)[0].rsplit("/", 1)[1]: index.repeats[i] for i in range(len(index))}
    assert by_folder == {"a": 1.0, "often": 3.0, "deep": 3.0, "never": 0.0, "b:1": 2.0}
    assert index.samples_per_epoch == 4 + 9 + 3 + 0 + 4
    counts = Counter(key.sample for batch in BatchSampler(index, 5, 0, 40) for key in batch)  # ten epochs
    assert {index.stem(i).split("/")[-2] for i in counts} == {"a", "often", "deep", "b:1"}
    for i, repeats in enumerate(index.repeats):
        assert abs(counts[i] - 10 * repeats) <= repeats  # the last of them may wait in a batch
    for content in (b"\xef\xbb\xbf2\r\n", b"\xff\xfe2\x00", b"\xfe\xff\x002"):  # as Windows writes it
        (root / "multiply.txt").write_bytes(content)
        assert PairIndex([root], *T5).repeats[0] == 2
    for content in ("nan", "inf", "-1", "1e5", "2 3", ""):
        (root / "multiply.txt").write_text(content)
        with pytest.raises(ValueError, match=rf"multiply\.txt: '{content}'; expected one number from 0 to 10000"):
            PairIndex([root], *T5)
    (root / "multiply.txt").write_text("10000")
    with pytest.raises(ValueError, match="comes up 20000 times in an epoch, more than 10000"):
        PairIndex([root], *T5, [2.0])
    (root / "multiply.txt").write_text("often")
    with pytest.raises(ValueError, match=r"multiply\.txt: 'often'"):
        PairIndex([root], *T5)
    (root / "multiply.txt").write_bytes(b"\xef\xbb\xbf0")  # with a byte order mark
    (root / "often" / "multiply.txt").unlink()
    with pytest.raises(ValueError, match="an epoch of 10 pairs has 0 samples"):
        PairIndex([root], *T5)


def test_ranks_share_each_batch_and_together_they_are_one_big_batch():
    index = Index([1, 2, 0.5] * 12, [0, 0, 1] * 12)
    whole = list(BatchSampler(index, 6, 5, 20))
    parts = [list(BatchSampler(index, 2, 5, 20, rank=rank, ranks=3)) for rank in range(3)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(key for share in shares for key in share)
        assert all(len(share) == 2 for share in shares)


def test_a_size_that_never_fills_a_batch_is_named_and_what_waits_is_counted(shapes, model_t5, tmp_path, capsys):
    wide = copied(shapes, tmp_path / "wide", slice(0, 3))
    for path in shapes.glob("*.png"):
        if (wide / f"{path.stem}.img_sdxl").exists():
            shutil.copy(path, wide)
    assert run_script("cache/create_img_sdxl.py", "--data_root", wide, "--model", model_t5, *WIDE) == 0
    capsys.readouterr()
    flags = ["--max_steps", 6, "--batch_size", 4, "--train_data_dir", shapes, wide]
    train(shapes, model_t5, tmp_path / "run", *flags)
    out = capsys.readouterr().out
    assert "0.89 epochs of 27 samples, from 27 pairs; 4x8x8: 88.9%; 4x8x12: 11.1%, NEVER FILLS A BATCH" in out
    # Six batches of 4 need all 24 of the common size, or wait: count by hand.
    batches = BatchSampler(PairIndex([shapes, wide], *T5), 4, 0, 6)
    trained = {key.sample for batch in batches for key in batch}
    assert f"coverage: {len(trained)} of 27 pairs trained; waiting for a full batch:" in out
    assert sum(batches.waiting.values()) >= 1 and batches.trained.sum() == len(trained)


@pytest.mark.parametrize("workers", [0, 2])
def test_caches_in_memory_train_the_same_weights_and_files_are_read_once(
    workers, shapes, model_t5, tmp_path, monkeypatch
):
    flags = ["--max_steps", 5, "--batch_size", 8, "--lr", 1e-3, "--cond_dropout", 0.2]
    _, from_files = train(shapes, model_t5, tmp_path / "files", *flags)
    monkeypatch.setattr(dataset.Sidecars, "image", None)  # nothing may read a file any more
    monkeypatch.setattr(dataset.Sidecars, "text", None)
    _, from_memory = train(shapes, model_t5, tmp_path / "memory", *flags, "--cache_in_ram", "--num_workers", workers)
    assert digest(from_files) == digest(from_memory)


def test_caches_that_do_not_fit_into_memory_are_refused_and_the_estimate_is_close(shapes, tmp_path, monkeypatch):
    index = PairIndex([shapes], *T5)
    real = sum(path.stat().st_size for suffix in T5 for path in shapes.glob(f"[0-9]*{suffix}"))
    assert 0.5 * real < ram.needed_bytes(index) < 2 * real
    assert len(ram.RamCache(index)._data) == real
    monkeypatch.setattr(ram, "available_bytes", lambda: 50_000)
    with pytest.raises(ValueError, match="--cache_in_ram: the caches need"):
        ram.RamCache(index)


def test_a_damaged_sidecar_is_named_when_caches_are_read_into_memory(shapes, tmp_path):
    folder = copied(shapes, tmp_path / "d")
    index = PairIndex([folder], *T5)
    damaged = folder / f"{index.relative_name(5)}.img_sdxl"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=str(damaged)):
        ram.RamCache(index)


@pytest.mark.parametrize("in_ram", [False, True])
def test_one_text_for_all_images_needs_no_other_text_and_is_what_is_trained_on(in_ram, shapes, model_t5, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for path in shapes.glob("[0-9]*.img_sdxl"):
        shutil.copy(path, folder)
    text = shutil.copy(sorted(shapes.glob("[0-9]*.txt_t5cache"))[3], tmp_path / "one.txt_t5cache")
    flags = ["--max_steps", 3, "--batch_size", 4, "--lr", 1e-3]
    forced = ["--force_txtcache", text, *(["--cache_in_ram"] if in_ram else [])]
    lines, one = train(folder, model_t5, tmp_path / "a", *flags, *forced)
    assert "02_Loss_Components/loss_raw_dropped" not in lines[-1]  # no caption is dropped
    for path in shapes.glob("[0-9]*.txt_t5cache"):
        shutil.copy(text, folder / path.name)
    _, same = train(folder, model_t5, tmp_path / "b", *flags, "--cond_dropout", 0)
    assert digest(one) == digest(same)
    assert "no pairs" in refused(tmp_path / "d", model_t5, tmp_path / "c", suffixes=CLIP)


def test_subset_is_an_index_of_its_own(shapes):
    index = PairIndex([shapes], *T5)
    part = index.subset(np.array([3, 5, 11])).subset(np.array([2, 0]))
    assert [part.stem(i) for i in range(2)] == [index.stem(11), index.stem(3)]
    assert part.relative_name(1) == index.relative_name(3) and "/" not in part.relative_name(1)
    assert len(part) == len(part.repeats) == len(part.tokens) == 2 and part.samples_per_epoch == 2
    assert part.tokens[0] == len(read_sidecar(index.text_path(11))[0]["emb"])


def test_embeddings_in_bfloat16_are_those_of_float32_to_the_bit(shapes):
    index = PairIndex([shapes], *T5)
    exact = open_pairs(index)
    half = open_pairs(index, dtype=torch.bfloat16)
    for i in range(len(index)):
        assert torch.equal(
            half[SampleKey(0, i)]["condition"]["emb"].float(), exact[SampleKey(0, i)]["condition"]["emb"]
        )


def test_a_compiled_run_pads_every_batch_to_the_longest_text_of_all(shapes, model_t5):
    argv = [
        "--train_data_dir",
        shapes,
        "--model",
        model_t5,
        "--output_dir",
        "x",
        "--batch_size",
        4,
        "--num_workers",
        0,
    ]
    for flags, lengths in (([], {16, 8}), (["--compile"], {40})):
        args = options.parse_args("", [*map(str, argv), "--num_workers", "0", *flags])
        run = opening.open_run(args, World())
        run.index.tokens[7] = 35  # a longer text, in no batch of the four below
        loader, _ = opening.open_loader(run, opening.open_pairs(run))
        batches = (unpack(packed)["conditioning"] for packed in islice(loader, 4))
        found = {batch["encoder_hidden_states"].shape[1] for batch in batches}
        assert found <= lengths


# Between processes


def test_batches_need_no_shared_memory(monkeypatch):
    """A container has 64 MB of it; torch would put each tensor there."""

    def shared(tensor):
        raise AssertionError("a tensor is put into shared memory")

    for kind in (torch.Tensor, torch.nn.parameter.Parameter):
        monkeypatch.setitem(ForkingPickler._extra_reducers, kind, shared)
    batch = {
        "latents": torch.randn(2, 4, 8, 8),
        "condition": {"emb": torch.ones(2, 3).bfloat16()},
        "faults": [(1, "x")],
    }
    received = unpack(ForkingPickler.loads(ForkingPickler.dumps(pack(batch))))
    assert torch.equal(received["latents"], batch["latents"]) and received["faults"] == [(1, "x")]
    assert torch.equal(received["condition"]["emb"], batch["condition"]["emb"])
    groups, _ = images.collate([images.Decoded("a.png", np.zeros((8, 8, 3), np.uint8), {})])
    assert len(ForkingPickler.loads(ForkingPickler.dumps(groups))) == 1


def test_a_batch_that_cannot_be_sent_ends_the_loader_in_one_line():
    unsendable = [lambda: None]  # cannot be pickled: the worker's thread that sends batches fails
    loader = torch.utils.data.DataLoader(
        unsendable, num_workers=1, collate_fn=list, worker_init_fn=lambda _: never_wait_in_vain()
    )
    with pytest.raises(OSError, match=r"a loader process died .*lower --num_workers"):
        list(batches_of(loader))


def test_a_worker_whose_reader_is_killed_ends_although_its_batches_do_not_fit_into_the_pipe(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils.worker, "MP_STATUS_CHECK_INTERVAL", 0.1)
    if (reader := os.fork()) == 0:
        loader = torch.utils.data.DataLoader(
            [np.zeros(1 << 20)] * 9, num_workers=1, collate_fn=list, worker_init_fn=lambda _: never_wait_in_vain()
        )
        batches = iter(loader)
        next(batches)
        (tmp_path / "pid").write_text(str(batches._workers[0].pid))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(reader, 0)
    worker = (tmp_path / "pid").read_text()
    assert wait_until(lambda: not Path("/proc", worker).exists() or "Z" in Path("/proc", worker, "stat").read_text())


# Sidecars that cannot be trained on


@pytest.mark.parametrize(
    ("suffix", "tensors"),
    [
        *((T5[0], {"latent": torch.zeros(4, 8, 8, dtype=d)}) for d in (torch.int32, torch.bool, torch.complex64)),
        *((T5[0], {"latent": torch.zeros(shape)}) for shape in ((4, 64), (1, 4, 8, 8), (4, 0, 8))),
        (T5[0], {"latent": torch.zeros(4, 8, 8), "latent_flip": torch.zeros(4, 8, 16)}),
        *((T5[1], {"emb": torch.zeros(3, 64, dtype=d)}) for d in (torch.int64, torch.bool, torch.complex64)),
        *((T5[1], {"emb": torch.zeros(shape)}) for shape in ((64,), (1, 3, 64), (0, 64), (3, 0))),
        (T5[1], {"emb": torch.zeros(2**16, 1)}),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_tensors_that_cannot_be_trained_on_are_named(suffix, tensors, number, shapes, tmp_path):
    folder = copied(shapes, tmp_path / "data", slice(3))
    path = sorted(folder.glob(f"0*{suffix}"))[number]
    write_sidecar(path, tensors, read_header(path).metadata)
    with pytest.raises(ValueError, match=path.name):
        PairIndex([folder], *T5)


def test_a_scaling_factor_that_is_no_number_is_refused(shapes, model_t5, tmp_path):
    folder = without_headers(copied(shapes, tmp_path / "data", slice(3)), tmp_path / "foreign")
    for value in ("nan", "0x1", "-1", "1e300"):
        for path in folder.glob(f"*{T5[0]}"):
            save_file(load_file(path), path, {"scaling_factor": value})
        message = refused(folder, model_t5, tmp_path / value, "--cond_dropout", 0)
        assert f"scaling_factor {value!r}" in message and T5[0] in message
