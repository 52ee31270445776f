"""What to draw: sample_prompts.txt and sample_prompts.json, and their rules. Imports no torch."""

import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cachetrain.data.captions import find_caption
from cachetrain.log import warn


class Sample(NamedTuple):
    """One picture asked for. prompt None: a caption of the data; seed None: the file's; size: (width, height)."""

    prompt: str | None = None
    negative_prompt: str = ""
    seed: int | None = None
    size: tuple[int, int] | None = None
    aspect_ratio: float | None = None
    random_caption: bool = False


class Prompts(NamedTuple):
    """A file of prompts, under the names of sample_prompts.json; None where it leaves the choice to the flags."""

    samples: tuple[Sample, ...] = ()
    batch_size: int | None = None
    seed: int | None = None
    cfgs: tuple[float, ...] | None = None
    scheduler: str | None = None
    num_inference_steps: int | None = None
    show_progress_bars: bool = False
    generate_samples_every_n_steps: int | None = None
    generate_pretrain_samples: bool = False


def _whole(least, most=2**63 - 1):
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is(kind):
    return lambda value: isinstance(value, kind)


_COUNT, _FLAG, _TEXT = (_whole(1), "a whole number from 1"), (_is(bool), "true or false"), (_is(str), "a text")
_SEED = (_whole(-1), "a whole number, or -1 for a new one each time")

# Key -> (what a value must pass, the same in words).
_FILE_KEYS = {
    "batch_size": _COUNT,
    "seed": _SEED,
    "cfgs": (
        lambda value: isinstance(value, list) and value != [] and all(_number(cfg) and cfg >= 0 for cfg in value),
        "a list of numbers from 0",
    ),
    "scheduler": _TEXT,
    "num_inference_steps": (_whole(1, 1000), "a whole number from 1 to 1000"),
    "show_progress_bars": _FLAG,
    "generate_samples_every_n_steps": _COUNT,
    "generate_pretrain_samples": _FLAG,
    "samples": (_is(list), "a list"),
}
_SAMPLE_KEYS = {
    "prompt": _TEXT,
    "negative_prompt": _TEXT,
    "seed": _SEED,
    "size": (
        lambda value: isinstance(value, list) and len(value) == 2 and all(_whole(64, 8192)(x) for x in value)
        and not any(x % 64 for x in value),
        "[width, height] in pixels, both multiples of 64",
    ),
    "aspect_ratio": (lambda value: _number(value) and 1 / 16 <= value <= 16, "width / height, from 1/16 to 16"),
    "random_caption": _FLAG,
}  # fmt: skip


def prompts_of(texts):
    """The Prompts of plain texts."""
    return Prompts(tuple(map(Sample, texts)))


def read_prompts(path, content=None):
    """Reads a file of prompts: `.json`, or any other name with one prompt a line.

    Args:
        content: its bytes, where they are known.

    Returns:
        (Prompts, list of str: what was not understood and is ignored).

    Raises:
        ValueError: the file is not what it should be; names file, line and reason.
        OSError: it cannot be read.
    """
    content = Path(path).read_bytes() if content is None else content
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text; save it as UTF-8") from error
    if Path(path).suffix.lower() != ".json":
        return prompts_of(line.strip() for line in text.splitlines() if line.strip()), []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: lists in lists without end") from error
    if not isinstance(value, dict):
        raise ValueError(f'{path}, line 1: expected an object {{"samples": [...]}}')
    return _parse(path, text)


def _parse(path, text):
    """Checks valid JSON member by member, so that what is wrong is named with its line; returns as read_prompts."""
    values, warnings, samples = {}, [], []
    for key, value, start in _members(text, text.index("{")):
        if not _known(path, text, key, value, start, _FILE_KEYS, warnings):
            continue
        values[key] = tuple(value) if isinstance(value, list) else value
        if key == "samples":
            samples = [_sample(path, text, item, at, warnings) for _, item, at in _members(text, start)]
    return Prompts(**values | {"samples": tuple(samples)}), warnings


def _sample(path, text, value, start, warnings):
    line = _line(text, start)
    if not isinstance(value, dict):
        raise ValueError(f'{path}, line {line}: a sample is an object like {{"prompt": "a star"}}, found {value!r}')
    members = list(_members(text, start))
    known = {k: v for k, v, at in members if _known(path, text, k, v, at, _SAMPLE_KEYS, warnings)}
    if ("prompt" in known) == known.get("random_caption", False):
        raise ValueError(f'{path}, line {line}: a sample has either "prompt" or "random_caption": true')
    if "size" in known and "aspect_ratio" in known:
        raise ValueError(f'{path}, line {line}: a sample has either "size" or "aspect_ratio"')
    return Sample(**known | ({"size": tuple(known["size"])} if "size" in known else {}))


def _known(path, text, key, value, start, keys, warnings):
    """Whether `key` is one of `keys`; one that is not becomes a warning, a value that is wrong a ValueError."""
    where = f"{path}, line {_line(text, start)}"
    if key not in keys:
        warnings.append(f"{where}: unknown key {key!r} is ignored; expected one of {', '.join(keys)}")
        return False
    passes, expected = keys[key]
    if not passes(value):
        raise ValueError(f'{where}: "{key}" is {json.dumps(value)}, expected {expected}')
    return True


def _members(text, start):
    """Yields (key, value, position of the value) of the valid JSON object, or list (key None), at `start`."""
    decode, at = json.JSONDecoder().raw_decode, start + 1
    while True:
        at = re.compile(r"[\s,]*").match(text, at).end()
        if text[at] in "]}":
            return
        key = None
        if text[start] == "{":
            key, at = decode(text, at)
            at = re.compile(r"\s*:\s*").match(text, at).end()
        value, end = decode(text, at)
        yield key, value, at
        at = end


def _line(text, position):
    return text.count("\n", 0, position) + 1


class PromptFile:
    """A file of prompts that may change while a run lasts; of a broken one the last good content stays.

    Raises:
        ValueError, OSError: it is broken from the start.
    """

    def __init__(self, path):
        self.path, self._content = path, Path(path).read_bytes()
        self.prompts, warnings = read_prompts(path, self._content)
        for warning in warnings:
            warn(warning)

    def changed(self):
        """Reads the file again. Returns its Prompts if its content is new and good, else None; warns once of both."""
        try:
            content = Path(self.path).read_bytes()
        except OSError as error:
            content = f"{self.path}: {error.strerror}"
        if content == self._content:
            return None
        self._content = content
        try:
            if isinstance(content, str):
                raise ValueError(content)
            prompts, warnings = read_prompts(self.path, content)
        except ValueError as error:
            warn(f"{error}; the prompts read before stay in use")
            return None
        for warning in warnings:
            warn(warning)
        return prompts


def sample_size(sample, native):
    """(width, height) in pixels that a sample asks for, or None.

    Args:
        native: (width, height) that the UNet was configured for, whose area an aspect ratio keeps.
    """
    if sample.aspect_ratio is None:
        return sample.size
    width = math.sqrt(native[0] * native[1] * sample.aspect_ratio)
    return tuple(max(64, round(side / 64) * 64) for side in (width, width / sample.aspect_ratio))


def sample_seed(sample, prompts, slot, step, first=0):
    """The seed of the sample at place `slot`: its own, the file's, or `first` + slot.

    -1 gives a new one each step, the same in every run, so that runs can be compared.
    """
    seed = sample.seed if sample.seed is not None else prompts.seed
    if seed is None:
        return first + slot
    return int(np.random.default_rng([step, slot]).integers(2**31)) if seed == -1 else seed


def caption_of(stem):
    """The caption of the image `stem`.*, to label its sample; the file name, with a warning, if it cannot be read."""
    try:
        return find_caption(stem).text
    except (OSError, ValueError) as error:
        warn(f"{error}; the sample is labelled with the file name")
        return os.path.basename(stem)
