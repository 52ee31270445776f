"""Checkpoints: complete pipelines in which only the trained UNet costs disk space."""

import json
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

from cachetrain.modeling.compose import staged_directory
from cachetrain.modeling.export import export_single_file
from cachetrain.training.distributed import whole

FROZEN = ("vae", "text_encoder", "tokenizer", "projection", "feature_extractor", "safety_checker")
TRIGGER = "trigger.checkpoint"


def checkpoint_path(output_dir, step):
    return Path(output_dir) / f"checkpoint-{step:06d}"


def checkpoints(output_dir):
    """Complete checkpoints of a run, oldest first."""
    return sorted(Path(output_dir).glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.split("-")[1]))


class Saving:
    """Decides when to save, and saves.

    Args:
        plan: Plan.
        world: World; rank 0 writes, and sharded weights come from all.
    """

    def __init__(self, args, plan, world):
        self.output_dir, self.plan, self.world = Path(args.output_dir), plan, world
        self.on_epoch, self.keep_last = args.save_on_epoch, args.keep_last
        self.every_s = args.save_every_minutes and 60 * args.save_every_minutes
        self.ckpt_dir = args.ckpt_dir and Path(args.ckpt_dir)
        self._last_s = time.monotonic()

    def due(self, step):
        """Whether to save after this step. All ranks say the same; none waits for a device."""
        started = step >= self.plan.save_start
        planned = step % self.plan.save_steps == 0 or (self.on_epoch and self.plan.ends_epoch(step))
        asked = self.world.main and (self._triggered() or (started and self._overdue()))
        return self.world.any(asked) or (started and planned) or step == self.plan.max_steps

    def _triggered(self):
        try:
            (self.output_dir / TRIGGER).unlink()
        except FileNotFoundError:
            return False
        return True

    def _overdue(self):
        return bool(self.every_s) and time.monotonic() - self._last_s > self.every_s

    def save(self, step, unet, ema, scheduler, model_dir, info):
        """Writes `<output_dir>/checkpoint-NNNNNN`, which appears under that name only when complete; then removes
        what --keep_last does not keep. With --ckpt_dir it is also written there, as one file.

        Args:
            unet: the module itself, saved to unet/; ema: Ema or None, saved to unet_ema/.
            scheduler: saved to scheduler/.
            model_dir: pipeline directory whose frozen parts belong to the checkpoint (or a bare UNet: none). The
                run's first checkpoint copies them, later ones are hard links to that copy.
            info: JSON-able dict for cachetrain.json: step, objective, how captions were encoded.

        Returns:
            Path of the checkpoint.
        """
        target = checkpoint_path(self.output_dir, step)
        with staged_directory(target, overwrite=True) if self.world.main else nullcontext() as stage:
            self._save_unet(unet, stage, "unet")
            if ema is not None:
                with ema.applied():
                    self._save_unet(unet, stage, "unet_ema")
            if stage:
                earlier = checkpoints(self.output_dir)
                _frozen_parts(earlier[-1] if earlier else Path(model_dir), stage, link=bool(earlier))
                scheduler.save_pretrained(stage / "scheduler")
                _write_index(model_dir, stage, scheduler)
                (stage / "cachetrain.json").write_text(json.dumps(info, indent=2) + "\n")
        if self.world.main and self.ckpt_dir:
            name = f"{self.output_dir.resolve().name}-{step:06d}.safetensors"
            export_single_file(target, self.ckpt_dir / name)
        if self.world.main and self.keep_last:
            for old in checkpoints(self.output_dir)[: -self.keep_last]:
                shutil.rmtree(old.rename(old.with_name(f".{old.name}.removed")))
        self._last_s = time.monotonic()
        self.world.barrier()
        return target

    def _save_unet(self, unet, stage, name):
        """Saves the UNet's weights and config on rank 0; sharded weights come from all ranks."""
        complete = whole(unet, self.world)
        if stage:
            complete.save_pretrained(stage / name)


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
