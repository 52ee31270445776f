"""cachetrain.json: how a run encoded its captions and images, so that sampling does the same."""

import json
from pathlib import Path

from cachetrain import cli
from cachetrain.modeling import load, normalisation
from cachetrain.modeling.conditioning import KINDS
from cachetrain.reading import read_json

FILE = "cachetrain.json"
_MAX_SIDE = 8192  # of latents


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
    most_common = index.counts.argmax()
    return {"text": text, "latent_size": tuple(index.shapes[most_common][1:])}


def write_info(directory: Path, step: int, info: dict) -> None:
    """Writes cachetrain.json: the optimizer step, and `info` (Run.data_info)."""
    (directory / FILE).write_text(json.dumps({"step": step, **info}, indent=2) + "\n")


def checkpoint_info(model_dir: Path) -> dict:
    """Reads cachetrain.json. For a model without one, returns the defaults of its text encoder and step 0.

    Returns:
        dict: "text" and "latent_size" (None: unknown) as in `data_info`; "step"; "objective" and "latents"
        (LatentScaling.as_json), only of checkpoints; "base", only of adapters, as of adapters.base_info.

    Raises:
        ValueError: it is not what training writes.
    """
    path = Path(model_dir) / FILE
    if path.exists():
        info = {"latent_size": None, "step": 0} | read_json(path)
        _check(path, info)
        return info | {"text": {"scaling_factor": 1.0} | info["text"]}
    family = load.text_family(model_dir) if (Path(model_dir) / "text_encoder").exists() else "clip"
    kind = next(kind for kind, row in KINDS.items() if row.encoder == family)
    settings = {"force_zeros_for_empty_prompt": load.zeros_for_empty_prompt(model_dir)} if family == "sdxl" else {}
    text = {"kind": kind, "settings": settings, "scaling_factor": 1.0}
    return {"latent_size": None, "text": text, "step": 0}


def _check(path, info):
    """Checks what is read of a cachetrain.json, which need not come from a run of one's own."""
    text, size = info.get("text"), info["latent_size"]
    wrong = [] if _is_count(info["step"]) else ["step"]
    if not (isinstance(text, dict) and text.get("kind") in KINDS and isinstance(text.get("settings"), dict)):
        wrong.append("text")
    elif not _is_factor(text.get("scaling_factor", 1.0)):
        wrong.append("scaling_factor")
    if size is not None and not (
        isinstance(size, list) and len(size) == 2 and all(_is_count(side) and 0 < side <= _MAX_SIDE for side in size)
    ):
        wrong.append("latent_size")
    if "latents" in info and not _is_scaling(info["latents"]):
        wrong.append("latents")
    if "base" in info and not is_base(info["base"]):
        wrong.append("base")
    if wrong:
        raise ValueError(f"{path}: its {wrong[0]} is not one that training writes; get the checkpoint again")


def _is_factor(value):
    return type(value) in (int, float) and cli.scaling_factor.holds(value)


def _is_scaling(value):
    try:
        return isinstance(value, dict) and bool(normalisation.of_values(value, FILE))
    except ValueError:
        return False


def _is_count(value):
    return type(value) is int and 0 <= value < 2**63


def is_base(value: object) -> bool:
    """Whether a value, as read from JSON, can be what adapters.base_info returns."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("model"), str)
        and isinstance(value.get("revision"), str | None)
        and isinstance(value.get("fingerprints"), dict)
        and all(isinstance(text, str) for item in value["fingerprints"].items() for text in item)
        and "unet" in value["fingerprints"]
    )
