"""Reads sample_prompts.txt and sample_prompts.json and checks their contents. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cachetrain import cli
from cachetrain.data.variants import PLAIN, CaptionSettings, first_caption
from cachetrain.log import warn
from cachetrain.reading import decoded, json_object, read_bytes


class Sample(NamedTuple):
    """One picture to draw.

    Attributes:
        prompt: None: a caption of the training data.
        seed: None: Prompts.seed; -1: a new one for each step.
        size: (width, height) in pixels; None: the default size.
        aspect_ratio: width / height, as an alternative to `size`.
        random_caption: use a random caption of the training data.
    """

    prompt: str | None = None
    negative_prompt: str = ""
    seed: int | None = None
    size: tuple[int, int] | None = None
    aspect_ratio: float | None = None
    random_caption: bool = False


class Prompts(NamedTuple):
    """The contents of a prompt file, with the key names of sample_prompts.json; None: the flags decide."""

    samples: tuple[Sample, ...] = ()
    batch_size: int | None = None
    seed: int | None = None
    cfgs: tuple[float, ...] | None = None
    scheduler: str | None = None
    num_inference_steps: int | None = None
    show_progress_bars: bool = False
    generate_samples_every_n_steps: int | None = None
    generate_pretrain_samples: bool = False


class _Rule(NamedTuple):
    """What a value in the file must satisfy: a test, and the expectation in words for error messages."""

    accepts: Callable[[Any], bool]
    expected: str


def _is_int(least, most=2**63 - 1):
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_in(number: cli.Number):
    kind = int if number.kind is int else int | float
    return lambda value: isinstance(value, kind) and not isinstance(value, bool) and number.holds(value)


def _number(number: cli.Number) -> _Rule:
    """The same range as that of a flag."""
    return _Rule(_is_in(number), number.expected)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_instance(kind):
    return lambda value: isinstance(value, kind)


def _is_text(value):
    """Whether a value is a string, without half a character (a lone surrogate, which JSON allows)."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_list_of_cfgs(value):
    return isinstance(value, list) and value != [] and all(map(_is_in(cli.guidance), value))


def _is_size(value):
    return isinstance(value, list) and len(value) == 2 and all(_is_int(64, 8192)(x) and x % 64 == 0 for x in value)


_FLAG = _Rule(_is_instance(bool), "true or false")
_STRING = _Rule(_is_text, "a string of whole characters")
_SEED = _Rule(_is_int(-1), "a whole number from 0, or -1 for a new one each time")

_FILE_KEYS = {
    "batch_size": _number(cli.batch_size),
    "seed": _SEED,
    "cfgs": _Rule(_is_list_of_cfgs, f"a list of numbers {cli.guidance.range}"),
    "scheduler": _STRING,
    "num_inference_steps": _number(cli.denoising_steps),
    "show_progress_bars": _FLAG,
    "generate_samples_every_n_steps": _number(cli.positive_int),
    "generate_pretrain_samples": _FLAG,
    "samples": _Rule(_is_instance(list), "a list"),
}
_SAMPLE_KEYS = {
    "prompt": _STRING,
    "negative_prompt": _STRING,
    "seed": _SEED,
    "size": _Rule(_is_size, "[width, height] in pixels, both multiples of 64, from 64 to 8192"),
    "aspect_ratio": _Rule(
        lambda value: _is_number(value) and 1 / 16 <= value <= 16, "width / height, from 1/16 to 16"
    ),
    "random_caption": _FLAG,
}


def prompts_of(texts: Iterable[str]) -> Prompts:
    """Returns Prompts with one sample per text."""
    return Prompts(tuple(map(Sample, texts)))


def read_prompts(path: str | os.PathLike, content: bytes | None = None) -> tuple[Prompts, list[str]]:
    """Reads a prompt file: JSON if the name ends in `.json`, else plain text with one prompt per line.

    Args:
        content: the file's bytes; None: read the file.

    Returns:
        (Prompts, warnings about unknown keys, which are ignored).

    Raises:
        ValueError: the file is invalid; the message gives file, line and reason.
        OSError: the file cannot be read.
    """
    text = decoded(path, read_bytes(path) if content is None else content)
    if Path(path).suffix.lower() != ".json":
        return prompts_of(line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()), []
    try:
        json_object(path, text)
    except ValueError as error:
        line = getattr(error.__cause__, "lineno", 1)
        reason = getattr(error.__cause__, "msg", f"expected an object {_EXAMPLE}")
        raise ValueError(f"{path}, line {line}: {reason}") from None
    return _JsonPrompts(path, text).parse()


_EXAMPLE = '{"samples": [...]}'


@dataclass
class _JsonPrompts:
    """A prompt file whose JSON syntax is valid; checks one value at a time, so that errors can give the line."""

    path: str | os.PathLike
    text: str
    warnings: list[str] = field(default_factory=list)

    def parse(self):
        """Returns and raises like read_prompts."""
        values, samples = {}, []
        for key, value, position in self._members(self.text.index("{")):
            if not self._check(key, value, position, _FILE_KEYS):
                continue
            values[key] = tuple(value) if isinstance(value, list) else value
            if key == "samples":
                samples = [self._sample(item, start) for _, item, start in self._members(position)]
        return Prompts(**values | {"samples": tuple(samples)}), self.warnings

    def _sample(self, value, position):
        where = self._where(position)
        if not isinstance(value, dict):
            raise ValueError(f'{where}: expected an object like {{"prompt": "a star"}}, found {value!r}')
        members = list(self._members(position))
        fields = {key: value for key, value, start in members if self._check(key, value, start, _SAMPLE_KEYS)}
        if ("prompt" in fields) == fields.get("random_caption", False):
            raise ValueError(f'{where}: a sample needs either "prompt" or "random_caption": true')
        if "size" in fields and "aspect_ratio" in fields:
            raise ValueError(f'{where}: a sample can have "size" or "aspect_ratio", not both')
        return Sample(**fields | ({"size": tuple(fields["size"])} if "size" in fields else {}))

    def _check(self, key, value, position, rules):
        """Returns whether `key` is known, with a warning if not; raises a ValueError if the value is invalid."""
        where = self._where(position)
        if key not in rules:
            self.warnings.append(f"{where}: unknown key {key!r} is ignored; expected one of {', '.join(rules)}")
            return False
        if not rules[key].accepts(value):
            raise ValueError(f'{where}: "{key}" is {json.dumps(value)}, expected {rules[key].expected}')
        return True

    def _members(self, start):
        """Yields (key, value, position of the value) for the object, or list (key None), that begins at `start`."""
        decode, position = json.JSONDecoder().raw_decode, start + 1
        while True:
            position = re.compile(r"[\s,]*").match(self.text, position).end()
            if self.text[position] in "]}":
                return
            key = None
            if self.text[start] == "{":
                key, position = decode(self.text, position)
                position = re.compile(r"\s*:\s*").match(self.text, position).end()
            value, end = decode(self.text, position)
            yield key, value, position
            position = end

    def _where(self, position):
        line = self.text.count("\n", 0, position) + 1
        return f"{self.path}, line {line}"


class PromptFile:
    """A prompt file that may be edited during a run; if an edit is invalid, the last valid prompts stay in use.

    Raises:
        ValueError, OSError: the file is invalid or unreadable when first opened.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self._content = read_bytes(path)
        self.prompts, warnings = read_prompts(path, self._content)
        for warning in warnings:
            warn(warning)

    def changed(self) -> Prompts | None:
        """Reads the file again; returns the Prompts if the content is new and valid, else None.

        Warns once about each new content that is invalid or has unknown keys.
        """
        try:
            content = read_bytes(self.path)
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


def sample_size(sample: Sample, native: tuple[int, int]) -> tuple[int, int] | None:
    """Returns the (width, height) in pixels that a sample asks for, or None.

    Args:
        native: (width, height) of the UNet's config; with an aspect ratio, the area stays about the same.
    """
    if sample.aspect_ratio is None:
        return sample.size
    width = math.sqrt(native[0] * native[1] * sample.aspect_ratio)
    return tuple(max(64, round(side / 64) * 64) for side in (width, width / sample.aspect_ratio))


def sample_seed(sample: Sample, prompts: Prompts, slot: int, step: int, first: int = 0) -> int:
    """Returns the seed for the sample in position `slot`: the sample's, else the file's, else `first` + slot.

    -1 gives a new seed for each step, the same in every run, so that runs can be compared.
    """
    seed = sample.seed if sample.seed is not None else prompts.seed
    if seed is None:
        return first + slot
    return int(np.random.default_rng([step, slot]).integers(2**31)) if seed == -1 else seed


def caption_of(stem: str, settings: CaptionSettings = PLAIN) -> str:
    """Returns the first caption of the image `stem`.* as a label; if unreadable, warns and returns the file name."""
    try:
        return first_caption(stem, settings)
    except (OSError, ValueError) as error:
        warn(f"{error}; the sample is labelled with the file name")
        return os.path.basename(stem)
