"""--channels of models/compose_*.py: UNets for VAEs with another number of latent channels, shown on outputs."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from helpers import TINY, run_script, weights_of

from cachetrain.modeling import load
from cachetrain.modeling.channels import change_channels


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    """Function of a number of channels: the directory of a VAE with so many."""
    root = tmp_path_factory.mktemp("vaes")

    def make(channels):
        if not (root / str(channels)).exists():
            AutoencoderKL(latent_channels=channels, block_out_channels=(32,)).save_pretrained(root / str(channels))
        return root / str(channels)

    return make


def compose(model, vae, out, *flags):
    parts = ["--unet", model, "--vae", vae, "--clip", TINY / "clip", "--out", out]
    assert run_script("models/compose_sd.py", *parts, *flags) == 0
    return load.load_unet(out / "unet").eval()


@torch.no_grad()
def predicted(unet, latents):
    text = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1)).expand(len(latents), 5, 64)
    return unet(latents, 500, text).sample


def noise(channels):
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(channels))


@pytest.mark.parametrize("channels", [6, 16, 32])
def test_repeated_channels_predict_what_the_old_ones_did_where_latents_agree(channels, model_sd, vaes, tmp_path):
    old = load.load_unet(model_sd / "unet").eval()
    new = compose(model_sd, vaes(channels), tmp_path / "new", "--channels", "repeat")
    copies = torch.arange(channels) % 4
    expected = predicted(old, noise(4))
    torch.testing.assert_close(predicted(new, noise(4)[:, copies]), expected[:, copies], rtol=1e-3, atol=1e-4)
    change_channels(new, 4, "repeat")  # and back
    torch.testing.assert_close(predicted(new, noise(4)), expected, rtol=1e-3, atol=1e-4)


def test_fewer_repeated_channels_predict_the_mean_of_those_they_replace(model_sd, vaes, tmp_path):
    old = load.load_unet(model_sd / "unet").eval()
    new = compose(model_sd, vaes(2), tmp_path / "new", "--channels", "repeat")
    expected = predicted(old, noise(2)[:, [0, 1, 0, 1]])
    torch.testing.assert_close(predicted(new, noise(2)), expected.unflatten(1, (2, 2)).mean(1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("channels", [16, 32])
def test_zeros_keep_what_the_old_channels_predict_whatever_the_new_ones_hold(channels, model_sd, vaes, tmp_path):
    old = load.load_unet(model_sd / "unet").eval()
    new = compose(model_sd, vaes(channels), tmp_path / "new", "--channels", "zero")
    latents = noise(channels)
    found = predicted(new, latents)
    torch.testing.assert_close(found[:, :4], predicted(old, latents[:, :4]), rtol=1e-4, atol=1e-5)
    assert not found[:, 4:].any()
    change_channels(new, 4, "zero")
    before = old.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in new.state_dict().items())


def test_fresh_channels_leave_all_other_weights_and_come_from_the_seed(model_sd, vaes, tmp_path):
    flags = {"a": (), "b": (), "c": ("--seed", 1)}
    for name, more in flags.items():
        compose(model_sd, vaes(16), tmp_path / name, "--channels", "fresh", *more)
    a, b, c = (weights_of(tmp_path / name / "unet") for name in flags)
    before = weights_of(model_sd / "unet")
    changed = {name for name in a if a[name].shape != before[name].shape or not torch.equal(a[name], before[name])}
    assert changed == {f"conv_{name}.{kind}" for name in ("in", "out") for kind in ("weight", "bias")}
    assert all(torch.equal(a[name], b[name]) and a[name].std() > 0 for name in changed)
    assert not any(torch.equal(a[name], c[name]) for name in changed)


def test_a_fresh_unet_takes_the_number_of_the_vae_and_other_ways_have_nothing_to_keep(vaes, tmp_path, capsys):
    for way, words in (("fresh", ""), ("zero", "--channels zero: the UNet starts with new weights")):
        assert compose(TINY / "unet", vaes(16), tmp_path / way, "--channels", way).config.out_channels == 16
        assert words in (said := capsys.readouterr().err) and ("--channels" in said) == bool(words)


def test_a_vae_of_videos_is_refused_before_anything_is_made(model_sd, tmp_path):
    AutoencoderKLTemporalDecoder(block_out_channels=(32,), layers_per_block=1).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="AutoencoderKLTemporalDecoder: encodes video, not images"):
        compose(model_sd, tmp_path / "vae", tmp_path / "new")


def test_channels_change_nothing_where_the_vae_fits(model_sd, tmp_path):
    compose(model_sd, TINY / "vae", tmp_path / "new", "--channels", "fresh")
    before, after = weights_of(model_sd / "unet"), weights_of(tmp_path / "new" / "unet")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_without_channels_the_message_names_the_flag(model_sd, vaes, tmp_path):
    with pytest.raises(ValueError, match=r"expects 4 latent channels, the VAE has 16.*--channels"):
        compose(model_sd, vaes(16), tmp_path / "new")
