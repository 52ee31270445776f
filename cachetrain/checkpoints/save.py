"""Checkpoints: complete pipelines, written by a background thread, in which only what is trained costs disk space."""

import glob
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from cachetrain.atomic import remove_directory, remove_leftovers, staged_directory
from cachetrain.checkpoints.export import export_single_file
from cachetrain.checkpoints.info import write_info
from cachetrain.checkpoints.manifest import read_manifest, write_manifest
from cachetrain.checkpoints.state import split_tensors, write_state
from cachetrain.distributed import on_host
from cachetrain.log import warn

FROZEN = ("vae", "text_encoder", "tokenizer", "projection", "feature_extractor", "safety_checker")
PIPELINE = "pipeline.py"
TRIGGER = "trigger.checkpoint"


def checkpoint_path(output_dir, step):
    return Path(output_dir) / f"checkpoint-{step:06d}"


def step_of(checkpoint):
    """The step that the name of a checkpoint says; None: it is not such a name."""
    match = re.fullmatch(r"checkpoint-(\d+)", Path(checkpoint).name)
    return int(match[1]) if match else None


def checkpoints(output_dir):
    """Checkpoints of a run, oldest first: they are complete, but may have been damaged since."""
    found = Path(output_dir).glob("checkpoint-[0-9]*")
    return sorted((path for path in found if step_of(path) is not None), key=step_of)


class Saving:
    """Decides when to save, and saves: a copy in host memory at once, the rest by a background thread.

    Args:
        run: Run. Rank 0 of its `world` writes, and sharded weights come from all. Frozen parts are those of its
            `model_dir` (of a bare UNet: none): the run's first checkpoint copies them, later ones are hard links to
            that copy. Its `noise_scheduler` is saved to scheduler/.
        info: JSON-able dict for cachetrain.json: objective, how captions were encoded, size of latents.
        flush: called before a checkpoint appears, so that logs reach at least as far.
        frozen: an earlier checkpoint whose frozen parts are intact, to link them from; default: none yet.

    Attributes:
        failed: the exception that ended the last save, or None.
    """

    def __init__(self, run, info, flush=lambda: None, frozen=None):
        args = run.args
        self.output_dir = run.output_dir
        self.plan = run.plan
        self.world = run.world
        self.model_dir = run.model_dir
        self.noise_scheduler = run.noise_scheduler
        self.info = info
        self.flush = flush
        self._frozen, self._frozen_files = frozen, read_manifest(frozen) if frozen else {}
        self.on_epoch = args.save_on_epoch
        self.keep_last = args.keep_last
        self.every_s = args.save_every_minutes and 60 * args.save_every_minutes
        self.ckpt_dir = args.ckpt_dir and Path(args.ckpt_dir)
        self.name = self.output_dir.resolve().name
        if self.ckpt_dir and self.world.main:  # it may hold files of other runs, which are being written
            remove_leftovers(self.ckpt_dir, f"{glob.escape(self.name)}-{'[0-9]' * 6}.*")
        self._last_s = time.monotonic()
        self._thread, self._error, self.failed = None, None, None

    def due(self, step, stop=False):
        """Whether to save after this step, and whether it is the last one.

        All ranks get the same answer; none waits for a device.

        Args:
            stop: this rank has been asked to stop.
        """
        started = step >= self.plan.save_start
        planned = step % self.plan.save_steps == 0 or (self.on_epoch and self.plan.ends_epoch(step))
        asked = self.world.main and (self._triggered() or (started and self._overdue()))
        asked, stop = self.world.any(asked, stop)
        return asked or stop or (started and planned) or step == self.plan.max_steps, stop

    def _triggered(self):
        try:
            (self.output_dir / TRIGGER).unlink()
        except FileNotFoundError:
            return False
        return True

    def _overdue(self):
        return bool(self.every_s) and time.monotonic() - self._last_s > self.every_s

    def save(self, step, unet, ema, state):
        """Starts to write `<output_dir>/checkpoint-NNNNNN`, which appears under that name only when complete; then
        what --keep_last does not keep is removed. With --ckpt_dir it is also written there, as one file.

        Training goes on once everything has been copied to host memory. A save that is still being written is waited
        for first.

        Args:
            unet: the module itself, saved to unet/; ema: Ema or None, saved to unet_ema/ in float32.
            state: dict of all else that a resumed run needs, tensors anywhere in it; saved to training_state/.
        """
        self.wait()
        tree, tensors = split_tensors(state)
        weights, tensors = on_host(unet.state_dict(), self.world), on_host(tensors, self.world)
        averages = on_host(ema.named(unet), self.world) if ema is not None else None
        self._last_s = time.monotonic()
        if self.world.main:
            arguments = (step, unet, weights, averages, tree, tensors)
            self._thread = threading.Thread(target=self._guarded, args=arguments, name="checkpoint")
            self._thread.start()

    def wait(self):
        """Waits until what is being saved has been written, or has failed, and says so."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.report()

    def report(self):
        """Says what has gone wrong in the background since the last call."""
        if self._error is not None:
            (step, error), self._error = self._error, None
            warn(
                f"saving step {step} failed: {type(error).__name__}: {error}; training goes on, earlier checkpoints "
                "are as they were, and the next save is tried as planned"
            )

    def finish(self):
        """Waits for the last save.

        Returns:
            Path of the newest checkpoint, None without any.

        Raises:
            ValueError: the last save failed.
        """
        self.wait()
        newest = checkpoints(self.output_dir)[-1:]
        if self.failed is not None:
            kept = f"the newest checkpoint is {newest[0]}" if newest else "there is no checkpoint"
            raise ValueError(f"the last save failed: {self.failed}; {kept}")
        return newest[0] if newest else None

    def _guarded(self, step, *arguments):
        self.failed = None
        try:
            self._write(step, *arguments)
        except Exception as error:  # whatever it is: the loop says it at its next step
            self.failed, self._error = error, (step, error)

    def _write(self, step, unet, weights, averages, tree, tensors):
        target = checkpoint_path(self.output_dir, step)
        with staged_directory(target) as stage:
            _write_unet(unet, weights, stage / "unet")
            if averages is not None:
                averaged = {name: averages.get(name, weight).float() for name, weight in weights.items()}
                _write_unet(unet, averaged, stage / "unet_ema")
            write_state(stage, tree, tensors)
            known = self._bring_frozen_parts(stage)
            self.noise_scheduler.save_pretrained(stage / "scheduler")
            _write_index(self.model_dir, stage, self.noise_scheduler)
            write_info(stage, step, self.info)
            files = write_manifest(stage, known)
            self.flush()
        self._frozen, self._frozen_files = target, files
        if self.keep_last:
            for old in checkpoints(self.output_dir)[: -self.keep_last]:
                remove_directory(old)
        if self.ckpt_dir:
            try:
                export_single_file(target, self.ckpt_dir / f"{self.name}-{step:06d}.safetensors")
            except OSError as error:
                raise OSError(f"{target} is complete, but its single file is not written: {error}") from error

    def _bring_frozen_parts(self, stage):
        """Brings frozen components and pipeline.py into `stage`; returns the manifest's entries of what is linked."""
        known = {}
        for name in list(filter(is_frozen, self._frozen_files)) or _frozen_names(self.model_dir):
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            if self._frozen is not None and _linked(self._frozen / name, stage / name):
                known[name] = self._frozen_files[name]
            else:  # also one that somebody has removed from the checkpoint
                shutil.copyfile(self.model_dir / name, stage / name)
        return known


def is_frozen(name):
    """Whether a file of a checkpoint, by its path in it, never changes in a run."""
    return name.split("/")[0] in (*FROZEN, PIPELINE)


def _frozen_names(model_dir):
    paths = [path for name in FROZEN for path in sorted((model_dir / name).rglob("*")) if path.is_file()]
    paths += [model_dir / PIPELINE] if (model_dir / PIPELINE).exists() else []
    return [path.relative_to(model_dir).as_posix() for path in paths]


def _linked(path, link):
    """Makes a hard link; False where the file system has none."""
    try:
        os.link(path, link)
    except OSError:
        return False
    return True


def _write_unet(unet, weights, directory):
    unet.save_config(directory)
    save_file(weights, directory / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})


def _write_index(model_dir, stage, scheduler):
    """model_index.json of the model, with the scheduler that belongs to the trained objective."""
    source = model_dir / "model_index.json"
    if source.exists():
        index = json.loads(source.read_text())
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        (stage / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
