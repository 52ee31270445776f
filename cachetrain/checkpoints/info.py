"""cachetrain.json: how a run encoded its captions and images, so that sampling does the same."""

import json
from pathlib import Path

import numpy as np

from cachetrain.modeling import load
from cachetrain.modeling.conditioning import KINDS

FILE = "cachetrain.json"


def data_info(index, text_scale: float) -> dict:
    """Returns what cachetrain.json records of the training data.

    Args:
        index: PairIndex of the training pairs.
        text_scale: value of --text_scaling_factor.

    Returns:
        dict: "text", with the kind, the settings and the scaling factor of the captions; "latent_size", the most
        common (h, w).
    """
    text = {"kind": index.text_kind, "settings": index.text_settings, "scaling_factor": text_scale}
    most_common = np.bincount(index.shape_ids).argmax()
    return {"text": text, "latent_size": tuple(index.shapes[most_common][1:])}


def write_info(directory: Path, step: int, info: dict) -> None:
    """Writes cachetrain.json: the optimizer step, and `info` (Run.data_info)."""
    (directory / FILE).write_text(json.dumps({"step": step, **info}, indent=2) + "\n")


def checkpoint_info(model_dir: Path) -> dict:
    """Reads cachetrain.json. For a model without one, returns the defaults of its text encoder and step 0.

    Returns:
        dict: "text" and "latent_size" (None: unknown) as in `data_info`; "step"; "objective", only of checkpoints.
    """
    path = Path(model_dir) / FILE
    if path.exists():
        return {"latent_size": None} | json.loads(path.read_text())
    family = load.text_family(model_dir) if (Path(model_dir) / "text_encoder").exists() else "clip"
    kind = next(kind for kind, row in KINDS.items() if row.encoder == family)
    settings = {"force_zeros_for_empty_prompt": load.zeros_for_empty_prompt(model_dir)} if family == "sdxl" else {}
    text = {"kind": kind, "settings": settings, "scaling_factor": 1.0}
    return {"latent_size": None, "text": text, "step": 0}
