"""Takes metadata out of image files, for files whose pixels decode and whose metadata does not."""

import struct
from collections.abc import Iterator

# What a part of a file holds. Texts are all that neither the pixels nor their colors and orientation need.
_PIXELS, _TEXT, _PROFILE, _EXIF = "pixels", "text", "profile", "exif"

_PNG_CHUNKS = dict.fromkeys((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"), _PIXELS) | {
    b"iCCP": _PROFILE,
    b"eXIf": _EXIF,
}
# Comments, and all APPn but APP0 (JFIF) and APP14 (the color transform).
_JPEG_TEXTS = {0xFE, *range(0xE1, 0xEE), 0xEF}
_START_OF_SCAN = 0xDA
# TIFF 6.0: sizes, layout, compression, color map, tiles, samples, JPEG tables, YCbCr.
_TIFF_PIXELS = {*range(254, 267), 273, *range(277, 282), 284, 292, 293, 317, *range(320, 348), *range(512, 533)}
_TIFF_TAGS = dict.fromkeys(_TIFF_PIXELS, _PIXELS) | {34675: _PROFILE, 274: _EXIF}


def with_less_metadata(data: bytes) -> Iterator[bytes]:
    """Yields the bytes of a PNG, JPEG or TIFF without texts, then also without ICC profile or EXIF data or both.

    Yields nothing for other formats, and nothing twice.
    """
    parts, join = [], b"".join
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        parts = list(_png_parts(data))
    elif data.startswith(b"\xff\xd8"):
        parts = list(_jpeg_parts(data))
    elif data.startswith((b"II*\0", b"MM\0*")):
        parts, join = _tiff_parts(data)
    found, tried = {kind for kind, _ in parts}, {frozenset()}
    for dropped in ({_TEXT}, {_TEXT, _PROFILE}, {_TEXT, _EXIF}, {_TEXT, _PROFILE, _EXIF}):
        dropped = frozenset(found.intersection(dropped))
        if dropped not in tried:
            tried.add(dropped)
            yield join(part for kind, part in parts if kind not in dropped)


def _png_parts(data):
    """Yields (kind, bytes) of the signature and of each chunk."""
    yield _PIXELS, data[:8]
    start = 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        yield _PNG_CHUNKS.get(data[start + 4 : start + 8], _TEXT), data[start:end]
        start = end


def _jpeg_parts(data):
    """Yields (kind, bytes) of each segment before the first scan, and of the rest."""
    yield _PIXELS, data[:2]
    start = 2
    while data[start : start + 1] == b"\xff" and start + 4 <= len(data) and data[start + 1] != _START_OF_SCAN:
        if data[start + 1] == 0xFF:  # a fill byte
            start += 1
            continue
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        segment = data[start:end]
        if segment[4:10] == b"Exif\0\0":
            kind = _EXIF
        elif segment[4:16] == b"ICC_PROFILE\0":
            kind = _PROFILE
        else:
            kind = _TEXT if segment[1] in _JPEG_TEXTS else _PIXELS
        yield kind, segment
        start = end
    yield _PIXELS, data[start:]


def _tiff_parts(data):
    """Returns (list of (kind, bytes) of the entries of the first directory, function that puts some back)."""
    order = "<" if data.startswith(b"II") else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
    except struct.error:
        return [], None
    end = start + 2 + 12 * count
    entries = [data[at : at + 12] for at in range(start + 2, min(end, len(data)), 12)]
    tags = (struct.unpack_from(f"{order}H", entry.ljust(2))[0] for entry in entries)
    parts = [(_TIFF_TAGS.get(tag, _TEXT), entry) for tag, entry in zip(tags, entries, strict=True)]

    def join(kept):
        kept = list(kept)
        directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)  # no second directory
        return data[:start] + directory + data[start + len(directory) :]

    return parts, join
