"""Validation: what is held out, and val/loss against a plain loop of diffusers."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from helpers import T5, bare_run, load_script, open_pairs, trainer_argv
from safetensors.torch import load_file

from cachetrain.data import rng
from cachetrain.data.dataset import SampleKey
from cachetrain.data.index import PairIndex
from cachetrain.data.loader import on_device
from cachetrain.data.split import check_apart, split_index, split_positions
from cachetrain.distributed import World
from cachetrain.modeling import load
from cachetrain.training import run as setup
from cachetrain.training.validation import QUANTILES, FixedBatches, Validation

torch.set_num_threads(1)
CPU = torch.device("cpu")


def world(rank=0, ranks=1, total=lambda tensor: tensor):
    return SimpleNamespace(rank=rank, ranks=ranks, main=rank == 0, sum=total, gather=lambda value: [value])


ALONE = world()


def losses_of(model):
    """The losses that a trainer would hand in, of epsilon prediction, written with diffusers."""
    ddpm = DDPMScheduler.from_pretrained(model / "scheduler")

    def losses(unet, batch):
        noisy = ddpm.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
        output = unet(noisy, batch["timesteps"], **batch["conditioning"]).sample
        raw = (output - batch["noise"]).square().mean((1, 2, 3))
        return SimpleNamespace(loss=2 * raw, squared_error=raw)

    return losses


def constant(batch, value):
    """What a forward pass with this loss for every sample would give."""
    losses = torch.full((len(batch["samples"]),), value)
    return SimpleNamespace(loss=losses, squared_error=losses)


def validation(index, world=ALONE, weighted=True, num_workers=0):
    args = {"use_snr": weighted, "batch_size": 5, "num_workers": num_workers}
    run = bare_run(args=args, weighted=args["use_snr"], plan={"validation_steps": 10}, device=CPU, world=world)
    return Validation(run, open_pairs(index))


@pytest.fixture
def index(shapes):
    return PairIndex([shapes], *T5)


@pytest.fixture
def unet(model_t5):
    return load.load_unet(model_t5 / "unet")


def test_a_name_stays_on_its_side_whatever_the_other_names_and_a_larger_share_only_adds():
    names = [f"folder {n % 7}/{n}" for n in range(20_000)]
    validates = split_positions(names, 0.05)
    assert 0.045 < validates.mean() < 0.055
    assert (split_positions(names[::-1], 0.05)[::-1] == validates).all()
    assert (split_positions(names[5000:6000], 0.05) == validates[5000:6000]).all()
    assert not (validates & ~split_positions(names, 0.1)).any()
    assert split_positions(["a\udcff"], 0.99999).all()  # a file name that is not UTF-8


def test_a_split_leaves_each_pair_on_one_side_and_refuses_an_empty_side(index):
    train, held_out = split_index(index, 0.3)
    stems = [{part.stem(i) for i in range(len(part))} for part in (train, held_out, index)]
    assert not stems[0] & stems[1] and stems[0] | stems[1] == stems[2]
    names = [index.stem(i).split("/")[-1] for i in range(len(index))]
    expected = {index.stem(i) for i in np.flatnonzero(split_positions(names, 0.3))}
    assert stems[1] == expected
    with pytest.raises(ValueError, match=r"--val_split 1e-09: selects 0 of 24"):
        split_index(index, 1e-9)


def test_a_validation_folder_inside_the_training_data_is_refused_by_name_through_links_too(shapes, tmp_path):
    inside, apart = tmp_path / "train" / "sub", tmp_path / "apart"
    for folder in (tmp_path / "train", inside, apart):
        folder.mkdir()
        for path in sorted(shapes.glob("*.txt_t5cache"))[:3] + sorted(shapes.glob("*.img_sdxl"))[:3]:
            shutil.copy(path, folder)
    (tmp_path / "link").symlink_to(inside)
    train = PairIndex([tmp_path / "train"], *T5)
    for folder in (inside, tmp_path / "link", tmp_path / "train"):
        with pytest.raises(ValueError, match=f"{folder} is also trained on"):
            check_apart(train, PairIndex([folder], *T5))
    check_apart(train, PairIndex([apart], *T5))
    with pytest.raises(ValueError, match=f"{inside} is also trained on, as {tmp_path / 'link'}"):
        check_apart(PairIndex([tmp_path / "link"], *T5), PairIndex([inside], *T5))


def test_links_to_the_files_of_a_pair_count_once_and_on_one_side(shapes, tmp_path):
    links, farm = tmp_path / "links", tmp_path / "farm"
    for folder, number in ((links, 4), (farm, 2)):
        folder.mkdir()
        for suffix in T5:
            for path in sorted(shapes.glob(f"[0-9]*{suffix}"))[:number]:
                (folder / path.name).symlink_to(path)
    for directories, pairs, repeated in (([shapes, links], 24, 4), ([links, shapes], 24, 4), ([links, farm], 4, 2)):
        index = PairIndex(directories, *T5)
        assert (len(index), index.links.num_repeated) == (pairs, repeated)
    for train, held_out in (([shapes], [links]), ([links], [shapes]), ([links], [farm])):
        with pytest.raises(ValueError, match="is validated and trained on, through a link"):
            check_apart(PairIndex(train, *T5), PairIndex(held_out, *T5))


@pytest.mark.parametrize("ranks", [1, 3, 50])
def test_every_sample_is_once_in_each_quantile_in_batches_of_one_shape_whatever_the_ranks(ranks):
    shape_ids = np.array([0, 1, 0, 2, 0, 1, 0, 0, 1, 0, 0])
    batches = [FixedBatches(shape_ids, 4, rank, ranks) for rank in range(ranks)]
    assert len({len(one) for one in batches}) == 1  # sharded models wait for each other
    visits = []
    for one in batches:
        assert list(one) == [one.batch(number) for number in range(len(one))]
        for number, batch in enumerate(one):
            assert 1 <= len(batch) <= 4 and len({shape_ids[visit.sample] for visit in batch}) == 1
            visits += batch if one.counts(number) else []
    assert sorted((v.sample, int(v.uniform * QUANTILES)) for v in visits) == [
        (sample, quantile) for sample in range(len(shape_ids)) for quantile in range(QUANTILES)
    ]
    within = sorted(v.uniform * QUANTILES % 1 for v in visits)[::QUANTILES]
    assert np.diff(within).max() < 2 / len(shape_ids)  # spread over the quantile, too


def test_val_loss_equals_a_plain_loop_over_all_samples_and_quantiles(index, unet, model_t5):
    measured = validation(index).measure(unet, losses_of(model_t5), 1)
    ddpm, reference = DDPMScheduler.from_pretrained(model_t5 / "scheduler"), torch.zeros(QUANTILES)
    other = UNet2DConditionModel.from_pretrained(model_t5 / "unet").eval()
    for i in range(len(index)):
        latents = load_file(index.image_path(i))["latent"].float()[None]
        text = load_file(index.text_path(i))["emb"].float()[None]
        for quantile in range(QUANTILES):
            noise = rng.generator(0, quantile, i, rng.NOISE).standard_normal(latents.shape[1:], np.float32)
            noise = torch.from_numpy(noise)[None]
            t = torch.tensor([int(1000 * (quantile + (0.5 + i * (5**0.5 - 1) / 2) % 1) / QUANTILES)])
            with torch.no_grad():
                error = other(ddpm.add_noise(latents, noise, t), t, text).sample - noise
            reference[quantile] += error.square().mean() / len(index)
    assert [measured[f"val/loss_q{q + 1}"] for q in range(QUANTILES)] == pytest.approx(
        (2 * reference).tolist(), rel=1e-4
    )
    assert measured["val/loss"] == pytest.approx(2 * reference.mean().item(), rel=1e-4)
    assert measured["val/loss_raw"] == pytest.approx(reference.mean().item(), rel=1e-4)
    assert "val/loss_raw" not in validation(index, weighted=False).measure(unet, losses_of(model_t5), 1)


def test_val_loss_is_the_same_each_time_and_touches_nothing_of_training(index, unet, model_t5):
    one, losses = validation(index), losses_of(model_t5)
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = one.measure(unet, losses, 1)
    assert one.measure(unet, losses, 2) == first
    assert validation(index, num_workers=1).measure(unet, losses, 1) == first
    assert torch.equal(state, torch.random.get_rng_state()) and (numpy_state == np.random.get_state()[1]).all()
    assert all(torch.equal(weights[name], tensor) for name, tensor in unet.state_dict().items())
    assert unet.training and all(parameter.grad is None for parameter in unet.parameters())


def held_out(shapes, model_t5, out, *flags):
    """The batches of the validation of a run with these flags."""
    args = load_script("train_from_cached.py").parse_args(
        trainer_argv(shapes, model_t5, out, "--val_split", 0.3, "--cond_dropout", 0, *flags)
    )
    return list(on_device(setup.open_validation(setup.open_run(args, World(CPU)))._loader, CPU))


@pytest.mark.parametrize("objective", ["epsilon", "flow"])
def test_what_validation_measures_does_not_depend_on_how_is_trained(objective, shapes, model_t5, tmp_path):
    plain = held_out(shapes, model_t5, tmp_path, "--objective", objective)
    flags = ["--seed", 3, "--timestep_sampling", "logit_normal", "--timestep_range", 0, 500, "--offset_noise", 0.3]
    other = held_out(shapes, model_t5, tmp_path, "--objective", objective, *flags)
    for one, two in zip(plain, other, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in ("latents", "noise", "timesteps"))
    timesteps = torch.cat([batch["timesteps"] for batch in plain]).sort().values
    assert timesteps[0] < 125 and timesteps[-1] > 875 and timesteps.float().mean() == pytest.approx(500, abs=50)


def test_validation_noise_is_never_that_of_training(shapes, model_t5, tmp_path):
    validation = torch.cat([batch["noise"] for batch in held_out(shapes, model_t5, tmp_path)]).flatten(1)
    pairs = open_pairs(PairIndex([shapes], *T5))  # seed 0
    training = [pairs[SampleKey(epoch, i)]["noise"] for epoch in range(QUANTILES) for i in range(len(pairs))]
    first = {noise[0].item() for noise in validation} & {noise.flatten()[0].item() for noise in training}
    assert len(first) == 0
    assert validation.std().item() == pytest.approx(1, abs=0.02)


def test_ranks_together_measure_what_one_measures(index, unet, model_t5):
    losses, parts = losses_of(model_t5), []
    alone = validation(index).measure(unet, losses, 1)

    def collect(tensor):
        parts.append(tensor.clone())
        return tensor.clamp(min=1e-9)

    for rank in range(3):
        validation(index, world(rank, 3, collect)).measure(unet, losses, 1)
    together = validation(index, world(0, 1, lambda _: sum(parts))).measure(unet, losses, 1)
    assert together == pytest.approx(alone, rel=1e-5)


def test_ema_weights_are_measured_beside_the_raw_ones(index, unet, model_t5):
    from cachetrain.training.ema import Ema

    losses, ema = losses_of(model_t5), Ema(unet.parameters(), 0.99)
    before = validation(index).measure(unet, losses, 1)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.1)
    values = validation(index).measure(unet, losses, 1, ema)
    for part in ("", *(f"_q{quantile + 1}" for quantile in range(QUANTILES))):
        assert values[f"val/loss_ema{part}"] == pytest.approx(before[f"val/loss{part}"], rel=1e-6)
        assert values[f"val/loss{part}"] != pytest.approx(before[f"val/loss{part}"], rel=1e-3)
    assert validation(index).measure(unet, losses, 1)["val/loss"] == values["val/loss"]


def test_a_plateau_is_announced_once_on_the_first_rank(index, unet, capsys):
    def measure(series, one):
        for step, value in enumerate(series):
            one.measure(unet, lambda _, batch, value=value: constant(batch, value), step)
        return capsys.readouterr().err.count("not improved in 5 validations")

    assert measure([5, 4, 4, 4, 4, 4, 3, 3.5, 3.5, 3.5, 3.5], validation(index)) == 0
    assert measure([5, 4, 4, 4, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3], validation(index)) == 1
    assert measure([5, 6, 6, 6, 6, 6, 6], validation(index, world(1, 2))) == 0


def test_validation_is_due_once_an_epoch_and_at_the_end(index):
    one = validation(index)
    one.every_n_steps = 2.5
    assert [step for step in range(1, 12) if one.due(step, 11)] == [3, 5, 8, 10, 11]
