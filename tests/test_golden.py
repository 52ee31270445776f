"""Each flavour and objective gives the losses that it gave when golden.json was recorded.

A refactor must not move them. On the machine that recorded them the final weights are the same bits:

    GOLDEN=record pytest -n 0 tests/test_golden.py    # writes golden.json
    GOLDEN=exact pytest -n 0 tests/test_golden.py     # compares losses and the hash of the weights bit for bit
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import CLIP, FULL_LOG, T5, WIDE, run_script, train

RECORD = Path(__file__).with_name("golden.json")
MODE = os.environ.get("GOLDEN", "")
# Other CPUs add float32 numbers in another order. After these steps losses differ by less than a tenth of this; a
# wrong weight, timestep or order moves them by more than ten times as much.
TOLERANCE = 2e-3
STEPS = 16
CASES = [
    (flavour, objective, weighting)
    for flavour in ("t5", "sd")
    for objective, weighting in (
        ("epsilon", ("--use_snr",)),
        ("v_prediction", ("--use_snr", "--zero_terminal_snr")),
        ("flow", ()),
    )
]


@pytest.fixture(scope="module")
def two_sizes(shapes, model_t5, tmp_path_factory):
    """Two folders with caches of 64x64 and of 96x64 pixels (width x height)."""
    wide = tmp_path_factory.mktemp("wide")
    for path in sorted(shapes.iterdir()):
        if path.suffix not in (".img_sdxl", ".img_sdvae"):
            shutil.copy2(path, wide / path.name)
    assert run_script("cache/create_img_sdxl.py", "--data_root", wide, "--model", model_t5, *WIDE) == 0
    return shapes, wide


@pytest.mark.parametrize(("flavour", "objective", "weighting"), CASES, ids=str)
def test_losses_and_weights_are_those_recorded(
    flavour, objective, weighting, two_sizes, model_t5, model_sd, tmp_path
):
    out, name = tmp_path / "run", f"{flavour} {objective}"
    model, suffixes = (model_t5, T5) if flavour == "t5" else (model_sd, CLIP)
    flags = ["--objective", objective, *weighting, "--max_steps", STEPS, "--batch_size", 2, "--gradient_accum", 2,
             "--ema_decay", 0.9, "--cond_dropout", 0.2, "--lr", 1e-3, "--scheduler", "cosine",
             "--gradient_clip", 1.0, *FULL_LOG]  # fmt: skip
    lines, _ = train(two_sizes, model, out, *flags, suffixes=suffixes)
    losses = [line["01_Training/loss"] for line in lines if "01_Training/loss" in line]
    assert len(losses) == STEPS
    hashes = {
        part: hashlib.sha256(path.read_bytes()).hexdigest()
        for part in ("unet", "unet_ema")
        for path in (out / f"checkpoint-{STEPS:06d}" / part).glob("*.safetensors")
    }
    assert len(hashes) == 2
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if MODE == "record":
        RECORD.write_text(json.dumps(recorded | {name: {"losses": losses, "sha256": hashes}}, indent=1) + "\n")
        if keep := os.environ.get("GOLDEN_KEEP"):
            shutil.copytree(out, Path(keep) / name.replace(" ", "_"))
    elif MODE == "exact":
        assert (losses, hashes) == (recorded[name]["losses"], recorded[name]["sha256"])
    else:
        np.testing.assert_allclose(losses, recorded[name]["losses"], rtol=TOLERANCE)
