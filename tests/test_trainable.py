"""What --reinit_*, --unfreeze_* and --targetted_training choose, against lists made from diffusers' modules."""

import argparse
import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from helpers import TINY

from cachetrain.modeling import trainable

TINY_CONFIG = UNet2DConditionModel.load_config(TINY / "unet")
# The published configs: SD1.5's is the class's default but for these; SD2's adds heads by level and linear proj_in.
SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SD2 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
TEXT_PROJ = {**TINY_CONFIG, "encoder_hid_dim": 48, "encoder_hid_dim_type": "text_proj"}


def arguments(*flags):
    parser = argparse.ArgumentParser()
    trainable.add_arguments(parser)
    return parser.parse_args([part for flag in flags for part in flag.split()])


def fresh(config, seed):
    torch.manual_seed(seed)
    return UNet2DConditionModel.from_config(config)


def trained_unet(config=TINY_CONFIG):
    """A UNet in which no tensor has its initial values any more."""
    unet = fresh(config, 99)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter))
    return unet


def on_meta(config):
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def values(unet):
    return {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def trained_names(unet):
    return {name for name, parameter in unet.named_parameters() if parameter.requires_grad}


def expected_names(unet, part):
    """Parameter names of a part, from the modules' classes and from who owns them."""
    modules = list(unet.modules())
    attentions = [m for m in modules if isinstance(m, Attention)]
    cross = [m for m in attentions if m.is_cross_attention]
    groups = {
        "unet": [unet],
        "qk": [layer for m in attentions for layer in (m.to_q, m.to_k)],
        "crossattn": cross,
        "attn2": cross,
        "crossattnout": [m.to_out for m in cross],
        "attention": attentions,
        "in": [unet.conv_in],
        "out": [unet.conv_norm_out, unet.conv_out],
        "time": [unet.time_embedding, *(m.time_emb_proj for m in modules if isinstance(m, ResnetBlock2D))],
        "mid_block": [unet.mid_block],
        "up_blocks 1": [unet.up_blocks[1]],
        "down_blocks 0 1": list(unet.down_blocks[:2]),
        "norms": [m for m in modules if isinstance(m, (torch.nn.GroupNorm, torch.nn.LayerNorm))],
        "text_proj": [unet.encoder_hid_proj],
    }
    chosen = {id(parameter) for module in groups[part] for parameter in module.parameters()}
    return {name for name, parameter in unet.named_parameters() if id(parameter) in chosen}


UNFREEZE = ("in", "out", "time", "up_blocks 1", "down_blocks 0 1", "mid_block", "norms", "attention", "attn2")


@pytest.mark.parametrize("config", [TINY_CONFIG, SD15, SD2], ids=["tiny", "sd15", "sd2"])
def test_each_part_is_what_diffusers_modules_say(config):
    for verb, parts in (("reinit", tuple(trainable.REINIT)), ("unfreeze", UNFREEZE)):
        for part in parts:
            unet = on_meta(config)
            trainable.apply(unet, arguments(f"--{verb}_{part}", "--targetted_training"), 0, resumed=True)
            expected = expected_names(unet, part)
            assert trained_names(unet) == expected
            assert expected
    assert {part.split()[0] for part in UNFREEZE} == set(trainable.UNFREEZE) - {"text_proj"}


def test_parts_of_the_tiny_unet_are_these():
    unet = on_meta(TEXT_PROJ)
    trainable.apply(unet, arguments("--reinit_crossattnout --unfreeze_in --unfreeze_out --unfreeze_text_proj"), 0)
    blocks = ["down_blocks.0.attentions.0", "down_blocks.1.attentions.0", "mid_block.attentions.0",
              "up_blocks.0.attentions.0", "up_blocks.0.attentions.1", "up_blocks.1.attentions.0",
              "up_blocks.1.attentions.1"]  # fmt: skip
    layers = [f"{block}.transformer_blocks.0.attn2.to_out.0" for block in blocks]
    layers += ["conv_in", "conv_norm_out", "conv_out", "encoder_hid_proj"]
    assert trained_names(unet) == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_table_counts_sd15_as_the_closed_form_does():
    table = trainable.apply(on_meta(SD15), arguments("--reinit_crossattn", "--unfreeze_attention"), 0, resumed=True)
    rows = {row.part: row[1:] for row in table.rows}
    widths = [320] * 5 + [640] * 5 + [1280] * 6  # of SD1.5's 16 transformer blocks
    cross = sum(2 * c * c + 2 * 768 * c + c for c in widths)  # to_q, to_out; to_k, to_v from 768; a bias at the end
    own = sum(4 * c * c + c for c in widths)
    assert rows["--reinit_crossattn"] == (cross, cross, cross)
    assert rows["--unfreeze_attention"] == (cross + own, cross, cross + own)
    assert rows["UNet"] == (859_520_964, cross, cross + own)  # the size that Stable Diffusion 1.5 is known by
    assert rows["conv_in"] == (4 * 320 * 9 + 320, 0, 0)
    blocks = [row[1:] for row in table.rows if not row.part.startswith("--") and row.part != "UNet"]
    assert tuple(map(sum, zip(*blocks, strict=True))) == rows["UNet"]
    lines = str(table).splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    assert lines[-1].split() == ["UNet", "859,520,964", f"{cross:,}", f"{cross + own:,}"]


def test_reinit_gives_the_values_of_a_fresh_unet_and_leaves_all_others():
    for part in trainable.REINIT:
        unet = trained_unet()
        before, state = values(unet), torch.random.get_rng_state()
        trainable.apply(unet, arguments(f"--reinit_{part}"), 5)
        assert torch.equal(state, torch.random.get_rng_state())
        reference, expected = values(fresh(TINY_CONFIG, 5)), expected_names(unet, part)
        assert changed(before, values(unet)) == expected
        assert all(torch.equal(unet.get_parameter(name), reference[name]) for name in expected)
        assert trained_names(unet) == set(before)  # without --targetted_training everything trains


def test_reinit_unet_is_distributed_as_torch_initializes_its_layers():
    unet = trained_unet()
    trainable.apply(unet, arguments("--reinit_unet"), 1)
    for module in unet.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and module.weight.numel() > 4000:
            # torch's default: uniform within 1 / sqrt(fan_in), so its std is that / sqrt(3).
            assert module.weight.std().item() == pytest.approx(1 / math.sqrt(3 * module.weight[0].numel()), rel=0.06)
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_zero_initialized_layers_are_zero_again():
    # GLIGEN's gates: layers that diffusers itself starts at zero, so that a new branch is silent at first.
    config = {**TINY_CONFIG, "attention_type": "gated"}
    unet = trained_unet(config)
    trainable.apply(unet, arguments("--reinit_unet"), 0)
    gates = [parameter for name, parameter in unet.named_parameters() if "alpha_" in name]
    assert len(gates) == 14
    assert not any(gate.any() for gate in gates)


def test_reinit_casts_to_the_unets_dtype():
    unet = trained_unet().to(torch.bfloat16)
    trainable.apply(unet, arguments("--reinit_in"), 3)
    assert torch.equal(unet.conv_in.weight, fresh(TINY_CONFIG, 3).conv_in.weight.to(torch.bfloat16))


def test_a_step_with_only_cross_attention_changes_nothing_else():
    unet = trained_unet().train()
    original = values(unet)
    trainable.apply(unet, arguments("--reinit_crossattn", "--targetted_training"), 0)
    before, cross = values(unet), expected_names(unet, "crossattn")
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    noisy, text = (torch.randn(size, generator=generator) for size in ((2, 4, 8, 8), (2, 8, 64)))
    unet(noisy, torch.tensor([10, 500]), encoder_hidden_states=text).sample.square().mean().backward()
    optimizer.step()
    assert changed(before, values(unet)) == cross
    assert changed(original, values(unet)) == cross


def test_what_is_initialized_anew_trains_beside_what_is_unfrozen():
    unet = trained_unet()
    trainable.apply(unet, arguments("--reinit_qk", "--unfreeze_out"), 0)
    assert trained_names(unet) == expected_names(unet, "qk") | expected_names(unet, "out")


def test_a_resumed_run_keeps_its_weights_and_its_choice():
    unet = trained_unet()
    before = values(unet)
    table = trainable.apply(unet, arguments("--reinit_qk", "--targetted_training"), 0, resumed=True)
    assert not changed(before, values(unet))
    assert trained_names(unet) == expected_names(unet, "qk")
    assert table.rows[0].part == "--reinit_qk"


def test_without_flags_everything_trains_but_what_the_model_itself_freezes():
    unet = trained_unet()
    table = trainable.apply(unet, arguments(), 0)
    assert trained_names(unet) == set(values(unet))
    assert [row.part for row in table.rows] == [
        "conv_in", "time_embedding", "down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1", "mid_block",
        "conv_norm_out", "conv_out", "UNet",
    ]  # fmt: skip
    unet = fresh({**TINY_CONFIG, "time_embedding_type": "fourier"}, 0)
    trainable.apply(unet, arguments("--reinit_unet", "--targetted_training"), 0)
    assert not unet.time_proj.weight.requires_grad  # random frequencies, fixed by diffusers


@pytest.mark.parametrize("flags, config, message", [
    ("--unfreeze_up_blocks 1 7", {}, r"--unfreeze_up_blocks 7: .* up_blocks.0, up_blocks.1, mid_block"),
    ("--unfreeze_mid_block", {"mid_block_type": None}, "--unfreeze_mid_block: "),
    ("--unfreeze_text_proj", {}, "--unfreeze_text_proj: "),
    ("--targetted_training", {}, "--targetted_training: there is nothing to train"),
    ("--reinit_crossattn", {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
                            "mid_block_type": None}, "--reinit_crossattn: "),
])  # fmt: skip
def test_a_flag_that_names_nothing_is_refused(flags, config, message):
    unet = on_meta({**TINY_CONFIG, **config})
    with pytest.raises(ValueError, match=message):
        trainable.apply(unet, arguments(flags), 0)


def test_numbers_of_blocks_are_checked_when_parsed(capsys):
    with pytest.raises(SystemExit):
        arguments("--unfreeze_down_blocks -1")
    with pytest.raises(SystemExit):
        arguments("--unfreeze_down_blocks two")
    assert "--unfreeze_down_blocks: expected a whole number from 0 to 1000000000, got two" in capsys.readouterr().err
