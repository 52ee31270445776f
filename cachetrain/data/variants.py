"""Captions in variants: several captions of one image, of which each visit in training draws one.

The variants of an image are the lines of a caption file, several caption files, and tags in shuffled order. All of
them are encoded into one text sidecar. The first is the caption as written; validation and samples use it alone.
"""

import hashlib
import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cachetrain.data.captions import Caption, Pair, all_caption_files, caption_file, read_caption
from cachetrain.data.sidecar import NULL_STEM, SidecarError
from cachetrain.reading import json_object

MAX_VARIANTS = 256  # of an image


class CaptionSettings(NamedTuple):
    """How captions are made of caption files; the defaults make one of one file, as it is.

    Attributes:
        captions: "lines": each line of a file is a caption; "files": all caption files of an image count.
        shuffle_tags: number of variants of each caption: itself, and this number - 1 with its tags shuffled.
        keep_tags: number of tags at the beginning that are neither moved nor dropped.
        drop_tags: probability of dropping each other tag of a shuffled variant.
        tag_files: the files whose tags are shuffled, as ".txt"; (): all.
        seed: of shuffling and dropping, together with the caption itself.
        prefix, suffix: put around each variant.
    """

    captions: tuple[str, ...] = ()
    shuffle_tags: int = 1
    keep_tags: int = 0
    drop_tags: float = 0.0
    tag_separator: str = ","
    tag_files: tuple[str, ...] = ()
    seed: int = 0
    prefix: str = ""
    suffix: str = ""

    def in_header(self) -> str:
        """JSON of what differs from the defaults, for the header field `captions`; "" if nothing does."""
        if self == PLAIN:  # at once: asked for each of millions of captions
            return ""
        changed = {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}
        return json.dumps(changed, sort_keys=True)

    @classmethod
    def from_header(cls, where: str, metadata: Mapping[str, str]) -> "CaptionSettings":
        """Returns the settings with which a sidecar was made; `where` names it in the error message.

        Raises:
            ValueError: the header field `captions` is not of the cache scripts.
        """
        if not (text := metadata.get("captions")):
            return cls()
        values = json_object(f"{where}: captions in its header", text)
        types = {name: type(default) for name, default in cls._field_defaults.items()}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        if all(type(value) is types.get(name) for name, value in values.items()):
            settings = cls(**values)
            names = (*settings.captions, *settings.tag_files)
            if 0 < settings.shuffle_tags <= MAX_VARIANTS and all(type(n) is str for n in names):
                return settings
        raise ValueError(f"{where}: its header says captions {text:.80}; run the cache script again")


class Captions(NamedTuple):
    """The captions of one image, as they are encoded.

    Attributes:
        texts: the distinct ones, at least one; the first is the caption as written, with prefix and suffix.
        sources: (suffix of a caption file as ".txt", its captions) each; a caption is a tuple of the places of its
            variants in `texts`. The suffix of a caption taken from the file name is "".
        size, mtime_ns: of the caption files, as stored in sidecar headers.
        settings: CaptionSettings.in_header of the settings.
    """

    texts: tuple[str, ...]
    sources: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...]
    size: str
    mtime_ns: str
    settings: str

    @property
    def sha256(self) -> str:
        """Of the text, if there is one only, wherever it comes from; else of all texts and their sources."""
        content = self.texts[0] if len(self.texts) == 1 else json.dumps([self.texts, self.sources])
        return hashlib.sha256(content.encode()).hexdigest()

    def header_fields(self) -> dict[str, str]:
        """Header fields of the sidecar: the state of the source, and where there are any, settings and variants."""
        fields = {"source_size": self.size, "source_mtime_ns": self.mtime_ns, "source_sha256": self.sha256}
        if self.settings:
            fields["captions"] = self.settings
        if len(self.texts) > 1:
            fields["variants"] = json.dumps(dict(self.sources), separators=(",", ":"))
        return fields


PLAIN = CaptionSettings()


def settings_of_pair(pair: Pair, settings: CaptionSettings) -> CaptionSettings:
    """`settings`, unless the pair is that of the null caption, which is empty whatever the settings."""
    return PLAIN if os.path.basename(pair.image) == NULL_STEM else settings


def caption_files(pair: Pair, settings: CaptionSettings) -> tuple[str | None, ...]:
    """Paths of the files that a pair's captions come from; None: the image's file name."""
    files = pair.caption_files or (None,)
    return files if "files" in settings.captions else files[:1]


def fingerprint(pair: Pair, settings: CaptionSettings, states: Sequence[tuple]) -> tuple[str, str]:
    """Returns (sizes, times) of a pair's caption files for a header: `12`, or `.txt 12, .long.txt 80`.

    Args:
        states: (size, mtime_ns) of each of `caption_files`.
    """
    sizes, times = zip(*states, strict=True)
    if "files" in settings.captions:
        names = (_source(pair, path) for path in caption_files(pair, settings))
        sizes = (f"{name} {size}" for name, size in zip(names, sizes, strict=True))
    return ", ".join(map(str, sizes)), ", ".join(map(str, times))


def read_captions(pair: Pair, settings: CaptionSettings = PLAIN) -> Captions:
    """Reads the captions of a pair and makes their variants. Empty captions count only if there are no others.

    Raises:
        OSError: a caption file cannot be read, or has more than MAX_CAPTION bytes.
        ValueError: a caption is not UTF-8 text, or there are more than MAX_VARIANTS.
    """
    settings = settings_of_pair(pair, settings)
    return captions_of(
        pair, [read_caption(Pair(pair.image, path)) for path in caption_files(pair, settings)], settings
    )


def captions_of(pair: Pair, read: Sequence[Caption], settings: CaptionSettings) -> Captions:
    """Makes the variants of captions that have been read, one of each of `caption_files`.

    Raises:
        ValueError: there are more than MAX_VARIANTS.
    """
    files = caption_files(pair, settings)
    written = {}  # source -> captions
    for path, caption in zip(files, read, strict=True):
        lines = re.split("[\r\n]+", caption.text) if "lines" in settings.captions else [caption.text]
        written.setdefault(_source(pair, path), []).extend(line.strip() for line in lines)
    kept = {source: texts for source, captions in written.items() if (texts := list(filter(None, captions)))}
    kept = kept or {_source(pair, files[0]): [""]}
    places, sources = {}, []
    for source, texts in kept.items():
        number = settings.shuffle_tags if not settings.tag_files or source in settings.tag_files else 1
        captions = []
        for text in texts:
            variants = dict.fromkeys(_variant(text, i, settings) for i in range(number))
            captions.append(tuple(places.setdefault(variant, len(places)) for variant in variants))
            if len(places) > MAX_VARIANTS or len(captions) > MAX_VARIANTS:
                raise ValueError(
                    f"{files[0]}: makes more than {MAX_VARIANTS} captions of one image; use fewer lines, files or "
                    "--shuffle_tags"
                )
        sources.append((source, tuple(captions)))
    size, mtime_ns = fingerprint(pair, settings, [(caption.size, caption.mtime_ns) for caption in read])
    return Captions(tuple(places), tuple(sources), size, mtime_ns, settings.in_header())


def first_caption(stem: str, settings: CaptionSettings) -> str:
    """Returns the first of the captions of the image `stem`.*, which need not exist; raises like `read_captions`."""
    files = all_caption_files(stem) if "files" in settings.captions else [caption_file(stem)]
    file, *more = files or [None]
    return read_captions(Pair(f"{stem}.jpg", file, tuple(more)), settings).texts[0]


def draw_variant(uniform: float, sources: Mapping[str, Sequence], weights: Mapping[str, float]) -> int:
    """Draws the place of a variant: a source by weight, then one of its captions, then a variant of that caption.

    Args:
        uniform: number in [0, 1), which decides.
        sources: of `sources_of`.
        weights: {source: weight}; the others have weight 1.
    """
    rest = uniform * sum(weights.get(source, 1.0) for source in sources)
    for source in sources:
        captions, weight = sources[source], weights.get(source, 1.0)
        if rest < weight:
            break
        rest -= weight
    number, within = divmod(min(rest / weight, 1.0) * len(captions), 1)
    caption = captions[min(int(number), len(captions) - 1)]  # min: rounding
    return caption[int(within * len(caption))]


def sources_of(path: str, metadata: Mapping[str, str], num_variants: int) -> dict[str, list[list[int]]]:
    """Returns the sources of a sidecar as in Captions; without a header, all variants are captions of one source.

    Raises:
        SidecarError: the header does not fit the number of variants.
    """
    if "variants" not in metadata:
        return {"": [[place] for place in range(num_variants)]}
    sources = json_object(f"{path}: variants in its header", metadata["variants"])
    captions = [caption for one in sources.values() for caption in (one if _is_list_of(list, one) else [[]])]
    places = {place for caption in captions for place in (caption if _is_list_of(int, caption) else [None])}
    if places != set(range(num_variants)):
        raise SidecarError(
            f"{path}: holds {num_variants} variants, its header says {metadata['variants']:.80}; run the cache "
            "script again"
        )
    return sources


def _is_list_of(kind, value):
    return isinstance(value, list) and len(value) > 0 and all(type(entry) is kind for entry in value)


def _source(pair, path):
    """Suffix of a caption file, in lower case: ".txt", ".long.txt"; "" of a caption in the image's file name."""
    return "" if path is None else path[len(os.path.splitext(pair.image)[0]) :].lower()


def _variant(text, number, settings):
    """Variant `number` of a caption, a pure function of its arguments; 0: the caption as written."""
    if number:
        text = _shuffled(text, number, settings)
    return f"{settings.prefix}{text}{settings.suffix}".strip()


def _shuffled(text, number, settings):
    head, separator, tail = text.partition(settings.tag_separator)
    if not separator:
        return text
    tags = [tag for part in text.split(settings.tag_separator) if (tag := part.strip())]
    # Of Python's random, random() alone gives the same numbers in all versions.
    draw = random.Random(f"{settings.seed} {number} {text}").random
    kept, others = tags[: settings.keep_tags], [(draw(), draw(), tag) for tag in tags[settings.keep_tags :]]
    shuffled = kept + [tag for _, drop, tag in sorted(others) if drop >= settings.drop_tags]
    around = head[len(head.rstrip()) :], tail[: len(tail) - len(tail.lstrip())]  # "," or ", " as in this caption
    return text if shuffled == tags else separator.join(around).join(shuffled)
