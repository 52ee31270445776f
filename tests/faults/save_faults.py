"""A save as the trainer makes one, without training; and a disk that says what happens on it, or fails."""

import builtins
import contextlib
import functools
import io
import json
import os
import shutil
from errno import ENOSPC
from pathlib import Path

import safetensors.torch
import torch
from cache_forks import watching_open
from diffusers import UNet2DConditionModel
from helpers import bare_run

from cachetrain.atomic import remove_leftovers
from cachetrain.checkpoints import save, state
from cachetrain.checkpoints.manifest import NAME, damages
from cachetrain.checkpoints.resume import find_checkpoint
from cachetrain.diffusion.noise_schedulers import make_scheduler
from cachetrain.distributed import World
from cachetrain.training.ema import Ema

OLDER, OLD, NEW, NEXT = 1, 2, 3, 4  # steps that are saved
MAKES = {"open", "write", "save_file", "copyfile", "mkdir", "link", "rename", "replace", "fsync", "chmod"}


class Run:
    """A run of a tiny UNet whose weights and moments at each step follow from the step.

    Args:
        model: pipeline directory; the UNet is a new, still smaller one.
        folder: where the run has its output_dir and its ckpt_dir.
    """

    def __init__(self, model, folder, keep_last=2):
        self.output_dir, self.ckpt_dir, self.model = folder / "run", folder / "web", model
        args = {"save_on_epoch": False, "keep_last": keep_last, "save_every_minutes": None}
        args |= {"ckpt_dir": self.ckpt_dir, "lora_rank": None}
        run = bare_run(args=args, output_dir=self.output_dir, plan=None, world=World(), model_dir=model,
                       noise_scheduler=make_scheduler("epsilon"))  # fmt: skip
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "args.json").write_text("{}\n")
        remove_leftovers(self.output_dir, "checkpoint-*")  # as the trainer does when it starts
        newest = save.checkpoints(self.output_dir)[-1:]
        info = {"objective": "epsilon", "text": {"kind": "txt_t5cache", "settings": {}}}
        self.saving = save.Saving(run, info, frozen=newest[0] if newest else None)
        self.unet = _tiny_unet(model)

    def save(self, step):
        """Saves and waits; returns the checkpoint."""
        self.start_save(step)
        self.saving.wait()
        return save.checkpoint_path(self.output_dir, step)

    def start_save(self, step):
        parameters = list(self.unet.parameters())
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.fill_(step + number / 1000)
        ema = Ema(parameters, 0.9)
        moments = {number: {"exp_avg": -parameter} for number, parameter in enumerate(parameters)}
        self.saving.save(step, self.unet, ema, {"step": step, "optimizer": {"state": moments}})


def copy(folder, target, lost=()):
    """Copies `folder`; files in `lost` become empty. Hard links, but for what can still be written into: files of
    hidden names and in hidden directories."""

    def copy_file(source, target):
        if Path(source) in lost:
            Path(target).touch()
        elif any(part.startswith(".") for part in Path(source).relative_to(folder).parts):
            shutil.copyfile(source, target)
        else:
            os.link(source, target)

    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(folder, target, copy_function=copy_file)


def moments(action, folder, target, power):
    """Runs action() and copies `folder` to target/0, target/1, ...: what is found after a death before each operation
    by which the action changes a file or directory, and behind the last.

    Args:
        power: it is the machine that dies, not the process.

    Returns:
        the copies, in this order.
    """
    cache, copies, busy = LostCache(), [], False

    def before(operation="end", *_):
        nonlocal busy
        if busy or not (power or operation not in ("fsync", "chmod")):  # a kill would leave the same before these
            return
        busy = True  # the copies are no operations of the action
        copies.append(target / str(len(copies)))
        (cache.copy if power else copy)(folder, copies[-1])
        busy = False

    def after(*operation):
        if not busy:
            cache(*operation)

    with watched_disk(before, after):
        action()
        before()
    return copies


def undisturbed(model, folder):
    """(folder of a run of two checkpoints, {step: manifest}, {name of a single file: content}), without any fault."""
    run, expected = Run(model, folder / "start"), {}
    for step in (OLDER, OLD):
        expected[step] = (run.save(step) / NAME).read_bytes()
    goes_on = Run(model, copy(folder / "start", folder / "undisturbed"))
    for step in (NEW, NEXT):
        expected[step] = (goes_on.save(step) / NAME).read_bytes()
    return folder / "start", expected, {path.name: _content(path) for path in goes_on.ckpt_dir.glob("[!.]*")}


def check(run, expected, single_files):
    """Checks all that stands under a final name; returns the newest step. `expected`, `single_files`: as above."""
    for path in save.checkpoints(run.output_dir):
        assert damages(path) == {} and (path / NAME).read_bytes() == expected[save.step_of(path)]
    for path in run.ckpt_dir.glob("[!.]*"):
        assert _content(path) == single_files[path.name]
    newest, frozen_intact = find_checkpoint("latest", run.output_dir)
    assert frozen_intact
    return save.step_of(newest)


def _content(path):
    """Header and payload of a safetensors file, whose header is written in any order."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


@functools.cache
def _tiny_unet(model):
    config = UNet2DConditionModel.load_config(model / "unet")
    tiny = {"block_out_channels": [4, 4], "norm_num_groups": 2, "attention_head_dim": 1}
    return UNet2DConditionModel.from_config(config, **tiny)


@contextlib.contextmanager
def watched_disk(before, after=lambda operation, path, source: None):
    """Calls before(operation, path) ahead of each operation by which code here changes a file or directory, and
    after(operation, path, source) behind it.

    Python's own operations have their names, with "write" for each half of what is written; "copyfile" is what
    follows once its target is open. "save_file" is safetensors', which is watched at its first byte (of a new file
    under another name), in the middle and at its end. `source` is that of a rename. fsync names the file, and does
    nothing else: no machine dies here.
    """
    real = {name: getattr(os, name) for name in ("mkdir", "link", "rename", "replace", "unlink", "rmdir", "chmod")}
    real_open, real_copy = io.open, shutil.copyfile

    def watched(name):
        def call(path, *args, **kwargs):
            target = args[0] if name in ("link", "rename", "replace") else path
            before(name, target)
            result = real[name](path, *args, **kwargs)
            after(name, target, path)
            return result

        return call

    def fsync(file):
        path = os.readlink(f"/proc/self/fd/{file}")
        before("fsync", path)
        after("fsync", path, None)

    def copyfile(source, target, **kwargs):
        before("open", target)
        real_open(target, "wb").close()
        after("open", target, None)
        before("copyfile", target)
        result = real_copy(source, target, **kwargs)
        after("copyfile", target, None)
        return result

    def save_file(tensors, path, metadata=None):
        data = safetensors.torch.save(tensors, metadata)
        temporary = Path(path).with_name(".tmpAbCdEf")
        for part in (b"", data[: len(data) // 2], data):
            before("save_file", path)
            with real_open(temporary, "wb") as file:
                file.write(part)
            after("save_file", temporary, None)
        before("save_file", path)
        temporary.chmod(0o600)
        real["replace"](temporary, path)
        after("save_file", path, None)

    with contextlib.ExitStack() as patches:

        def patch(owner, name, replacement):
            patches.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)

        for name in real:
            patch(os, name, watched(name))
        patch(os, "fsync", fsync)
        watched_open = watching_open(before, after)
        patch(io, "open", watched_open)
        patch(builtins, "open", watched_open)
        patch(shutil, "copyfile", copyfile)
        for module in (safetensors.torch, save, state):
            patch(module, "save_file", save_file)
        yield


class FullDisk:
    """A `before` of `watched_disk`: from operation number `first` of those that make something, no space is left.

    Attributes:
        refused: how often that was said.
    """

    def __init__(self, first):
        self.left, self.refused = first, 0

    def __call__(self, operation, path):
        if operation in MAKES:
            self.left -= 1
            if self.left < 0:
                self.refused += 1
                raise OSError(ENOSPC, os.strerror(ENOSPC))


class LostCache:
    """An `after` of `watched_disk` that knows what a power failure would take: what was not forced to disk."""

    def __init__(self):
        self._files, self._names = set(), []

    def __call__(self, operation, path, source):
        path = Path(path)
        if operation in ("open", "write", "save_file", "copyfile"):
            self._files.add(_identity(path))
        elif operation in ("rename", "replace"):
            self._names.append((Path(source), path))
        elif operation == "fsync":
            self._files.discard(_identity(path))
            self._names = [(old, new) for old, new in self._names if new.parent.resolve() != path]

    def copy(self, folder, target):
        """Copies to `target` what a power failure may leave of `folder`: empty files, names as they were."""
        lost = {path for path in folder.rglob("*") if path.is_file() and _identity(path) in self._files}
        copy(folder, target, lost)
        for old, new in reversed(self._names):
            with contextlib.suppress(OSError, ValueError):  # it lies elsewhere, its parent is gone, the name is taken
                os.rename(target / new.relative_to(folder), target / old.relative_to(folder))


def _identity(path):
    status = os.stat(path)
    return status.st_dev, status.st_ino
