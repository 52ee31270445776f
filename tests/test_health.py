"""Query and key gradients: real trainings in which one attention layer is broken, and one in which none is."""

import shutil

import pytest
from helpers import FULL_LOG, WEIGHTS, json_lines, train
from safetensors.torch import load_file, save_file

LAYER = "up_blocks.1.attentions.0.transformer_blocks.0.attn1"
STEPS = 30


def with_scaled_qk(model, out, scale):
    """A copy of a model in which the query and key weights of LAYER are multiplied by `scale`."""
    shutil.copytree(model, out)
    path = out / "unet" / WEIGHTS
    weights = load_file(path)
    for name in (f"{LAYER}.to_q.weight", f"{LAYER}.to_k.weight"):
        weights[name] *= scale
    save_file(weights, path, {"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("scale", "step", "conditions"),
    [
        (0, 2, ["are exactly zero"]),  # each has its gradient from the other
        (1e-3, 20, ["stay below 0.001 of the value gradients"]),  # attention is uniform
        (3e3, 20, ["stay below 0.001 of the value gradients"]),  # each query attends to one key
    ],
    ids=["dead", "uniform", "saturated"],
)
def test_a_layer_whose_queries_and_keys_do_not_learn_is_named_with_the_step(
    scale, step, conditions, shapes, model_t5, tmp_path, capsys
):
    model = with_scaled_qk(model_t5, tmp_path / "model", scale)
    train(shapes, model, tmp_path / "out", "--max_steps", STEPS, "--batch_size", 2, "--lr", 1e-6, *FULL_LOG)
    lines = json_lines(tmp_path / "out" / "warnings.jsonl")
    assert [line["step"] for line in lines] == [step] * len(conditions)
    said = capsys.readouterr().err
    for line, condition in zip(lines, conditions, strict=True):
        assert line["message"].startswith(f"{LAYER}: query and key gradients {condition}")
        assert f"warning: {line['message']}" in said


def test_a_healthy_run_warns_of_nothing(shapes, model_t5, tmp_path, capsys):
    train(shapes, model_t5, tmp_path / "out", "--max_steps", STEPS, "--batch_size", 4, "--lr", 1e-3, *FULL_LOG)
    assert not (tmp_path / "out" / "warnings.jsonl").exists()
    assert "warning" not in capsys.readouterr().err
