"""The sidecars of one suffix: how many are in which state, what made them, which commands would complete them."""

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from cachetrain.caching.buckets import Coverage, is_upscaled
from cachetrain.caching.freshness import CORRUPT, FOREIGN, FRESH, MISSING, STALE
from cachetrain.data.sidecar import RUN_KEYS, SUFFIXES, Header, caption_lengths, num_crops, num_truncated
from cachetrain.data.variants import PLAIN, CaptionSettings
from cachetrain.reading import json_object

ORPHANED, UNREADABLE = "orphaned", "unreadable"

# The states that running a cache script mends.
TO_MAKE = (MISSING, STALE, CORRUPT)

IMAGE_SCRIPTS = {"img_sdvae": "cache/create_img_sdvae.py", "img_sdxl": "cache/create_img_sdxl.py"}
TEXT_SCRIPTS = {
    "txt_clipl": "cache/create_clipl.py",
    "txt_t5cache": "cache/create_t5cache_768.py",
    "txt_sdxl": "cache/create_sdxl_text.py",
}
SCRIPTS = IMAGE_SCRIPTS | TEXT_SCRIPTS

# Defaults of those options of the cache scripts that take a value.
_DEFAULTS = {"aspect_limit": 2.0, "clip_skip": 0, "max_length": 256, "dtype": "auto", "store_dtype": "bf16"}
_DEFAULTS |= {"mask": None, "crops": 1}


class Examples:
    """A count, and the first few of what it counts."""

    def __init__(self, limit: int = 3):
        self.limit = limit
        self.count = 0
        self.first = []

    def add(self, line: str) -> None:
        self.count += 1
        if len(self.first) < self.limit:
            self.first.append(line)


class Inspection(NamedTuple):
    """What inspecting one sidecar shows. `has_our_header`: it carries a cachetrain header, intact or damaged."""

    state: str
    header: Header
    num_bytes: int
    has_our_header: bool


class Caches:
    """What is known about the sidecars of one suffix; its memory does not grow with their number.

    A run identity is the tuple of header fields on which sidecars of one run agree (`Header.run_identity`).

    Attributes:
        kind: None until a header shows it.
        requested: named on the command line, so shown even if there are none.
        counts: Counter by state.
        num_of_images: how many belong to an image that exists.
        examples: by state.
        runs: Counter by (root, run identity, state).
        first: by run identity, (path, header fields) of the first sidecar that has it.
        majority: by root, the run identity that most sidecars have.
        nulls: by root, the state of the null caption.
        tokens: Counter of captions by their number of tokens; each variant counts.
        num_variants: Counter of text sidecars by their number of variants.
        captions: Counter of text sidecars by the header field `captions`, which says how captions were made.
        mask_share: sum over the `num_masked` images with a mask of its mean.
        crops: Counter of images by their number of crops.
    """

    def __init__(self, suffix: str, kind: str | None, requested: bool):
        self.suffix = suffix
        self.kind = kind
        self.requested = requested
        self.counts = Counter()
        self.num_of_images = 0
        self.num_bytes = 0
        self.examples = defaultdict(Examples)
        self.runs = Counter()
        self.first = {}
        self.majority = {}
        self.nulls = {}
        self.coverage = Coverage()
        self.num_upscaled = 0
        self.num_masked = 0
        self.mask_share = 0.0
        self.crops = Counter()
        self.tokens = Counter()
        self.num_variants = Counter()
        self.captions = Counter()
        self.num_truncated = 0

    @property
    def is_text(self) -> bool:
        return (self.kind or "").startswith("txt")

    @property
    def bad_nulls(self) -> dict[str, str]:
        """Root -> state of those null captions that are neither fresh nor foreign."""
        return {root: state for root, state in self.nulls.items() if state not in (FRESH, FOREIGN)}

    @property
    def mixed(self) -> bool:
        """Whether the trainer would refuse them: it needs one encoder, and within each root the same settings."""
        in_roots = {(root, identity) for root, identity, _ in self.runs}
        encoders = {_encoder(identity) for _, identity in in_roots}
        return len(encoders) > 1 or len(in_roots) > len({root for root, _ in in_roots})

    @property
    def complete(self) -> bool:
        return not (self.mixed or self.bad_nulls or any(self.counts[state] for state in TO_MAKE))

    def add(self, root: str, path: str, inspection: Inspection, has_image: bool) -> None:
        """Adds one sidecar."""
        state, header = inspection.state, inspection.header
        self.num_of_images += has_image
        self.counts[state] += 1
        self.num_bytes += inspection.num_bytes
        self.examples[state].add(path)
        if state in (CORRUPT, ORPHANED):
            return
        # Other programs may use the names of our header fields for something else.
        metadata = {} if state == FOREIGN else header.metadata
        if self.kind is None and metadata.get("kind") in SUFFIXES:
            self.kind = metadata["kind"]
        self.runs[root, header.run_identity, state] += 1
        self.first.setdefault(header.run_identity, (path, metadata))
        self.num_truncated += num_truncated(metadata)
        self.tokens.update(lengths := caption_lengths(metadata))
        if lengths:
            self.num_variants[len(lengths)] += 1
            self.captions[metadata.get("captions", "")] += 1
        if "crop_box" in metadata:
            self.coverage.add(metadata)
            self.num_upscaled += is_upscaled(metadata)
            self.num_masked += "mask_share" in metadata
            self.mask_share += float(metadata.get("mask_share", 0))
            self.crops[num_crops(header.shapes)] += 1

    def finish(self) -> None:
        """After the last sidecar: fresh ones that differ from the majority in encoder or settings become stale."""
        self._find_majority()
        for (root, identity, state), count in self.runs.items():
            if state == FRESH and identity != self.majority.get(root):
                self.counts[FRESH] -= count
                self.counts[STALE] += count
                if self.first[identity][0] not in self.examples[STALE].first:
                    self.examples[STALE].add(self.first[identity][0])

    def _find_majority(self):
        """Of the encoder that most sidecars have, finds the settings that most of each root have."""
        encoders, in_roots = Counter(), Counter()
        for (root, identity, state), count in self.runs.items():
            if state != FOREIGN:
                encoders[_encoder(identity)] += count
                in_roots[root, identity] += count
        for (root, identity), _ in in_roots.most_common():
            if _encoder(identity) == encoders.most_common(1)[0][0]:
                self.majority.setdefault(root, identity)

    def by_run(self) -> Iterator[tuple[int, str, dict[str, str], list[str]]]:
        """Yields, for each run identity, (number, path of the first, its header fields, names of the fields in which
        it differs from the majority)."""
        counts = Counter()
        for (_, identity, _), count in self.runs.items():
            counts[identity] += count
        most = next(iter(self.majority.values()), None)
        for identity, count in counts.most_common():
            path, metadata = self.first[identity]
            differs = metadata and most and identity not in self.majority.values()
            yield count, path, metadata, differing(identity, most) if differs else []

    def commands(self, roots: list[str]) -> list[str]:
        """Returns the command lines that make what is not fresh, with the model and settings of the majority."""
        most, roots_of, lines = next(iter(self.majority.values()), None), defaultdict(list), []
        for root in roots:
            roots_of[self.majority.get(root, most)].append(root)
        for identity, some in roots_of.items() if self.kind else ():
            metadata = self.first[identity][1] if identity else {}
            words = [SCRIPTS[self.kind], *(word for root in some for word in ("--data_root", root))]
            for option in ("model", "revision", "norm"):
                words += [f"--{option}", metadata[option]] if metadata.get(option) else []
            words += settings_flags(metadata)
            words += captions_flags(self.captions.most_common(1)[0][0] if self.captions else "")
            words += ["--cache_suffix", self.suffix] if self.suffix != SUFFIXES[self.kind] else []
            lines.append(shlex.join(words))
        return lines


def settings_flags(metadata: dict[str, str]) -> list[str]:
    """The options of a cache script that give the settings of this header, as words; defaults are left out."""
    settings = _settings(metadata)
    width, height, aspect_limit = (settings.get(key) for key in ("width", "height", "aspect_limit"))
    words = []
    if aspect_limit is not None:
        words += ["--bucket", "--resolution", width]
    elif width is not None:
        square = width == height and width % 64 == 0
        words += ["--resolution", width] if square else ["--target_width", width, "--target_height", height]
    for option in ("flip", "store_posterior", "raw", "custom"):
        words += [f"--{option}"] if settings.get(option) else []
    for option, default in _DEFAULTS.items():
        words += [f"--{option}", settings[option]] if settings.get(option, default) not in (None, default) else []
    return [str(word) for word in words]


def captions_flags(text: str) -> list[str]:
    """The options of a text cache script that give this header field `captions`, as words."""
    try:
        settings = CaptionSettings.from_header("a sidecar", {"captions": text})
    except ValueError:
        return [text]
    words = []
    for name, value in settings._asdict().items():
        if value != getattr(PLAIN, name):
            words += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    return [str(word) for word in words]


def _encoder(identity):
    return tuple(value for key, value in zip(RUN_KEYS, identity, strict=True) if key != "settings")


def _settings(metadata):
    text = metadata.get("settings") or "{}"
    try:
        return json_object("settings", text)
    except ValueError:
        return {"settings": text}


def differing(identity: tuple[str, ...], other: tuple[str, ...]) -> list[str]:
    """Names of the header fields and of the single settings in which two run identities differ."""
    a, b = (dict(zip(RUN_KEYS, one, strict=True)) for one in (identity, other))
    names = [key for key in RUN_KEYS if a[key] != b[key] and key != "settings"]
    a, b = _settings(a), _settings(b)
    return names + [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
