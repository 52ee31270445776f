"""Reads a run's output_dir into plain values for the page."""

import base64
import io
import json
import math
import re
from array import array
from pathlib import Path

import numpy as np
from PIL import Image

from cachetrain.atomic import is_locked
from cachetrain.report.findings import findings

MAX_POINTS = 1000  # of one curve; of longer ones each stretch keeps its lowest and its highest point
MAX_STEPS, MAX_PICTURES = 60, 3000  # of samples: steps on the slider, pictures in the page
MAX_SIDE = 320  # pixels; larger pictures are scaled down
_SAMPLE = re.compile(r"(.+)_cfg([0-9.]+)\.png")
_NUMBERED = re.compile(r"(?:step|checkpoint)-(\d+)")
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on bad files


def read_run(output_dir):
    """Reads what a run has left behind, so far.

    Args:
        output_dir: of a run that is going on, complete, or was cut off.

    Returns:
        JSON-able dict: name, path, settings {name: value}, step (last logged), state, checkpoints [step], curves
        {tag: [steps, values]}, warnings [{step, message}], samples (see `read_samples`), findings [{level, text}].

    Raises:
        ValueError: it is not a run's directory, or a file in it is not what a run writes.
    """
    output_dir = Path(output_dir)
    if not (output_dir / "args.json").is_file():
        raise ValueError(f"{output_dir}: no args.json, so no run wrote here; pass the --output_dir of training")
    settings = json.loads((output_dir / "args.json").read_text(encoding="utf-8"))
    scalars = read_scalars(output_dir / "metrics.jsonl")
    step = max((steps[-1] for steps, _ in scalars.values()), default=0)
    return {
        "name": output_dir.resolve().name,
        "path": str(output_dir),
        "settings": settings,
        "step": step,
        "state": _state(settings, step, is_locked(output_dir)),
        "checkpoints": [number for number, _ in _numbered(output_dir, "checkpoint-*")],
        "curves": {
            tag: thinned(steps, values)
            for tag, (steps, values) in scalars.items()
            if tag != "01_Training/loss" or settings.get("use_snr")  # without weights it equals loss_raw
        },
        "warnings": read_warnings(output_dir / "warnings.jsonl"),
        "samples": read_samples(output_dir / "samples"),
        "findings": findings(scalars, len(read_skipped(output_dir / "quarantine.tsv"))),
    }


def _state(settings, step, goes_on):
    planned = str(settings.get("max_steps", ""))
    if not planned.isdecimal():  # epochs
        return f"{'going on' if goes_on else 'ended'}, step {step:,} (--max_steps {planned})"
    if step >= int(planned):
        return f"complete, {step:,} steps"
    return f"{'going on' if goes_on else 'stopped'}, step {step:,} of {int(planned):,}"


def read_scalars(path):
    """Returns {tag: (steps, values)}, arrays of int and of float, of a metrics.jsonl; nan where it has null."""
    scalars = {}
    for line in _lines(path):
        step = line.pop("step")
        for tag, value in line.items():
            steps, values = scalars.setdefault(tag, (array("q"), array("d")))
            steps.append(step)
            values.append(math.nan if value is None else value)
    return dict(sorted(scalars.items()))


def read_warnings(path):
    """Returns [{step, message}] by step; what steps that were run again after a resume said again is there once."""
    known = {(line["step"], line["message"]): None for line in _lines(path)}
    return [{"step": step, "message": message} for step, message in sorted(known, key=lambda key: key[0])]


def read_skipped(path):
    """Returns the sorted steps that quarantine.tsv names."""
    if not path.exists():
        return []
    heads = (line.partition("\t")[0] for line in path.read_bytes().decode(errors="replace").split("\n"))
    return sorted({int(head) for head in heads if head.isdecimal()})  # a file's name may hold a line break


def _lines(path):
    """Yields the objects of a file of JSON lines; an unfinished last line is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: {error.msg}; remove the line") from error


def thinned(steps, values):
    """[steps, values] of a curve of at most MAX_POINTS points, values to 5 digits, None where they are not finite.

    A longer one is cut into stretches, each of which keeps its lowest and its highest point, so that no spike is
    lost; a stretch with a value that is not finite keeps that too.
    """
    values, keep = np.asarray(values, np.float64), np.arange(len(values))
    if len(values) > MAX_POINTS:
        kept = {0, len(values) - 1}
        for part in np.array_split(keep, MAX_POINTS // 3):
            finite = np.isfinite(values[part])
            kept.update(part[~finite][:1].tolist())
            if finite.any():
                kept.add(int(part[np.where(finite, values[part], np.inf).argmin()]))
                kept.add(int(part[np.where(finite, values[part], -np.inf).argmax()]))
        keep = np.array(sorted(kept))
    rounded = [float(f"{value:.5g}") if math.isfinite(value) else None for value in values[keep].tolist()]
    return [np.asarray(steps)[keep].tolist(), rounded]


def read_samples(directory):
    """Reads the pictures under samples/.

    Returns:
        [{name, cfgs, pictures {step: [{src, text} or None for each of cfgs]}}], one per prompt, in the order of their
        names. Of many steps or pictures only some are there, evenly spread, the first and the last among them.
    """
    found = {}  # prompt -> step -> cfg -> path
    steps = _numbered(directory, "step-*")
    num_pictures = sum(1 for path in steps[-1][1].iterdir() if _SAMPLE.fullmatch(path.name)) if steps else 0
    for step, folder in _spread(steps, min(MAX_STEPS, max(2, MAX_PICTURES // max(1, num_pictures)))):
        for path in folder.iterdir():
            if match := _SAMPLE.fullmatch(path.name):
                found.setdefault(match[1], {}).setdefault(step, {})[float(match[2])] = path
    return [_prompt(name, by_step) for name, by_step in sorted(found.items())]


def _prompt(name, by_step):
    cfgs = sorted({cfg for paths in by_step.values() for cfg in paths})
    rows = {step: [_picture(paths.get(cfg)) for cfg in cfgs] for step, paths in by_step.items()}
    return {"name": name, "cfgs": cfgs, "pictures": rows}


def _numbered(directory, pattern):
    """[(step, directory)] of the complete directories whose names match, by step."""
    matches = ((_NUMBERED.fullmatch(path.name), path) for path in Path(directory).glob(pattern) if path.is_dir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _spread(items, limit):
    """At most `limit` of a list, evenly, with both ends."""
    if len(items) <= limit:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


def _picture(path):
    """{src: data URI, text: settings that the PNG carries}; None without a path or where it cannot be read."""
    if path is None:
        return None
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            text = {key: value for key, value in image.info.items() if isinstance(value, str)}
            kind = "png"
            if max(image.size) > MAX_SIDE:
                small = image.convert("RGB")
                small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                small.save(buffer, "WEBP", quality=80)
                data, kind = buffer.getvalue(), "webp"
            else:
                image.load()
    except _UNREADABLE:
        return None
    return {"src": f"data:image/{kind};base64,{base64.b64encode(data).decode()}", "text": text}
