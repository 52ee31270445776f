"""cachetrain.json: what a checkpoint remembers of its run's data, so that prompts are encoded and drawn alike."""

import json

import numpy as np


def data_info(index, text_scale):
    """What a checkpoint must remember of the data, so that prompts are encoded and drawn alike later.

    Returns:
        dict: "text", how captions were encoded and then multiplied; "latent_size", the commonest (h, w).
    """
    kind = "txt_t5cache" if index.masked else "txt_clipl"
    text = {"kind": kind, "settings": index.text_settings, "scaling_factor": text_scale}
    commonest = np.bincount(index.shape_ids).argmax()
    return {"text": text, "latent_size": tuple(index.shapes[commonest][1:])}


def checkpoint_info(model_dir):
    """Returns the dict of cachetrain.json: `data_info`, "step", "objective"; a model that was never trained here has
    its encoder's defaults and step 0. "latent_size" None: not known."""
    path = model_dir / "cachetrain.json"
    if path.exists():
        info = json.loads(path.read_text())
    else:
        is_t5 = json.loads((model_dir / "text_encoder" / "config.json").read_text())["model_type"] == "t5"
        text = {"kind": "txt_t5cache" if is_t5 else "txt_clipl", "settings": {}, "scaling_factor": 1.0}
        info = {"text": text, "step": 0}
    return {"latent_size": None} | info
