"""Checkpoints: complete pipelines in which only the trained UNet costs disk space."""

import json
import os
import shutil
from pathlib import Path

from cachetrain.modeling.compose import staged_directory

FROZEN = ("vae", "text_encoder", "tokenizer", "projection", "feature_extractor", "safety_checker")


def checkpoint_path(output_dir, step):
    return Path(output_dir) / f"checkpoint-{step:06d}"


def checkpoints(output_dir):
    """Complete checkpoints of a run, oldest first."""
    return sorted(Path(output_dir).glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(output_dir, step, unet, ema, scheduler, model_dir, info):
    """Writes `<output_dir>/checkpoint-NNNNNN`; it appears under that name only when complete.

    Args:
        unet: saved to unet/; ema: Ema or None, saved to unet_ema/.
        scheduler: saved to scheduler/.
        model_dir: pipeline directory whose frozen parts belong to the checkpoint (or a bare UNet: none). The run's
            first checkpoint copies them, later ones are hard links to that copy.
        info: JSON-able dict for cachetrain.json: step, objective, how captions were encoded.

    Returns:
        Path of the checkpoint.
    """
    target = checkpoint_path(output_dir, step)
    earlier = checkpoints(output_dir)
    with staged_directory(target, overwrite=True) as stage:
        _frozen_parts(earlier[-1] if earlier else Path(model_dir), stage, link=bool(earlier))
        unet.save_pretrained(stage / "unet")
        if ema is not None:
            ema.model.save_pretrained(stage / "unet_ema")
        scheduler.save_pretrained(stage / "scheduler")
        _write_index(model_dir, stage, scheduler)
        (stage / "cachetrain.json").write_text(json.dumps(info, indent=2) + "\n")
    return target


def _frozen_parts(source, stage, link):
    """Brings the frozen components and pipeline.py of `source` into `stage`, as links or as copies."""
    bring = os.link if link else shutil.copyfile
    for name in FROZEN:
        for path in sorted(p for p in (source / name).rglob("*") if p.is_file()):
            copy = stage / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            bring(path, copy)
    if (source / "pipeline.py").exists():
        bring(source / "pipeline.py", stage / "pipeline.py")


def _write_index(model_dir, stage, scheduler):
    """model_index.json of the model, with the scheduler that belongs to the trained objective."""
    source = Path(model_dir) / "model_index.json"
    if source.exists():
        index = json.loads(source.read_text())
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        (stage / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
