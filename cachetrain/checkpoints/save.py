"""Saves checkpoints, written by a background thread: complete diffusers pipelines, whose frozen parts are hard links,
or adapters."""

import glob
import json
import os
import re
import shutil
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from cachetrain.atomic import atomic_write, remove_directory, remove_leftovers, staged_directory
from cachetrain.checkpoints.adapters import is_adapter
from cachetrain.checkpoints.export import export_single_file
from cachetrain.checkpoints.export_adapter import export_adapter
from cachetrain.checkpoints.info import FILE, write_info
from cachetrain.checkpoints.manifest import NAME, read_manifest, write_manifest
from cachetrain.checkpoints.state import split_tensors, write_state
from cachetrain.data.ram import available_bytes
from cachetrain.distributed import copy_to_host
from cachetrain.log import first_line, warn
from cachetrain.modeling import lora
from cachetrain.modeling.files import component_files, pipeline_code, read_json

FROZEN = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "projection")
PIPELINE = "pipeline.py"
TRIGGER = "trigger.checkpoint"


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return Path(output_dir) / f"checkpoint-{step:06d}"


def step_of(checkpoint: Path) -> int | None:
    """Returns the step in the name of a checkpoint; None if the name is not that of a checkpoint."""
    match = re.fullmatch(r"checkpoint-([0-9]+)", Path(checkpoint).name)
    return int(match[1]) if match else None


def checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, oldest first. They are complete, but may have been damaged since.

    Directories of other trainers, which may have similar names, are left out.
    """
    steps = {path: step_of(path) for path in Path(output_dir).glob("checkpoint-[0-9]*")}
    found = (path for path, step in steps.items() if step is not None and path == checkpoint_path(output_dir, step))
    return sorted((path for path in found if any((path / name).exists() for name in (NAME, FILE))), key=steps.get)


def newest_checkpoint(output_dir: Path) -> Path | None:
    """Returns the last of `checkpoints`, or None."""
    return next(reversed(checkpoints(output_dir)), None)


class Saving:
    """Decides when to save, and saves: copies to host memory at once, and writes in a background thread.

    Frozen parts (VAE, text encoder, ...) of a pipeline are copied from the model into the run's first checkpoint;
    later checkpoints link to that copy.

    Args:
        run: Run. Rank 0 of its `world` writes. Frozen parts are those of its `model_dir`; a bare UNet has none. Its
            `noise_scheduler` is saved to scheduler/.
        info: JSON-able dict for cachetrain.json (Run.data_info).
        flush: called before a checkpoint appears, so that the logs reach at least as far as the checkpoint.
        frozen: earlier checkpoint with intact frozen parts to link to; default: none.

    Attributes:
        failed: the exception that ended the last save, or None.
        intact: the step whose weights, optimizer state and averages are in memory, set by the training loop. None: an
            update is under way.
    """

    def __init__(self, run, info: dict, flush: Callable[[], None] = lambda: None, frozen: Path | None = None):
        args = run.args
        self.args = args
        self.output_dir = run.output_dir
        self.plan = run.plan
        self.world = run.world
        self.model_dir = run.model_dir
        self.noise_scheduler = run.noise_scheduler
        self._model_index = None if args.lora_rank else read_index(run.model_dir, run.noise_scheduler)
        self.info = info
        self.flush = flush
        self._frozen = frozen
        self._frozen_files = read_manifest(frozen) if frozen else {}
        self._sources = {} if args.lora_rank else frozen_files(run.model_dir)
        self.on_epoch = args.save_on_epoch
        self.keep_last = args.keep_last
        self.every_s = args.save_every_minutes and 60 * args.save_every_minutes
        self.ckpt_dir = args.ckpt_dir and Path(args.ckpt_dir)
        self.name = self.output_dir.resolve().name
        if self.ckpt_dir and self.world.main:
            # Only this run's leftovers: other runs may be writing there.
            remove_leftovers(self.ckpt_dir, f"{glob.escape(self.name)}-{'[0-9]' * 6}.*")
        self.failed = None
        self.intact = self._saved_step = 0
        self._last_save_s = time.monotonic()
        self._thread = None
        self._unreported = None  # (step, exception) of a save that failed

    def due(self, step: int, stop: bool = False) -> tuple[bool, bool]:
        """Decides whether to save after a step, and whether to stop. Called by all ranks; no wait for the device.

        Args:
            step: optimizer steps done.
            stop: whether this rank was asked to stop.

        Returns:
            (whether to save, whether to stop); the same on all ranks.
        """
        started = step >= self.plan.save_start
        scheduled = step % self.plan.save_steps == 0 or (self.on_epoch and self.plan.ends_epoch(step))
        requested = self.world.main and (self._triggered() or (started and self._overdue()))
        requested, stop = self.world.any(requested, stop)
        return requested or stop or (started and scheduled) or step == self.plan.max_steps, stop

    def _triggered(self):
        try:
            (self.output_dir / TRIGGER).unlink()
        except OSError:  # there is none, or it is no file of ours
            return False
        return True

    def _overdue(self):
        return bool(self.every_s) and time.monotonic() - self._last_save_s > self.every_s

    def save(self, step: int, unet: torch.nn.Module, ema, state: dict) -> None:
        """Saves `<output_dir>/checkpoint-NNNNNN`, which appears under this name only when complete.

        Returns once everything has been copied to host memory; a background thread writes the checkpoint, removes old
        checkpoints (--keep_last) and exports a single file (--ckpt_dir). Waits for the previous save first. If
        training runs on the CPU and the memory has no room for copies, everything is written before this returns.
        Called by all ranks.

        Args:
            step: optimizer steps done.
            unet: UNet2DConditionModel, not its distributed wrapper; saved to unet/. Of one with an adapter, only that
                is saved, as lora.FILE.
            ema: Ema, saved to unet_ema/ in float32, or None.
            state: dict of everything else that a resumed run needs, JSON-able except for tensors; saved to
                training_state/.
        """
        self.wait()
        self._saved_step = step
        tree, tensors = split_tensors(state)
        weights = lora.trained_state(unet) if lora.is_adapted(unet) else unet.state_dict()
        parts = [weights, ema.named(unet) if ema is not None else {}, tensors]
        copy = self._has_room_for(parts)
        weights, averages, tensors = (copy_to_host(part, self.world, copy) for part in parts)
        self._last_save_s = time.monotonic()
        arguments = (step, unet, weights, averages, tree, tensors)
        if not copy:
            self._write_guarded(*arguments)
        elif self.world.main:
            self._thread = threading.Thread(target=self._write_guarded, args=arguments, name="checkpoint")
            self._thread.start()

    def _has_room_for(self, parts):
        """Whether host memory has room for copies of {name: tensor}; True if they are on another device anyway."""
        tensors = [tensor for part in parts for tensor in part.values()]
        if self.world.ranks > 1 or any(tensor.device.type != "cpu" for tensor in tensors):
            return True
        free = available_bytes()
        return free is None or sum(tensor.nbytes for tensor in tensors) < 0.9 * free

    @contextmanager
    def rescue(self, save: Callable[[int], None], explained: Callable, optimizer=None) -> Iterator[None]:
        """Around the training loop: an error in it ends the run only after the last complete step has been saved.

        An update that was under way is not saved, nor is anything that needs the other ranks, which may be gone.

        Args:
            save: function of the step that calls `Saving.save`.
            explained: checks.explained.
            optimizer: one whose attribute `updating` says that it is updating the weights, if it has one.
        """
        try:
            yield
        except Exception as error:
            if getattr(optimizer, "updating", False):
                self.intact = None
            self._save_intact(save, error)
            raise explained(error, newest_checkpoint(self.output_dir), self.args, self.world) from error

    def _save_intact(self, save, error):
        self.wait()
        if self.intact is None:
            return warn("the error came in the middle of an update of the weights, which is not saved")
        if self.intact == self._saved_step:
            return None
        if self.args.fsdp or self.world.is_peer_failure(error):
            return warn(f"step {self.intact} is not saved, which would need all ranks")
        try:
            save(self.intact)
        except Exception as failure:  # any: the first error is the one to report
            warn(f"step {self.intact} cannot be saved: {type(failure).__name__}: {first_line(failure)}")
        self.wait()

    def wait(self) -> None:
        """Waits until a save in progress is complete or has failed, and warns of a failure."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.report()

    def report(self) -> None:
        """Warns of a save that has failed in the background since the last call."""
        if self._unreported is not None:
            step, error = self._unreported
            self._unreported = None
            warn(
                f"saving step {step} failed: {type(error).__name__}: {error}; training continues, earlier "
                "checkpoints are unchanged, and the next save is tried as scheduled"
            )

    def finish(self) -> Path | None:
        """Waits for the last save.

        Returns:
            the newest checkpoint; None if there is none.

        Raises:
            ValueError: the last save failed.
        """
        self.wait()
        newest = newest_checkpoint(self.output_dir)
        if self.failed is not None:
            last_checkpoint = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint"
            raise ValueError(f"the last save failed: {self.failed}; {last_checkpoint}")
        return newest

    def _write_guarded(self, step, *arguments):
        self.failed = None
        try:
            self._write(step, *arguments)
        except Exception as error:  # any: the training loop reports it at its next step
            self.failed = error
            self._unreported = (step, error)

    def _write(self, step, unet, weights, averages, tree, tensors):
        target = checkpoint_path(self.output_dir, step)
        if not self.output_dir.is_dir():
            warn(
                f"{self.output_dir}: renamed or removed since the run started; made again for the checkpoints from "
                f"step {step} on: move the earlier ones back there before resuming"
            )
            self.output_dir.mkdir(parents=True)
            write_settings(self.args, self.output_dir)
        with staged_directory(target) as stage:
            _write_weights(unet, weights, stage, "unet")
            if averages:
                ema_weights = {name: averages.get(name, weight).float() for name, weight in weights.items()}
                _write_weights(unet, ema_weights, stage, "unet_ema")
            write_state(stage, tree, tensors)
            known = self._add_frozen_parts(stage)
            self.noise_scheduler.save_pretrained(stage / "scheduler")
            if self._model_index is not None:
                write_index(self._model_index, stage)
            write_info(stage, step, self.info)
            files = write_manifest(stage, known)
            self.flush()
        self._frozen = target
        self._frozen_files = files
        if self.keep_last:
            until_now = [path for path in checkpoints(self.output_dir) if step_of(path) <= step]
            for old in until_now[: -self.keep_last]:
                remove_directory(old)
        if self.ckpt_dir:
            try:
                self._export(target, self.ckpt_dir / f"{self.name}-{step:06d}.safetensors")
            except OSError as error:
                raise OSError(
                    f"{target} is complete, but its single file in --ckpt_dir was not written: {error}"
                ) from error

    def _export(self, checkpoint, out):
        if is_adapter(checkpoint):
            return export_adapter(checkpoint, self.model_dir, out)
        return export_single_file(checkpoint, out)

    def _add_frozen_parts(self, stage):
        """Links or copies frozen components and pipeline.py to `stage`; returns manifest entries of linked files."""
        known = {}
        for name, source in self._sources.items():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            if name in self._frozen_files and _linked(self._frozen / name, stage / name):
                known[name] = self._frozen_files[name]
            else:  # also a file that was removed from the earlier checkpoint
                shutil.copyfile(source, stage / name)
        return known


def write_settings(args: Namespace, output_dir: Path) -> None:
    """Writes args.json, the flags of a run; a directory that has it holds a run."""
    atomic_write(output_dir / "args.json", (json.dumps(vars(args), indent=2) + "\n").encode())


def is_frozen(name: str) -> bool:
    """Whether a file, given by its path in a checkpoint, is the same in all checkpoints of a run."""
    return name.split("/")[0] in (*FROZEN, PIPELINE)


def frozen_files(model_dir: Path) -> dict[str, Path]:
    """Returns {path in a checkpoint: file to copy} of the frozen components and pipeline.py; {} for a bare UNet.

    Raises:
        ValueError: a component is incomplete, or its weights cannot be read (`weight_files`).
    """
    directories = {name: model_dir / name for name in FROZEN if (model_dir / name).is_dir()}
    files = {
        f"{name}/{path.name}": path
        for name, directory in directories.items()
        for path in component_files(directory, name)
    }
    code = pipeline_code(model_dir)
    return files | ({PIPELINE: code} if code else {})


def _linked(path, link):
    """Makes a hard link at `link`; returns False if that fails, as on file systems without hard links."""
    try:
        os.link(path, link)
    except OSError:
        return False
    return True


def _write_weights(unet, weights, stage, name):
    """Writes a UNet to its directory in `stage`; an adapter where diffusers looks for it, averages apart."""
    if lora.is_adapted(unet):
        return lora.save(unet, weights, stage if name == "unet" else stage / name)
    unet.save_config(directory := stage / name)
    return save_file(weights, directory / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})


def read_index(model_dir, scheduler):
    """Returns the content of model_index.json: the model's, with the scheduler of the trained objective, or None."""
    source = model_dir / "model_index.json"
    return {**read_json(source), "scheduler": ["diffusers", type(scheduler).__name__]} if source.exists() else None


def write_index(index, stage):
    """Writes model_index.json without the components that are not in `stage`: training neither loads nor copies a
    safety checker, say."""
    present = {
        name: [None, None] if isinstance(value, list) and name[0] != "_" and not (stage / name).is_dir() else value
        for name, value in index.items()
    }
    (stage / "model_index.json").write_text(json.dumps(present, indent=2) + "\n")
