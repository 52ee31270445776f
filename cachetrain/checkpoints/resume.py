"""Resumes a run: finds the checkpoint, checks that it belongs to the same run, and restores the state."""

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from cachetrain.checkpoints.manifest import damages, read_manifest
from cachetrain.checkpoints.save import checkpoint_path, checkpoints, is_frozen, step_of
from cachetrain.checkpoints.state import placed_like, read_state
from cachetrain.diffusion.noise_schedulers import objective_of
from cachetrain.diffusion.objective import noise_schedule
from cachetrain.log import counted, warn
from cachetrain.modeling import lora

# Files without which a checkpoint is none: the UNet would get random weights, or those of another file.
_NEEDED = {"unet/config.json", f"unet/{SAFETENSORS_WEIGHTS_NAME}"}


class Resumed:
    """The checkpoint that a run resumes from, or the beginning of a run.

    Args:
        path: of the checkpoint; None: the run starts from the beginning.
        frozen_intact: as `find_checkpoint` returns it.

    Attributes:
        path: of the checkpoint; None at the beginning.
        step: of the checkpoint; 0 at the beginning.
        state: dict of `run_state`; {} at the beginning.
        frozen: `path` if its frozen parts are intact, else None.

    Raises:
        ValueError: the checkpoint's state is incomplete, or that of another step than its name says.
    """

    def __init__(self, path: Path | None, frozen_intact: bool):
        self.path = path
        self.frozen = path if frozen_intact else None
        self.step = step_of(path) if path else 0
        self.state = read_state(path) if path else {}
        self._same_optimizer = True
        if path is None:
            return
        if self.state["step"] != self.step:
            right = checkpoint_path(path.parent, self.state["step"]).name
            raise ValueError(f"{path}: its state is that of step {self.state['step']}; rename it to {right}")

    def _need(self, missing, where):
        if missing:
            raise ValueError(
                f"{self.path}: {where} lacks {', '.join(sorted(missing))}; resume from another checkpoint, or start "
                "a new run from this one with --model"
            )

    def check(self, settings: dict, anyway: bool, meanings: Mapping[str, str]) -> list[str]:
        """Lists the settings that differ from those of the saved run.

        Args:
            settings: of `settings_of`, this run's.
            anyway: resume, too, if it would not be the same run.
            meanings: {setting: what another value means}. "silent": nothing, it is not listed. "free": it may change.
                "rounding": it changes the result by rounding only. Any other setting: it would be another run.

        Returns:
            list of str, a line per setting.

        Raises:
            ValueError: it would be another run.
        """
        if self.path is None:
            return []
        meanings = {**meanings, **_MEANINGS}
        lines, refused, saved = [], [], self.state["settings"]
        self._same_optimizer = _kind_of_optimizer(saved) == _kind_of_optimizer(settings)
        for name in sorted(saved.keys() | settings.keys()):
            was, now, meaning = saved.get(name), settings.get(name), meanings.get(name)
            unknown_then = name not in saved and not now  # a flag of a newer version, which is off
            if was == now or unknown_then or meaning == "silent":
                continue
            line = f"{name}: {was} then, {now} now"
            lines.append(line + (" (the same run up to rounding)" if meaning == "rounding" else ""))
            refused += [] if meaning in ("free", "rounding") else [line]
        if (self.path / lora.FILE).exists() != bool(settings.get("lora_rank")):
            raise ValueError(
                f"{self.path}: holds {'an adapter' if saved.get('lora_rank') else 'a UNet'}, and this run trains "
                "something else; restore --lora_rank"
            )
        shapes = [line for line in refused if line.partition(":")[0] in _OF_ADAPTER]
        if shapes and saved.get("lora_rank"):
            raise ValueError(f"{self.path}: holds another adapter: {'; '.join(shapes)}; restore these settings")
        if refused and not anyway:
            raise ValueError(
                f"{self.path}: this would not be the run that was saved: {'; '.join(refused)}; restore these "
                "settings, or add --resume_anyway"
            )
        return lines

    def restore(self, unet, trained: list[torch.nn.Parameter], optimizer, ema, scaler) -> None:
        """Restores optimizer, averages and loss scaler; the UNet, or its adapter, has been loaded before.

        Args:
            unet: UNet2DConditionModel.
            trained: its trained parameters, in the optimizer's order.
            optimizer: of optim.make_optimizer; its `implementation` names the fields that a state must have.
            ema: Ema or None.
            scaler: GradScaler.

        Raises:
            ValueError: the checkpoint lacks something that they need.
        """
        if self.path is None:
            return
        if not self._same_optimizer:
            warn("the checkpoint has another optimizer or precision of weights: the optimizer starts from scratch")
        elif self.state["trained"] != trained_names(unet):
            warn("the checkpoint trained other parameters: the optimizer starts from scratch")
        else:
            missing = _missing_fields(self.state["optimizer"], optimizer.implementation)
            self._need(missing, "its optimizer")
            self._check_optimizer(optimizer.implementation.group_fields, trained)
            _restore_optimizer(optimizer, self.state["optimizer"], trained)
        if scaler.is_enabled() and self.state["scaler"]:
            scaler.load_state_dict(self.state["scaler"])
        if ema is not None:
            self._restore_ema(unet, ema)
        del self.state["optimizer"]  # as large as the optimizer itself

    def _check_optimizer(self, group_fields, trained):
        """Checks the state of an optimizer against the parameters: numbers and tensors that are finite and fit."""
        saved = self.state["optimizer"]
        (group,) = saved["param_groups"]
        kept = {key: group[key] for key in group_fields & group.keys()}
        wrong = {key for key, value in kept.items() if type(value) is not bool and not _is_state(key, value, ())}
        for number, fields in saved["state"].items():
            for key, value in fields.items():
                if key == "kahan_comp" and value is None and trained[number].dtype == torch.float32:
                    continue
                if not _is_state(key, value, trained[number].shape):
                    wrong.add(f"{key} of parameter {number}")
        if 0 < len(saved["state"]) < len(trained) or (self.step and not saved["state"]):
            warn(
                f"{self.path}: its optimizer has no state of {len(trained) - len(saved['state'])} of "
                f"{counted(len(trained), 'trained tensor')}, as if no gradient had ever reached them; theirs starts "
                "from scratch"
            )
        if wrong or len(group["params"]) != len(trained):
            raise ValueError(
                f"{self.path}: its optimizer does not fit the model: {', '.join(sorted(wrong)[:3]) or 'parameters'}; "
                "resume from another checkpoint, or start a new run from this one with --model"
            )

    def _restore_ema(self, unet, ema):
        adapted = lora.is_adapted(unet)
        path = self.path / "unet_ema" / (lora.FILE if adapted else SAFETENSORS_WEIGHTS_NAME)
        if not path.exists():
            self._need({"unet_ema"} if self.state["settings"].get("ema_decay") else (), "it")
            return warn(f"{self.path}: has no unet_ema; the average starts from the weights")
        saved = load_file(path)
        averages = {lora.file_name_of(name) if adapted else name: a for name, a in ema.named(unet).items()}
        self._need(averages.keys() - saved.keys(), path.parent.name)
        wrong = {name for name in averages if saved[name].shape != averages[name].shape}
        self._need(wrong, f"{path.parent.name}, with the shapes of this UNet,")
        self._need({name for name in averages if not saved[name].isfinite().all()}, "finite numbers in unet_ema:")
        with torch.no_grad():
            for name, average in averages.items():
                average.copy_(placed_like(saved[name], average))


# Fields of an optimizer's state that have the shape of their parameter, and those that are never negative.
_OF_EACH_ELEMENT = {"exp_avg", "exp_avg_sq", "momentum_buffer", "kahan_comp", "variance"}
_NEVER_NEGATIVE = {"step", "exp_avg_sq", "variance", "row_var", "col_var"}
# What another value of a setting means that is no flag (`Resumed.check`).
_OF_ADAPTER = ("lora_rank", "lora_targets", "dora")  # decide which tensors an adapter has
_MEANINGS = {"ranks": "rounding", "torch": "rounding"}


def settings_of(args, plan, index, scheduler, world) -> dict:
    """What makes a run the run it is, JSON-able: its flags, and what they amount to.

    Args:
        args: Namespace of the trainer's flags.
        plan: Plan.
        index: PairIndex of the pairs that are trained.
        scheduler: the noise schedule, a scheduler of diffusers.
        world: World.
    """
    alphas_cumprod = noise_schedule(scheduler, "cpu")
    alphas_cumprod = torch.zeros(0) if alphas_cumprod is None else alphas_cumprod
    checksum = f"{zlib.crc32(alphas_cumprod.double().numpy().tobytes()):08x}"
    decay_steps = None if args.scheduler.startswith("constant") else plan.decay_steps
    return json.loads(json.dumps(vars(args))) | {
        "ranks": world.ranks,
        "torch": torch.__version__,
        "samples a backward pass, all ranks": args.batch_size * world.ranks,
        "peak rate, warm-up and decay steps": [plan.peak_lr, plan.warmup_steps, decay_steps],
        "noise schedule": f"{objective_of(scheduler)} ({checksum})",
        "pairs": f"{index.num_pairs:,} ({index.checksum():08x})",
        "shuffle_window": args.shuffle_window and f"{args.shuffle_window}, {_blocks(index)}",
    }


def _blocks(index):
    return f"{counted(len(index.blocks) - 1, 'block')} ({zlib.crc32(index.blocks.tobytes()):08x})"


def run_state(
    step: int, visits: int, settings: dict, shards: list, *, unet, optimizer, scaler, statistics, validation
) -> dict:
    """All that a run resumes from except its weights and their averages, as a dict for Saving.save.

    Args:
        step: optimizer steps done.
        visits: visits to samples done.
        settings: of `settings_of`.
        shards: of Sources.pinned.
        unet: UNet2DConditionModel.
        optimizer, scaler, statistics: whatever has a state_dict.
        validation: Validation or None.
    """
    return {
        "step": step,
        "visits": visits,
        "settings": settings,
        "shards": shards,
        "trained": trained_names(unet),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "statistics": statistics.state_dict(),
        "validation": validation.state_dict() if validation else None,
    }


def trained_names(unet) -> int:
    """A checksum of the names of the trained parameters, in order."""
    return zlib.crc32("\n".join(name for name, p in unet.named_parameters() if p.requires_grad).encode())


def _kind_of_optimizer(settings):
    """(name, whether the weights are bfloat16, whether gradients are released), of settings."""
    return settings.get("optimizer"), settings.get("precision") == "bf16_pure", bool(settings.get("gradient_release"))


def _missing_fields(saved, implementation):
    """The fields that an optimizer keeps once it has stepped and that its saved state_dict has not."""
    (group,) = saved["param_groups"]
    kinds = [implementation.state_fields, implementation.matrix_fields or implementation.state_fields]
    missing = set()
    for values in saved["state"].values():
        # A parameter is of the kind of which it has the most. With --gradient_release all fields are of a parameter.
        distances = [(len(kind - values.keys()), -len(kind & values.keys())) for kind in kinds]
        kind = kinds[distances.index(min(distances))]
        missing |= (kind | implementation.group_fields) - values.keys() - group.keys()
    return missing


def _is_state(key, value, shape):
    """Whether a value can be that of a field of an optimizer's state for a parameter of this shape."""
    if not isinstance(value, torch.Tensor):
        return key not in _OF_EACH_ELEMENT and type(value) in (int, float) and math.isfinite(value)
    sums = {"row_var": math.prod(shape[:1]), "col_var": math.prod(shape[1:])}  # of adafactor
    if key in sums and value.numel() != sums[key]:
        return False
    if (key in _OF_EACH_ELEMENT and value.shape != shape) or (key == "step" and value.numel() != 1):
        return False
    least = float("-inf") if key not in _NEVER_NEGATIVE else 0
    return value.numel() == 0 or bool(value.isfinite().all() and value.min() >= least)


def _restore_optimizer(optimizer, saved, trained):
    """Loads the state of an optimizer of the same kind; its settings are those of this run."""
    (fresh,), (group,) = optimizer.state_dict()["param_groups"], saved["param_groups"]
    kept = {key: value for key, value in group.items() if key in optimizer.implementation.group_fields}
    state = {
        i: {key: placed_like(v, trained[i]) if isinstance(v, torch.Tensor) else v for key, v in values.items()}
        for i, values in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": [fresh | kept]})


def find_checkpoint(resume: str, output_dir: Path) -> tuple[Path | None, bool]:
    """Finds the checkpoint that --resume names, and reads all of it to see whether it is intact.

    If the newest checkpoint of a run is damaged, a warning says so, the one before is taken, and the damaged one is
    renamed. Damage to frozen parts is only a warning: training does not need them, and all checkpoints of a run share
    them.

    Args:
        resume: "latest" or the path of a checkpoint.
        output_dir: of the run.

    Returns:
        (path of the checkpoint; None: the run has none yet and starts from the beginning.
        Whether its frozen parts are intact).

    Raises:
        ValueError: there is nothing to resume, or nothing intact.
    """
    if resume != "latest":
        return _named_checkpoint(Path(resume), output_dir)
    if not (output_dir / "args.json").exists():
        raise ValueError(f"{output_dir}: holds no run to resume; check --output_dir, or omit --resume")
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
        raise ValueError(f"{output_dir}: has no intact checkpoint, only {counted(len(stepped_over), 'damaged one')}")
    warn(f"{output_dir}: has no checkpoint yet; the run starts from the beginning")
    return None, False


def _named_checkpoint(path, output_dir):
    if step_of(path) is None or not path.is_dir():
        raise ValueError(f"{path}: not a checkpoint; expected a directory like {output_dir}/checkpoint-000500")
    broken, frozen_intact = _damages(path)
    if broken:
        raise ValueError(f"{path}: is damaged: {broken}")
    _refuse_mixing(path, output_dir)
    return path, frozen_intact


def _refuse_mixing(path, output_dir):
    """Refuses to resume from `path` in a directory that holds another run, or later checkpoints of this one."""
    if path.resolve().parent != output_dir.resolve():
        if (output_dir / "args.json").exists():
            raise ValueError(f"{output_dir}: already holds another run; choose a new --output_dir")
        return
    later = [other.name for other in checkpoints(output_dir) if step_of(other) > step_of(path)]
    if later:
        raise ValueError(
            f"{output_dir}: holds later checkpoints ({', '.join(later)}); move them away, or choose another "
            "--output_dir"
        )


def _damages(checkpoint):
    """(damage that prevents resuming from a checkpoint, "" if there is none; whether its frozen parts are intact)."""
    try:
        broken = damages(checkpoint)
        names = read_manifest(checkpoint).keys()
        absent = set() if lora.FILE in names else _NEEDED - names
    except (ValueError, OSError) as error:
        return str(error), False
    if absent:
        return f"its manifest lacks {', '.join(sorted(absent))}", False
    frozen = {name for name in broken if is_frozen(name)}
    for name in frozen:
        warn(
            f"{checkpoint / name}: IS DAMAGED: {broken[name]}. Training does not need it; the next checkpoint gets a "
            "fresh copy from --model, older checkpoints share the damaged file"
        )
    return "; ".join(f"{name} {broken[name]}" for name in broken.keys() - frozen), not frozen


def _free_name(path):
    """The first of `path`.damaged, `path`.damaged2, ... that does not exist."""
    names = (path.with_name(f"{path.name}.damaged{number if number > 1 else ''}") for number in range(1, 1000))
    return next(name for name in names if not name.exists())
