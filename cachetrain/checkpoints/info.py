"""cachetrain.json: what a checkpoint remembers of its run's data, so that prompts are encoded and drawn alike."""

import json
from pathlib import Path

import numpy as np

FILE = "cachetrain.json"


def data_info(index, text_scale: float) -> dict:
    """What a checkpoint must remember of the data.

    Returns:
        dict: "text", how captions were encoded and then multiplied; "latent_size", the commonest (h, w).
    """
    text = {"kind": index.text_kind, "settings": index.text_settings, "scaling_factor": text_scale}
    commonest = np.bincount(index.shape_ids).argmax()
    return {"text": text, "latent_size": tuple(index.shapes[commonest][1:])}


def write_info(directory: Path, step: int, info: dict) -> None:
    """Writes cachetrain.json: `data_info` and "objective" of a run, and the optimizer step."""
    (directory / FILE).write_text(json.dumps({"step": step, **info}, indent=2) + "\n")


def checkpoint_info(model_dir: Path) -> dict:
    """Reads cachetrain.json; a model that was never trained here has its encoder's defaults and step 0.

    Returns:
        dict: "text" and "latent_size" (None: not known) as in `data_info`; "step"; "objective" of a checkpoint.
    """
    path = Path(model_dir) / FILE
    if path.exists():
        return {"latent_size": None} | json.loads(path.read_text())
    encoder = Path(model_dir) / "text_encoder" / "config.json"
    is_t5 = encoder.exists() and json.loads(encoder.read_text())["model_type"] == "t5"
    text = {"kind": "txt_t5cache" if is_t5 else "txt_clipl", "settings": {}, "scaling_factor": 1.0}
    return {"latent_size": None, "text": text, "step": 0}
