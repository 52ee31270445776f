"""Goes on from a checkpoint: which one, whether it is the same run, and putting the state back."""

import json
import os
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from cachetrain.checkpoints.manifest import damages
from cachetrain.checkpoints.save import checkpoints, is_frozen, step_of
from cachetrain.checkpoints.state import alike, read_state
from cachetrain.diffusion.noise_schedulers import objective_of
from cachetrain.log import warn

# Flags that do not change what is trained, or whose effect `settings_of` has beside them.
_FREE = {
    "output_dir", "logdir", "log_step", "diagnostic_steps", "log_groups", "save_steps", "save_on_epoch", "save_start",
    "save_every_minutes", "ckpt_dir", "keep_last", "sample_prompt", "sample_prompts", "sample_steps", "sampler_steps",
    "sample_cfgs", "val_data_dir", "val_steps", "num_workers", "cache_in_ram", "max_nonfinite", "train_data_dir",
    "dir_weights", "repeats", "val_split", "max_steps", "warmup_steps", "lr_decay_steps", "learning_rate", "scale_lr",
    "batch_size", "objective", "zero_terminal_snr", "model", "revision", "wandb",
}  # fmt: skip
# What changes rounding, and nothing else.
_ROUNDING = {"device", "compile", "fsdp", "cpu_offload", "gradient_checkpointing", "allow_tf32", "ranks", "torch"}
# What says nothing about the run.
_SILENT = {"resume", "resume_anyway", "copy_config", "overfit"}
# What a state must have, and what an optimizer keeps of each parameter or of its group.
_FIELDS = {"step", "visits", "settings", "trained", "optimizer", "scaler", "statistics", "validation"}
_KEPT = {
    "adamw": {"step", "exp_avg", "exp_avg_sq"}, "stableadamw": {"step", "exp_avg", "exp_avg_sq"}, "lion": {"exp_avg"},
    "adamw8": {"step", "state1", "state2"}, "prodigy": {"step", "exp_avg", "exp_avg_sq", "s", "p0", "d"},
}  # fmt: skip
_KEPT_BF16 = {"kahan_comp", "pending_decay"}
# Settings of an optimizer's groups that are the new run's, not the saved one's.
_SETTINGS = {"betas", "beta1", "beta2", "weight_decay", "eps", "foreach", "fused"}


class Resumed:
    """A checkpoint to go on from, read.

    Args:
        path: of the checkpoint, None: the run begins again.
        frozen_intact: of `find_checkpoint`.

    Attributes:
        path, step: of the checkpoint; None and 0 at the beginning.
        state: dict as Saving.save was given it; {} at the beginning.
        frozen: `path` if its frozen parts are intact, else None.
    """

    def __init__(self, path, frozen_intact):
        self.path, self.frozen = path, path if frozen_intact else None
        self.step, self.state = (step_of(path), read_state(path)) if path else (0, {})
        self._same_optimizer = True
        if path is None:
            return
        self._need(_FIELDS - self.state.keys(), "its training_state")
        if self.state["step"] != self.step:
            raise ValueError(f"{path}: holds step {self.state['step']}; give it back the name of that step")

    def _need(self, missing, where):
        if missing:
            raise ValueError(f"{self.path}: {where} lacks {', '.join(sorted(missing))}; resume from another "
                             "checkpoint, or start a new run from this one with --model")  # fmt: skip

    def check(self, settings, anyway):
        """Lists what differs from the run that was saved.

        Args:
            settings: dict of this run's, as in `state["settings"]`.
            anyway: what would make it another run is a warning, not an error.

        Returns:
            list of str, a line each.

        Raises:
            ValueError: it would be another run.
        """
        if self.path is None:
            return []
        lines, other, saved = [], [], self.state["settings"]
        self._same_optimizer = _kind_of_optimizer(saved) == _kind_of_optimizer(settings)
        for name in sorted((saved.keys() | settings.keys()) - _SILENT):
            was, now = saved.get(name), settings.get(name)
            if was != now:
                line = f"{name}: {was} then, {now} now"
                lines.append(line + (" (equal to rounding only)" if name in _ROUNDING else ""))
                other += [] if name in _FREE or name in _ROUNDING else [line]
        if other and not anyway:
            raise ValueError(f"{self.path}: this would not be the run that was saved: {'; '.join(other)}; give these "
                             "settings as they were, or --resume_anyway")  # fmt: skip
        return lines

    def restore(self, unet, trained, optimizer, ema, scaler):
        """Puts the state back. The UNet's own weights have been loaded before, from `path`/unet.

        Args:
            trained: the trained parameters, in the optimizer's order.
        """
        if self.path is None:
            return
        if not self._same_optimizer:
            warn("the optimizer is another one than before, or its weights have another precision: it starts anew")
        elif self.state["trained"] != trained_names(unet):
            warn("other parameters are trained than before: the optimizer starts anew")
        else:
            self._need(_missing_in_optimizer(self.state), "its optimizer")
            _restore_optimizer(optimizer, self.state["optimizer"], trained)
        if scaler.is_enabled() and self.state["scaler"]:
            scaler.load_state_dict(self.state["scaler"])
        if ema is not None:
            self._restore_ema(unet, ema)
        del self.state["optimizer"]  # as much memory as the optimizer's own

    def _restore_ema(self, unet, ema):
        path = self.path / "unet_ema" / "diffusion_pytorch_model.safetensors"
        if not path.exists():
            self._need({"unet_ema"} if self.state["settings"].get("ema_decay") else (), "it")
            return warn(f"{self.path}: has no unet_ema; the average starts from its weights")
        saved = load_file(path)
        self._need(ema.named(unet).keys() - saved.keys(), path.parent.name)
        with torch.no_grad():
            for name, average in ema.named(unet).items():
                average.copy_(alike(saved[name], average))


def settings_of(args, plan, index, scheduler, world):
    """What makes a run the run it is, JSON-able: its flags, and what they have come to."""
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", torch.zeros(0))
    betas = f"{zlib.crc32(alphas_cumprod.double().numpy().tobytes()):08x}"
    decay_steps = None if args.scheduler.startswith("constant") else plan.decay_steps
    return json.loads(json.dumps(vars(args))) | {
        "ranks": world.ranks,
        "torch": torch.__version__,
        "samples a backward pass, all ranks": args.batch_size * world.ranks,
        "peak rate, warm-up and decay steps": [plan.peak_lr, plan.warmup_steps, decay_steps],
        "noise schedule": f"{objective_of(scheduler)} ({betas})",
        "pairs": f"{len(index):,} ({index.checksum():08x})",
    }


def run_state(step, visits, settings, unet, optimizer, scaler, statistics, validation):
    """What a run goes on from beside its weights and their averages, as a dict for Saving.save.

    Args:
        step, visits: optimizer steps and visits to samples that are done.
        settings: of `settings_of`.
        validation: Validation or None.
    """
    return {
        "step": step,
        "visits": visits,
        "settings": settings,
        "trained": trained_names(unet),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "statistics": statistics.state_dict(),
        "validation": validation.state_dict() if validation else None,
    }


def trained_names(unet):
    """A checksum of the names of what is trained, in order."""
    return zlib.crc32("\n".join(name for name, p in unet.named_parameters() if p.requires_grad).encode())


def _kind_of_optimizer(settings):
    return settings.get("optimizer"), settings.get("precision") == "bf16_pure"


def _missing_in_optimizer(state):
    """Names of what an optimizer that has stepped would have saved, and this one has not."""
    name, bf16 = _kind_of_optimizer(state["settings"])
    kept = _KEPT.get(name, set()) | (_KEPT_BF16 if bf16 else set())
    (group,) = state["optimizer"]["param_groups"]
    return set().union(*(kept - values.keys() - group.keys() for values in state["optimizer"]["state"].values()))


def _restore_optimizer(optimizer, saved, trained):
    """Loads the state of an optimizer of the same kind; settings that the command line gives stay this run's."""
    groups = optimizer.state_dict()["param_groups"]
    own = [{key: group[key] for key in _SETTINGS & group.keys()} for group in groups]
    state = {
        number: {key: alike(v, trained[number]) if isinstance(v, torch.Tensor) else v for key, v in values.items()}
        for number, values in saved["state"].items()
    }
    merged = [group | mine for group, mine in zip(saved["param_groups"], own, strict=True)]
    for group in merged:  # optimi's "setup" stays as it was: it would count steps from 0
        if group.get("triton") and not trained[0].is_cuda:
            group["triton"] = False
    optimizer.load_state_dict({**saved, "state": state, "param_groups": merged})


def find_checkpoint(resume, output_dir):
    """Finds the checkpoint that --resume names, and reads all of it to see that it is intact.

    A damaged newest one is stepped over, loudly, and put aside under another name. What is wrong with frozen parts
    only is said: training does not need them, and the checkpoints of a run share them.

    Args:
        resume: "latest" or the path of a checkpoint.
        output_dir: of the run.

    Returns:
        (its path, or None: the run has none yet, and begins again; whether its frozen parts are intact).

    Raises:
        ValueError: there is nothing to resume, or nothing intact.
    """
    if resume != "latest":
        path = Path(resume)
        if step_of(path) is None or not path.is_dir():
            raise ValueError(f"{path}: no checkpoint; expected a directory like {output_dir}/checkpoint-000500")
        broken, frozen_intact = _damages(path)
        if broken:
            raise ValueError(f"{path}: is damaged: {broken}")
        _refuse_later(path, output_dir)
        return path, frozen_intact
    if not (output_dir / "args.json").exists():
        raise ValueError(f"{output_dir}: holds no run to resume; check --output_dir, or leave --resume out")
    stepped_over = []
    for path in reversed(checkpoints(output_dir)):
        broken, frozen_intact = _damages(path)
        if not broken:
            for other in stepped_over:
                os.rename(other, _free_name(other))
            return path, frozen_intact
        warn(f"{path}: IS DAMAGED and stepped over: {broken}")
        stepped_over.append(path)
    if stepped_over:
        raise ValueError(f"{output_dir}: none of its {len(stepped_over)} checkpoints is intact")
    warn(f"{output_dir}: has no checkpoint yet; the run begins again")
    return None, False


def _refuse_later(path, output_dir):
    """Refuses to write into a run that has gone on from `path` already, or into another one."""
    if path.resolve().parent != output_dir.resolve():
        if (output_dir / "args.json").exists():
            raise ValueError(f"{output_dir}: already holds another run; choose a new --output_dir")
        return
    later = [other.name for other in checkpoints(output_dir) if step_of(other) > step_of(path)]
    if later:
        raise ValueError(f"{output_dir}: holds later checkpoints ({', '.join(later)}); move them away, or give "
                         "another --output_dir")  # fmt: skip


def _damages(checkpoint):
    """(what keeps a run from going on from a checkpoint, "": nothing; whether its frozen parts are intact)."""
    try:
        broken = damages(checkpoint)
    except (ValueError, OSError) as error:
        return str(error), False
    frozen = {name for name in broken if is_frozen(name)}
    for name in frozen:
        warn(f"{checkpoint / name}: IS DAMAGED: {broken[name]}. Training does not need it; the next checkpoint takes "
             "it from --model anew, the older ones share this file")  # fmt: skip
    return "; ".join(f"{name} {broken[name]}" for name in broken.keys() - frozen), not frozen


def _free_name(path):
    """The first of `path`.damaged, `path`.damaged2, ... that does not exist."""
    names = (path.with_name(f"{path.name}.damaged{number if number > 1 else ''}") for number in range(1, 1000))
    return next(name for name in names if not name.exists())
