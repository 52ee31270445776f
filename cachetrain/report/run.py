"""Reads the files in a run's output_dir into plain values for the page."""

from __future__ import annotations

import base64
import io
import math
import re
import sys
from array import array
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path

import numpy as np
from PIL import Image

from cachetrain.atomic import is_locked
from cachetrain.log import counted
from cachetrain.reading import json_lines, open_regular, read_bytes, read_json
from cachetrain.report.findings import findings

MAX_POINTS = 1000  # per curve
MAX_STEPS = 60  # positions of the sample slider
MAX_PICTURES = 3000  # pictures in the page
MAX_SIDE = 320  # pixels; larger pictures are scaled down
_STEP = "[0-9]{1,18}"
_SAMPLE = re.compile(r"(.+)_cfg(-?[0-9]+(?:\.[0-9]+)?(?:e[+-][0-9]+)?)\.png", re.DOTALL)
_NUMBERED = re.compile(f"(?:step|checkpoint)-({_STEP})")
_SKIPPED = re.compile(f"({_STEP})\\t(?!unreadable:)".encode())
_MAX_FLOAT = sys.float_info.max
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on bad files


def read_run(output_dir: str | Path) -> dict:
    """Reads the files that a run has written so far.

    Args:
        output_dir: directory of a run that is running, complete, or was interrupted.

    Returns:
        JSON-serialisable dict: name, path, settings {name: value}, step (last logged), state, checkpoints [step],
        curves {tag: [steps, values]}, warnings [{step, message}], samples (see `read_samples`), findings
        [{level, text}].

    Raises:
        ValueError: the directory is not the output_dir of a run, or a file in it is invalid.
    """
    output_dir = Path(output_dir)
    if not (output_dir / "args.json").is_file():
        raise ValueError(
            f"{output_dir}: has no args.json, so no run was written here; pass the --output_dir of training"
        )
    try:
        settings = read_json(output_dir / "args.json")
    except ValueError as error:
        raise ValueError(f"{error}; pass the --output_dir of training") from None
    scalars = read_scalars(output_dir / "metrics.jsonl")
    weighted = settings.get("use_snr") or settings.get("loss")
    step = max((steps[-1] for steps, _ in scalars.values()), default=0)
    return {
        "name": output_dir.resolve().name,
        "path": str(output_dir),
        "settings": _finite(settings),
        "step": step,
        "state": _state(settings, step, is_locked(output_dir)),
        "checkpoints": [number for number, _ in _numbered(output_dir, "checkpoint-*")],
        "curves": {
            tag: thinned(steps, values)
            for tag, (steps, values) in scalars.items()
            if tag != "01_Training/loss" or weighted  # else loss equals loss_raw
        },
        "warnings": read_warnings(output_dir / "warnings.jsonl"),
        "samples": read_samples(output_dir / "samples"),
        "findings": findings(scalars, len(read_skipped(output_dir / "quarantine.tsv"))),
    }


def _state(settings, step, running):
    max_steps = str(settings.get("max_steps", ""))
    if not re.fullmatch(_STEP, max_steps):  # epochs
        return f"{'running' if running else 'ended'}, step {step:,} (--max_steps {max_steps})"
    if step >= int(max_steps):
        return f"complete, {counted(step, 'step')}"
    return f"{'running' if running else 'stopped'}, step {step:,} of {int(max_steps):,}"


def read_scalars(path: Path) -> dict[str, tuple[array, array]]:
    """Reads a metrics.jsonl; returns {tag: (steps, values)}, arrays of int and of float, null as nan."""
    scalars = {}
    for where, line in _lines(path):
        step = line.pop("step")
        for tag, value in line.items():
            if value is not None and type(value) not in (int, float):
                raise ValueError(f"{where}: {tag!r} is {value!r:.40}, expected a number; remove the line")
            steps, values = scalars.setdefault(tag, (array("q"), array("d")))
            steps.append(step)
            values.append(math.nan if value is None or abs(value) > _MAX_FLOAT else value)
    return dict(sorted(scalars.items()))


def read_warnings(path: Path) -> list[dict]:
    """Returns [{step, message}] sorted by step; warnings repeated by steps rerun after a resume are listed once."""
    unique = {(line["step"], str(line.get("message", ""))): None for _, line in _lines(path)}
    return [{"step": step, "message": message} for step, message in sorted(unique, key=lambda key: key[0])]


def read_skipped(path: Path) -> list[int]:
    """Returns the sorted numbers of the skipped steps in quarantine.tsv."""
    if not path.exists():
        return []
    with open_regular(path) as file:
        # Pairs that could not be read end no step.
        steps = {match[1] for line in BufferedReader(file) if (match := _SKIPPED.match(line))}
    return sorted(map(int, steps))


def _lines(path):
    """Yields (place, object with a step) for each line of a file of JSON lines."""
    if not path.exists():
        return
    for number, line in json_lines(path):
        where = f"{path}, line {number}"
        if type(line.get("step")) is not int or abs(line["step"]) >= 2**63:
            raise ValueError(f"{where}: expected an object with a step, as training writes it; remove the line")
        yield where, line


def _finite(value):
    """A JSON value in which numbers that JSON lacks are text."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def thinned(steps: Sequence[int], values: Sequence[float]) -> list[list]:
    """Reduces a curve to about MAX_POINTS points; returns [steps, values], values to 5 digits, None if not finite.

    A longer curve is cut into segments. Each segment keeps its lowest and its highest point, so that no spike is
    lost, and one value that is not finite, if there is any.
    """
    values, positions = np.asarray(values, np.float64), np.arange(len(values))
    if len(values) > MAX_POINTS:
        selected = {0, len(values) - 1}
        for segment in np.array_split(positions, MAX_POINTS // 3):
            finite = np.isfinite(values[segment])
            selected.update(segment[~finite][:1].tolist())
            if finite.any():
                selected.add(int(segment[np.where(finite, values[segment], np.inf).argmin()]))
                selected.add(int(segment[np.where(finite, values[segment], -np.inf).argmax()]))
        positions = np.array(sorted(selected))
    rounded = [float(f"{value:.5g}") if math.isfinite(value) else None for value in values[positions].tolist()]
    return [np.asarray(steps)[positions].tolist(), rounded]


def read_samples(directory: Path) -> list[dict]:
    """Reads the pictures under samples/.

    Returns:
        [{name, cfgs, pictures {step: [{src, text} or None for each of cfgs]}}], one per prompt, sorted by name. If
        there are too many steps or pictures, evenly spaced steps are selected, including the first and the last.
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
    """Returns [(step, directory)] of the complete directories whose names match, sorted by step."""
    matches = ((_NUMBERED.fullmatch(path.name), path) for path in Path(directory).glob(pattern) if path.is_dir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _spread(items, limit):
    """Returns at most `limit` evenly spaced items of a list, including both ends."""
    if len(items) <= limit:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


def _picture(path):
    """Returns {src: data URI, text: the PNG's text chunks}; None if there is no path or the file is unreadable."""
    if path is None:
        return None
    try:
        data = read_bytes(path)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
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
