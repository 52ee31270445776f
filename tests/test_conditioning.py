"""What the UNet is told besides its latents lives in one module: a made-up third kind of text cache, of a sequence
and a vector, needs a row in its table and nothing else."""

import shutil

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from helpers import FULL_LOG, train, weights_of

from cachetrain.checkpoints.info import checkpoint_info
from cachetrain.data.batching import collate
from cachetrain.data.dataset import CachedPairs, Draws, LatentScaling, SampleKey
from cachetrain.data.index import PairIndex
from cachetrain.data.loader import make_loader, unpack
from cachetrain.data.sidecar import read_sidecar, write_sidecar
from cachetrain.modeling import conditioning, load
from cachetrain.modeling.conditioning import Conditioning, TextKind
from cachetrain.sampling.render import Drawing, Renderer

KIND, SUFFIX = "txt_madeup", ".txt_madeup"
WIDTH, POOLED = 64, 32


@pytest.fixture
def row(monkeypatch):
    """The table with a row for the made-up kind."""
    new = TextKind("create_madeup.py", "t5", masked=True, vectors={"pooled": "text_embeds"}, time_ids=True)
    monkeypatch.setitem(conditioning.KINDS, KIND, new)
    return new


@pytest.fixture(scope="module")
def data(shapes, tmp_path_factory):
    """The shapes with made-up text sidecars: `emb` of 2 to 8 tokens and `pooled`, all different."""
    root = tmp_path_factory.mktemp("madeup")
    generator = torch.Generator().manual_seed(1)
    for path in sorted(shapes.glob("*.img_sdxl")):
        shutil.copy2(path, root)
    for number, path in enumerate([root / "_null_caption", *sorted(root.glob("*.img_sdxl"))]):
        tensors = {
            "emb": torch.randn(2 + number % 7, WIDTH, generator=generator),
            "pooled": torch.randn(POOLED, generator=generator),
        }
        write_sidecar(path.with_suffix(SUFFIX), tensors, {"kind": KIND, "encoder": "0" * 64, "settings": "{}"})
    return root


@pytest.fixture(scope="module")
def model(model_t5, tmp_path_factory):
    """The tiny T5 flavour with a UNet that also takes a pooled vector and time ids, as SDXL's does."""
    out = tmp_path_factory.mktemp("madeup_model") / "model"
    shutil.copytree(model_t5, out)
    config = UNet2DConditionModel.load_config(out / "unet") | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": POOLED + 6 * 8,
    }
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config).save_pretrained(out / "unet")
    return out


def open_pairs(data, **draws):
    index = PairIndex([data], ".img_sdxl", SUFFIX)
    how = Conditioning(index.text_kind)
    null = how.of_caption(read_sidecar(data / f"_null_caption{SUFFIX}")[0])
    return CachedPairs(index, LatentScaling(0.5), how, Draws(**draws), null)


def test_index_measures_all_tensors_of_the_new_kind(row, data):
    index = PairIndex([data], ".img_sdxl", SUFFIX)
    assert index.text_kind == KIND and index.text_widths == {"emb": WIDTH, "pooled": POOLED}
    stored = [read_sidecar(index.text_path(i))[0]["emb"].shape[0] for i in range(len(index))]
    assert index.tokens.tolist() == stored


def test_sidecar_without_one_of_the_tensors_is_refused_by_name(row, data, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    victim = sorted(root.glob("[0-9]*" + SUFFIX))[3]
    tensors, header = read_sidecar(victim)
    del tensors["pooled"]
    write_sidecar(victim, tensors, {key: header.metadata[key] for key in ("kind", "encoder", "settings")})
    with pytest.raises(ValueError, match=rf"{victim.name}: expected a tensor 'pooled' of 1 dimensions"):
        PairIndex([root], ".img_sdxl", SUFFIX)


def test_unknown_kind_is_refused_by_name(data):
    with pytest.raises(ValueError, match=f"'{KIND}' are not supported; expected one of txt_clipl"):
        PairIndex([data], ".img_sdxl", SUFFIX)


def test_loader_batches_hold_what_the_sidecars_hold(row, data):
    pairs = open_pairs(data)
    keys = [[SampleKey(0, i) for i in (5, 1, 3)]]
    [packed] = make_loader(pairs, keys, num_workers=0, pin_memory=False)
    arguments = unpack(packed)["conditioning"]
    assert set(arguments) == {"encoder_hidden_states", "encoder_attention_mask", "added_cond_kwargs"}
    for row_number, i in enumerate((5, 1, 3)):
        stored = read_sidecar(pairs.index.text_path(i))[0]
        length = len(stored["emb"])
        assert torch.equal(arguments["encoder_hidden_states"][row_number, :length], stored["emb"])
        assert not arguments["encoder_hidden_states"][row_number, length:].any()
        assert arguments["encoder_attention_mask"][row_number].tolist() == [place < length for place in range(8)]
        assert torch.equal(arguments["added_cond_kwargs"]["text_embeds"][row_number], stored["pooled"])
    # The drawn images are 64 x 64 and not cropped.
    assert arguments["added_cond_kwargs"]["time_ids"].tolist() == 3 * [[64, 64, 0, 0, 64, 64]]


def test_time_ids_are_in_pixels_of_the_resized_image(row):
    # 200 x 100 covers 64 x 64 as 128 x 64: 32 pixels are cut on each side.
    header = {"width": "64", "height": "64", "original_width": "200", "original_height": "100"}
    ids = Conditioning(KIND).of_image(header | {"crop_box": "50,0,150,100"})["time_ids"]
    assert ids.tolist() == [100, 200, 0, 32, 64, 64]
    with pytest.raises(ValueError, match="needs each image's size and crop"):
        Conditioning(KIND).of_image({})


def test_dropped_caption_is_the_null_in_all_its_tensors(row, data):
    pairs = open_pairs(data, cond_dropout=1.0)
    null = read_sidecar(data / f"_null_caption{SUFFIX}")[0]
    sample = pairs[SampleKey(0, 2)]
    assert sample["dropped"]
    assert torch.equal(sample["condition"]["emb"], null["emb"])
    assert torch.equal(sample["condition"]["pooled"], null["pooled"])
    assert sample["condition"]["time_ids"].tolist() == [64, 64, 0, 0, 64, 64]  # of the image, dropped or not


def test_prediction_is_that_of_the_unet_called_by_hand(row, data, model):
    unet, pairs = load.load_unet(model / "unet").eval(), open_pairs(data)
    batch = collate([pairs[SampleKey(0, i)] for i in range(4)], pairs.conditioning)
    with torch.no_grad():
        timesteps = torch.tensor([10, 300, 500, 900])
        ours = conditioning.predict(unet, batch["noise"], timesteps, batch["conditioning"])
        for i in range(4):  # each alone, without padding
            stored = read_sidecar(pairs.index.text_path(i))[0]
            added = {"text_embeds": stored["pooled"][None], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
            alone = unet(
                batch["noise"][i : i + 1], timesteps[i : i + 1], stored["emb"][None], added_cond_kwargs=added
            ).sample
            torch.testing.assert_close(ours[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_pictures_are_those_of_a_loop_by_hand(cfg, row, data, model):
    unet, vae = load.load_unet(model / "unet").eval(), load.load_vae(model / "vae")
    scheduler, pairs = DDIMScheduler(), open_pairs(data)
    condition, negative = pairs[SampleKey(0, 1)]["condition"], pairs[SampleKey(0, 4)]["condition"]
    drawing = Drawing("a", "a", "", seed=7, latent_size=(8, 8), condition=condition, negative_condition=negative)
    renderer = Renderer(unet, vae, scheduler, pairs.conditioning, num_inference_steps=3, batch_size=2)
    [(_, _, picture)] = renderer.draw([drawing], [cfg])

    def alone(latents, timestep, one):
        added = {"text_embeds": one["pooled"][None], "time_ids": one["time_ids"][None]}
        return unet(latents, timestep, one["emb"][None], added_cond_kwargs=added).sample

    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(7))[None]
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = alone(latents, timestep, condition)
            if cfg != 1:
                unconditional = alone(latents, timestep, negative)
                output = unconditional + cfg * (output - unconditional)
            latents = scheduler.step(output, timestep, latents).prev_sample
        decoded = vae.decode(latents / vae.config.scaling_factor).sample[0].clamp(-1, 1)
    by_hand = decoded.mul(127.5).add(127.5).round().permute(1, 2, 0).numpy()
    assert abs(by_hand - torch.tensor(list(picture.getdata())).reshape(64, 64, 3).numpy()).max() <= 1


@pytest.mark.parametrize("in_ram", [(), ("--cache_in_ram",)], ids=["from disk", "in memory"])
def test_a_run_trains_validates_logs_and_saves_with_the_new_kind(in_ram, row, data, model, tmp_path):
    out = tmp_path / "run"
    flags = ["--batch_size", 4, "--max_steps", 4, "--lr", 1e-2, "--diagnostic_steps", 2, "--cond_dropout", 0.3]
    flags += ["--val_split", 0.2, "--ema_decay", 0.9, *in_ram, *FULL_LOG]
    lines, after = train(data, model, out, *flags, suffixes=(".img_sdxl", SUFFIX))
    last = lines[-1]
    assert last["val/loss"] > 0 and last["07_Noise_Analysis/embedding_norm"] > 0
    assert checkpoint_info(out / "checkpoint-000004")["text"]["kind"] == KIND
    before = weights_of(model / "unet")
    embedding = "add_embedding.linear_1.weight"  # of the pooled vector and the time ids: it has learned
    assert not torch.equal(before[embedding], after[embedding])
