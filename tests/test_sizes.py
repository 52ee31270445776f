"""Several crops in a sidecar, and several image caches of one folder: what each visit draws, and from what."""

import shutil
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cache_fixtures import changed, picture, save_pictures, sidecars
from diffusers import AutoencoderKL
from helpers import T5, WIDE, open_pairs, refused, run_script, train
from PIL import Image
from runs import RESUME, Runs, content

from cachetrain.caching import images
from cachetrain.data import rng
from cachetrain.data.batching import BatchSampler
from cachetrain.data.dataset import SampleKey
from cachetrain.data.index import PairIndex
from cachetrain.data.loader import make_loader, unpack
from cachetrain.data.ram import RamCache, needed_bytes
from cachetrain.data.sidecar import read_header, read_sidecar
from cachetrain.modeling.conditioning import Conditioning
from cachetrain.training import options

SIZES = (".img_sdxl", ".wide")
TEXT, ORDERS = ".txt_t5cache", ".orders"
REQUIRED = ["--model", "x", "--output_dir", "x", "--train_data_dir", "x"]


# Crops


@pytest.fixture(scope="module")
def cropped(shapes, model_t5, tmp_path_factory):
    """Three images with up to 3 crops, mirrored and masked: wide, tall, and square, which has one."""
    data = tmp_path_factory.mktemp("cropped")
    for name, size in (("0", (150, 90)), ("1", (70, 200)), ("2", (64, 64))):
        Image.fromarray(picture(*size, int(name))).save(data / f"{name}.png")
        Image.fromarray(picture(*size, 9)).getchannel("R").save(data / f"{name}.mask.png")
        shutil.copy2(shapes / f"0000{name}{TEXT}", data / f"{name}{TEXT}")
    flags = ["--resolution", 64, "--crops", 3, "--flip", "--mask", "files", "--num_workers", 0]
    assert run_script("cache/create_img_sdxl.py", "--data_root", data, "--model", model_t5, *flags) == 0
    return data


def test_sizes_of_which_one_has_no_masks_are_refused_with_masked_loss(cropped, model_t5, tmp_path):
    data = shutil.copytree(cropped, tmp_path / "data")
    flags = ["--resolution", 128, "--cache_suffix", ".img_128", "--num_workers", 0]
    assert run_script("cache/create_img_sdxl.py", "--data_root", data, "--model", model_t5, *flags) == 0
    flags = ["--imgcache_suffix", ".img_sdxl", ".img_128", "--unmasked_weight", 0]
    message = refused(data, model_t5, tmp_path / "run", *flags, "--cond_dropout", 0)
    assert f"{data}/0.img_sdxl with --mask files; {data}/0.img_128 without --mask; cache all sizes" in message


@torch.no_grad()
def test_each_crop_is_encoded_from_its_box_which_is_kept(cropped, model_t5):
    vae = AutoencoderKL.from_pretrained(model_t5 / "vae", torch_dtype=torch.float32).eval()
    for name, number in (("0", 3), ("1", 3), ("2", 1)):
        tensors, header = read_sidecar(cropped / f"{name}.img_sdxl")
        kinds = Counter(tensor.partition(".")[0] for tensor in tensors)
        assert kinds == {"latent": number, "latent_flip": number, "mask": number}
        image = Image.open(cropped / f"{name}.png")
        mask = Image.open(cropped / f"{name}.mask.png")
        boxes = set()
        for end in ["", ".1", ".2"][:number]:
            box = tuple(map(float, header.metadata["crop_box" + end].split(",")))
            assert (box[2] - box[0], box[3] - box[1]) == pytest.approx([min(image.size)] * 2, abs=1e-3)
            boxes.add(box)
            pixels = np.array(image.resize((64, 64), Image.Resampling.BICUBIC, box=box))
            pixels = torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1
            for tensor, view in (("latent", pixels), ("latent_flip", pixels.flip(3))):
                expected = vae.encode(view).latent_dist.mean[0]
                # 6 digits of the box are kept, which may move a pixel by one level.
                torch.testing.assert_close(tensors[tensor + end].float(), expected, atol=0.02, rtol=0)
            gray = np.array(mask.resize((64, 64), Image.Resampling.BICUBIC, box=box), float) / 255
            torch.testing.assert_close(
                tensors["mask" + end][0].double(),
                torch.tensor(gray.reshape(8, 8, 8, 8).mean((1, 3))),
                atol=4e-3,
                rtol=0,
            )
        assert len(boxes) == number
    assert header.metadata["crop_box"] == "0,0,64,64"


def test_places_of_crops_are_inside_spread_and_the_same_in_each_run(tmp_path, model_t5, capsys):
    boxes = images.crop_boxes((200, 100), 50, 50, 64, seed=7)
    assert boxes[0] == (50, 0, 150, 100) and boxes == images.crop_boxes((200, 100), 50, 50, 64, seed=7)
    lefts = np.array([box[0] for box in boxes[1:]])
    assert all(0 <= left and right <= 200 and right - left == pytest.approx(100) for left, _, right, _ in boxes)
    assert abs(lefts.mean() - 50) < 15 and lefts.min() < 10 and lefts.max() > 90
    assert len(images.crop_boxes((102, 100), 100, 100, 64)) == 3 and len(images.crop_boxes((1, 1), 64, 64, 4)) == 1
    save_pictures(tmp_path, ["a.png", "b.png"], (150, 90))
    size = ["--data_root", tmp_path, "--model", model_t5, "--resolution", 64, "--num_workers", 0]

    def made(*flags):
        before = sidecars(tmp_path, SIZES[0])
        assert run_script("cache/create_img_sdxl.py", *size, *flags) == 0
        return changed(before, sidecars(tmp_path, SIZES[0]))

    assert made("--crops", 3) == ["a", "b"] and made("--crops", 3) == []
    first = {name: read_sidecar(tmp_path / f"{name}{SIZES[0]}") for name in "ab"}
    assert made("--crops", 3, "--overwrite") == ["a", "b"]
    places = set()
    for name, (tensors, header) in first.items():
        again, other = read_sidecar(tmp_path / f"{name}{SIZES[0]}")
        assert all(torch.equal(again[key], tensors[key]) for key in tensors)
        assert other.metadata["crop_box.2"] == header.metadata["crop_box.2"]
        places.add(header.metadata["crop_box.2"])
    assert len(places) == 2
    capsys.readouterr()
    assert run_script("cache/cache_status.py", "--data_root", tmp_path) == 0
    output = capsys.readouterr().out
    assert "  2 with 3 crops\n" in output and "--resolution 64 --crops 3" in output
    assert made() == ["a", "b"] and "crop_box.1" not in read_header(tmp_path / f"a{SIZES[0]}").metadata


def test_a_visit_draws_a_crop_with_its_time_ids_and_mask_and_validation_takes_the_first(cropped):
    index = PairIndex([cropped], *T5)
    tensors, header = read_sidecar(cropped / "0.img_sdxl")
    pairs = open_pairs(index, masked=True, flip_p=0.5)
    pairs.conditioning = Conditioning("txt_t5cache", zero_pooled=8)  # of an SDXL UNet
    drawn = Counter()
    for epoch in range(60):
        sample = pairs[SampleKey(epoch, 0, epoch % 2)]
        number = int(rng.generator(0, epoch, 0, rng.CROP, epoch % 2).random() * 3)
        flipped = rng.generator(0, epoch, 0, rng.FLIP, epoch % 2).random() < 0.5
        end = f".{number}" if number else ""
        assert torch.equal(sample["latents"], tensors[("latent_flip" if flipped else "latent") + end].float())
        mask = tensors["mask" + end].float()
        assert torch.equal(sample["mask"], mask.flip(2) if flipped else mask)
        left, top, right, _ = map(float, header.metadata["crop_box" + end].split(","))
        left = 150 - right if flipped else left
        ids = [90, 150, round(top * 64 / 90), round(left * 64 / 90), 64, 64]
        assert sample["condition"]["time_ids"].tolist() == ids
        drawn[number] += 1
    assert min(drawn[number] for number in range(3)) > 8
    first = open_pairs(index, crop=False)
    assert all(torch.equal(first[SampleKey(e, 0)]["latents"], tensors["latent"].float()) for e in range(9))
    assert 0.4 < len(RamCache(index)._data) / needed_bytes(index) < 1.3


# Sizes


@pytest.fixture(scope="module")
def two_sizes(shapes, model_t5, tmp_path_factory):
    """The first 12 drawn shapes, cached at 64 x 64 and at 96 x 64 (width x height)."""
    data = tmp_path_factory.mktemp("sizes")
    for path in [*shapes.glob("0000?.*"), *shapes.glob("0001[01].*"), *shapes.glob("_null*")]:
        shutil.copy2(path, data)
    argv = ["--data_root", data, "--model", model_t5, *WIDE, "--cache_suffix", SIZES[1]]
    assert run_script("cache/create_img_sdxl.py", *argv) == 0
    argv = ["--data_root", data, "--model", model_t5, "--shuffle_tags", 3, "--tag_separator", " "]
    assert run_script("cache/create_t5cache_768.py", *argv, "--cache_suffix", ORDERS) == 0
    return data


def loaded(index, ranks, num_workers):
    """Bytes of latents, noise and text of the samples of each step, sorted, as the loaders of all ranks give them."""
    steps = [[] for _ in range(6)]
    for rank in range(ranks):
        sampler = BatchSampler(index, 4 // ranks, 3, len(steps), rank=rank, ranks=ranks)
        loader = make_loader(open_pairs(index, seed=3), sampler, num_workers, pin_memory=False)
        for step, batch in zip(steps, map(unpack, loader), strict=True):
            hidden, mask = batch["conditioning"].values()
            texts = [tokens[real] for tokens, real in zip(hidden, mask, strict=True)]  # ranks pad to other lengths
            rows = zip(batch["latents"], batch["noise"], texts, strict=True)
            step += [b"".join(tensor.numpy().tobytes() for tensor in row) for row in rows]
    return [sorted(step) for step in steps]


def visits(index, epochs, batch_size=4):
    """The keys of the batches of some epochs, in order."""
    number = int(epochs * index.samples_per_epoch / batch_size)
    return list(BatchSampler(index, batch_size, 3, number))


def test_each_visit_draws_a_size_and_batches_are_of_one(two_sizes):
    index = PairIndex([two_sizes], SIZES, TEXT)
    assert len(index) == 24 and index.num_pairs == 12 and index.samples_per_epoch == 12
    batches = visits(index, 40)
    for batch in batches:
        assert len({index.shape(key.sample) for key in batch}) == 1
    counts = Counter((key.epoch, key.sample // 2) for batch in batches for key in batch)
    for epoch in range(37):  # those that wait for a full batch are of the last epochs
        assert [counts[epoch, pair] for pair in range(12)] == [1] * 12
    drawn = Counter(key.sample % 2 for batch in batches for key in batch)
    assert 200 < drawn[0] < 280
    one = {key.epoch: key.sample % 2 for batch in batches for key in batch if key.sample // 2 == 5}
    assert [one[epoch] for epoch in range(30)] == [
        int(rng.generator(3, epoch, 0, rng.SIZE).random(12)[5] * 2) for epoch in range(30)
    ]
    pairs = open_pairs(index)
    for key in (SampleKey(0, 10), SampleKey(0, 11)):
        path = two_sizes / f"00005{SIZES[key.sample % 2]}"
        assert index.image_path(key.sample) == str(path)
        assert torch.equal(pairs[key]["latents"], read_sidecar(path)[0]["latent"].float())
        assert torch.equal(pairs[key]["condition"]["emb"], pairs[SampleKey(0, 10)]["condition"]["emb"])


def test_with_all_sizes_an_epoch_visits_each_and_repeats_count_for_both(two_sizes):
    index = PairIndex([two_sizes], SIZES, TEXT, [2.0], every_size=True)
    assert index.samples_per_epoch == 48
    counts = Counter((key.sample, key.repeat) for batch in visits(index, 1, 1) for key in batch)
    assert counts == {(sample, repeat): 1 for sample in range(24) for repeat in range(2)}
    drawn = PairIndex([two_sizes], SIZES, TEXT, [2.5])
    counts = Counter((key.epoch, key.sample // 2) for batch in visits(drawn, 20, 1) for key in batch)
    assert {counts[epoch, pair] for epoch in range(19) for pair in range(12)} == {2, 3}
    part = index.subset(index.samples_of(np.array([3, 7])))
    assert [part.relative_name(i) for i in range(len(part))] == ["00003"] * 2 + ["00007"] * 2
    assert part.image_path(3).endswith("00007.wide") and part.samples_per_epoch == 8


def test_ranks_workers_and_resumed_runs_enter_the_same_sequence_of_sizes_and_variants(two_sizes):
    index = PairIndex([two_sizes], SIZES, TEXT)
    whole = visits(index, 10)
    parts = [list(BatchSampler(index, 2, 3, len(whole), rank=rank, ranks=2)) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(first + second)
    for skipped in (1, 7, 20):
        assert list(BatchSampler(index, 4, 3, len(whole), first=skipped)) == whole[skipped:]
    varied = PairIndex([two_sizes], SIZES, ORDERS)
    expected = loaded(varied, 1, 0)
    assert loaded(varied, 2, 0) == loaded(varied, 1, 2) == loaded(varied, 2, 2) == expected
    assert expected != loaded(index, 1, 0)  # of the captions as written


def test_two_ranks_list_the_same_samples_as_one(two_sizes):
    sizes = SIZES[::-1]  # so that the ranks find the shapes in another order than they agree on
    alone, barrier, shared, indexes = PairIndex([two_sizes], sizes, TEXT), threading.Barrier(2), {}, {}

    def work(rank):
        def gather(value):
            shared[rank] = value
            barrier.wait()
            values = [shared[0], shared[1]]
            barrier.wait()
            return values

        world = SimpleNamespace(rank=rank, ranks=2, gather=gather, sum_array=lambda array: sum(gather(array)))
        world.share = lambda make, _: make()
        indexes[rank] = PairIndex([two_sizes], sizes, TEXT, world=world)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in indexes.values():
        assert [index.shape(i) for i in range(24)] == [alone.shape(i) for i in range(24)]
        assert (index.tokens == alone.tokens).all() and index.repeats.sum() == 24
        assert index.num_masked == 0 and index.num_foreign == 0


def test_run_of_two_sizes_resumes_exactly_also_from_memory(two_sizes, model_t5, tmp_path):
    runs, first = Runs(two_sizes, model_t5, tmp_path), tmp_path / "first"
    flags = ["--imgcache_suffix", *SIZES, "--batch_size", 3, "--save_steps", 2, "--max_steps", 4]
    samples = runs.train(first, *flags)
    again = runs.interrupted(first, 2)
    assert runs.train(again, *flags, *RESUME, "--cache_in_ram") == samples[2:]
    assert content(again, 4) == content(first, 4)


def test_a_pair_needs_all_sizes_and_flags_are_checked(two_sizes, shapes, model_t5, tmp_path, capsys):
    data = shutil.copytree(two_sizes, tmp_path / "data")
    (data / f"00003{SIZES[1]}").unlink()
    index = PairIndex([data], SIZES, TEXT)
    assert index.num_pairs == 11 and index.num_unpaired == 2
    with pytest.raises(ValueError, match=r"no pairs of \*\.img_sdxl and \*\.wide and \*\.txt_t5cache"):
        PairIndex([shapes], SIZES, TEXT)
    train(data, model_t5, tmp_path / "run", "--imgcache_suffix", *SIZES, "--max_steps", 1, "--batch_size", 2)
    output = "".join(capsys.readouterr())
    assert "not used: 2 sidecars without a partner (.img_sdxl + .wide + .txt_t5cache)" in output
    assert "0.18 epochs of 11 samples, from 11 pairs; 4x8x8: 50.0%" in output
    assert options.parse_args("", REQUIRED).imgcache_suffix == T5[0]  # as in the settings of older runs
    for flags, error in (
        (["--sizes", "all"], "--sizes needs several --imgcache_suffix"),
        (["--imgcache_suffix", ".a", ".a"], "--imgcache_suffix .a .a: expected each only once"),
    ):
        with pytest.raises(SystemExit):
            options.parse_args("", [*REQUIRED, *flags])
        assert error in capsys.readouterr().err
