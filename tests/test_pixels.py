"""cachetrain/caching/pixels.py, metadata.py: colors, bits and damaged metadata of image files that Pillow opens."""

import ast
import io
import struct
import zlib

import numpy as np
import pytest
from helpers import BENCHMARKS, REPO, SCRIPTS
from PIL import EpsImagePlugin, Image, ImageCms, UnidentifiedImageError

from cachetrain.caching import images
from cachetrain.caching.images import decode

RED = (234, 51, 35)


def pixel(data):
    """The color of a plain image, as it is encoded."""
    return tuple(decode(data, [(16, 16)])[0][5, 5].tolist())


def saved(image, format_name="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(depth, color_type, row, *chunks):
    """A PNG of 16x16 pixels, all rows alike."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, depth, color_type, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress((b"\0" + row) * 16))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + rows + chunk(b"IEND", b"")


def tiff(depth, photometric, rows, *more):
    """A gray TIFF of 16x16 pixels; more: (tag, type, count, value)."""
    entries = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, depth), (259, 3, 1, 1), (262, 3, 1, photometric)]
    entries += [(273, 4, 1, 14 + 12 * (8 + len(more))), (277, 3, 1, 1), (279, 4, 1, len(rows)), *more]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + rows


# Colors


def display_p3():
    """The ICC profile of Apple's screens and cameras: sRGB's with other primaries."""
    profile = bytearray(srgb())
    (number,) = struct.unpack_from(">I", profile, 128)
    tags = {name: start for name, start, _ in struct.iter_unpack(">4sII", profile[132 : 132 + 12 * number])}
    primaries = {
        b"rXYZ": (0.5151, 0.2412, -0.0011),
        b"gXYZ": (0.2920, 0.6922, 0.0419),
        b"bXYZ": (0.1571, 0.0666, 0.7841),
    }
    for name, xyz in primaries.items():
        struct.pack_into(">3i", profile, tags[name] + 8, *(round(value * 65536) for value in xyz))
    return bytes(profile)


def srgb():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def gray_gamma(gamma):
    white = b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in (0.9642, 1, 0.8249)))
    curve = b"curv" + bytes(4) + struct.pack(">IHH", 1, round(gamma * 256), 0)
    start = 128 + 4 + 2 * 12
    table = struct.pack(">I4sII4sII", 2, b"wtpt", start, len(white), b"kTRC", start + len(white), len(curve))
    size = start + len(white) + len(curve)
    header = struct.pack(">I4sI4s4s4s12x4s28x", size, b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"acsp")
    return (header + white[8:]).ljust(128, b"\0") + table + white + curve


def test_colors_are_converted_from_their_icc_profile_to_srgb():
    profile = display_p3()
    image = Image.new("RGB", (16, 16), (180, 90, 60))
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    expected = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB")).getpixel((0, 0))
    assert max(abs(a - b) for a, b in zip(expected, (180, 90, 60), strict=True)) > 10
    assert pixel(saved(image, icc_profile=profile)) == expected
    assert pixel(saved(image.quantize(4), icc_profile=profile)) == expected
    half = image.copy()
    half.putalpha(128)
    on_white = tuple(round((value * 128 + 255 * 127) / 255) for value in expected)
    found = pixel(saved(half, icc_profile=profile))
    assert max(abs(a - b) for a, b in zip(found, on_white, strict=True)) <= 1


def test_gray_is_converted_from_its_gamma():
    expected = round(255 * (((100 / 255) ** 1.8) ** (1 / 2.4) * 1.055 - 0.055))
    for image in (Image.new("L", (16, 16), 100), Image.new("LA", (16, 16), (100, 255))):
        assert pixel(saved(image, icc_profile=gray_gamma(1.8))) == pytest.approx((expected,) * 3, abs=1)


@pytest.mark.parametrize(
    "profile", [srgb(), b"no profile" * 50, display_p3()[:200], gray_gamma(1.8)], ids=["sRGB", "junk", "cut", "gray"]
)
def test_srgb_and_unusable_profiles_change_no_pixel(profile):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert np.array_equal(decode(saved(noise, icc_profile=profile), [(16, 16)])[0], noise)


# Bits


def test_gray_of_9_to_16_bits_is_scaled_and_not_clipped():
    wide = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    expected = np.rint(wide / 257).astype(np.uint8)[..., None].repeat(3, -1)
    pgm = b"P5 16 16 65535\n" + wide.astype(">u2").tobytes()
    for data in (saved(Image.fromarray(wide)), saved(Image.fromarray(wide), "TIFF"), pgm):
        assert np.array_equal(decode(data, [(16, 16)])[0], expected)
    assert np.array_equal(decode(tiff(16, 0, wide.tobytes()), [(16, 16)])[0], 255 - expected)  # white is zero
    assert pixel(tiff(12, 1, b"\x80\x08\x00" * 128)) == (128,) * 3  # 2048 of 4095


def test_pixels_of_32_bits_are_refused_with_a_reason():
    values = np.full((16, 16), 200)
    for data in (
        tiff(32, 1, values.astype("<u4").tobytes()),
        saved(Image.fromarray(values.astype(np.int32)), "TIFF"),
        saved(Image.fromarray(values.astype(np.float32)), "TIFF"),
    ):
        with pytest.raises(ValueError, match="32 bits, whose range the file does not give; convert it"):
            pixel(data)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_color_of_a_png_is_white_whatever_the_bits(depth):
    most = 2**depth - 1
    for key in (0, most // 2, most):
        row = int("".join(format(key, f"0{depth}b") * 16), 2).to_bytes(2 * depth, "big")
        other = (key + most // 2 + 1) % (most + 1)
        assert pixel(png(depth, 0, row, chunk(b"tRNS", struct.pack(">H", key)))) == (255,) * 3
        assert pixel(png(depth, 0, row, chunk(b"tRNS", struct.pack(">H", other)))) == (round(key * 255 / most),) * 3
    if depth >= 8:
        color = [value * most // 255 for value in (128, 255, 0)]
        row = b"".join(value.to_bytes(depth // 8, "big") for value in color) * 16
        assert pixel(png(depth, 2, row)) == (128, 255, 0)
        assert pixel(png(depth, 2, row, chunk(b"tRNS", struct.pack(">3H", *color)))) == (255,) * 3


# Metadata

TURN = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # EXIF data: orientation 6
BAD_CHUNKS = {
    "EXIF": chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03"),
    "large text": chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(2 << 20))),
    "large profile": chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(3 << 20))),
    "raw profile": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 8\nzzzz")),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + b"not compressed"),
    "checksum": chunk(b"tEXt", b"a\0b")[:-4] + b"oops",
}
RATIONAL = struct.pack("<HHHIIHHIIIii", 2, 0x112, 3, 1, 6, 0x11A, 10, 1, 38, 0, -1, 0)
BAD_SEGMENTS = {
    "rational": b"Exif\0\0II*\0" + struct.pack("<I", 8) + RATIONAL,
    "EXIF": b"Exif\0\0what",
    "XMP": b"http://ns.adobe.com/xap/1.0/\0<tiff:Orientation>six",
}
BAD_TAGS = {
    "description": (270, 2, 400, 10**9),
    "XMP": (700, 4, 1, 65),
    "EXIF": (34665, 4, 1, 10**9),
    "profile": (34675, 7, 4000, 10**9),
}


@pytest.mark.parametrize("bad", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_png_metadata_that_cannot_be_read_spoils_no_pixel_and_no_other_metadata(bad):
    assert pixel(png(8, 2, bytes(RED) * 16, bad)) == RED
    p3 = chunk(b"iCCP", b"p3\0\0" + zlib.compress(display_p3()))
    if b"iCCP" not in bad:
        assert pixel(png(8, 2, bytes(RED) * 16, p3, bad)) == pixel(png(8, 2, bytes(RED) * 16, p3)) != RED
    if b"eXIf" not in bad:
        top = np.zeros((16, 16), np.uint8)
        top[:8] = 255
        rows = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in top)))
        plain = png(8, 0, bytes(16))
        data = plain[:33] + bad + chunk(b"eXIf", TURN) + rows + chunk(b"IEND", b"")
        pixels = decode(data, [(16, 16)])[0]
        assert pixels[:, 9:].min() == 255 and pixels[:, :7].max() == 0  # turned right


@pytest.mark.parametrize("bad", BAD_SEGMENTS.values(), ids=BAD_SEGMENTS)
def test_jpeg_metadata_that_cannot_be_read_spoils_no_pixel(bad):
    data = saved(Image.new("RGB", (16, 16), RED), "JPEG", quality=100)
    segment = b"\xff\xe1" + struct.pack(">H", len(bad) + 2) + bad
    assert pixel(data[:2] + segment + data[2:]) == pixel(data)


@pytest.mark.parametrize("bad", BAD_TAGS.values(), ids=BAD_TAGS)
def test_tiff_metadata_that_cannot_be_read_spoils_no_pixel(bad):
    assert pixel(tiff(8, 1, b"\x64" * 256, bad)) == (100,) * 3


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_missing_pixels_are_an_error_with_and_without_metadata(cut):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for format_name in ("PNG", "JPEG", "TIFF"):
        data = saved(noise, format_name, **({"comment": b"a"} if format_name == "JPEG" else {}))
        with pytest.raises((OSError, ValueError)):
            pixel(data[: int(len(data) * cut)])


# Programs


def test_no_file_starts_a_program_whatever_its_name(monkeypatch):
    def started(*_, **__):
        raise AssertionError("Ghostscript would run")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    with pytest.raises(UnidentifiedImageError):
        pixel(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n")


def test_every_image_is_opened_with_a_list_of_formats():
    modules = [path.relative_to(REPO).as_posix() for path in (REPO / "cachetrain").rglob("*.py")]
    opens = []
    for name in (*modules, *SCRIPTS, *BENCHMARKS):
        for node in ast.walk(ast.parse((REPO / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                opens.append((name, node.lineno, any(keyword.arg == "formats" for keyword in node.keywords)))
    assert len(opens) >= 7 and [place for *place, has_formats in opens if not has_formats] == []


def test_a_tga_without_alpha_bits_is_opaque():
    header = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 16, 16, 32, 0x20)
    assert pixel(header + bytes((10, 20, 200, 0)) * 256) == (200, 20, 10)
    assert pixel(header[:-1] + b"\x28" + bytes((10, 20, 200, 0)) * 256) == (255, 255, 255)


@pytest.mark.parametrize(("bits", "photometric"), [(16, 2), (8, 8)])
def test_a_tiff_of_planes_that_pillow_misreads_is_refused_with_a_reason(bits, photometric):
    size = 256 * bits // 8
    planes = [(258, 3, 3, 8 + 2 + 12 * 9 + 4), (273, 4, 3, 8 + 2 + 12 * 9 + 10), (279, 4, 3, 8 + 2 + 12 * 9 + 22)]
    entries = [(256, 4, 1, 16), (257, 4, 1, 16), (259, 3, 1, 1), (262, 3, 1, photometric), (277, 3, 1, 3), *planes]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted([*entries, (284, 3, 1, 2)]))
    start = 8 + 2 + 12 * 9 + 34
    tables = struct.pack("<3H3I3I", *[bits] * 3, *(start + i * size for i in range(3)), *[size] * 3)
    data = b"II*\0" + struct.pack("<IH", 8, 9) + directory + bytes(4) + tables + bytes(3 * size)
    with pytest.raises(ValueError, match="is a TIFF with a plane per channel"):
        decode(data, [(16, 16)])


# Large images


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(16, 16), (200, 40)])  # reduced, enlarged
def test_large_images_are_converted_in_bands_to_the_same_pixels(orientation, size, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(noise), exif=exif)
    whole = decode(data, [size])
    converted = []
    original = images.to_rgb
    monkeypatch.setattr(images, "to_rgb", lambda part, file: converted.append(part.size) or original(part, file))
    monkeypatch.setattr(images, "_BAND_PIXELS", 131 * 97 // 4)
    in_bands = decode(data, [size])
    assert len(converted) >= 4 and max(width * height for width, height in converted) < 131 * 97
    assert in_bands[1:] == whole[1:]
    difference = np.abs(in_bands[0].astype(int) - whole[0])
    assert difference.max() <= 1 and (difference > 0).mean() < 0.001  # rounding of where a band begins


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_large_images_of_any_mode_are_converted_in_bands(mode, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (97, 131, 4), dtype=np.uint8), "RGBA")
    data = saved(noise.convert("L").convert("I").convert(mode) if mode == "I;16" else noise.convert(mode))
    whole = decode(data, [(16, 16)])[0]
    monkeypatch.setattr(images, "_BAND_PIXELS", 3000)
    assert np.abs(decode(data, [(16, 16)])[0].astype(int) - whole).max() <= 1


def test_an_image_of_too_many_pixels_says_what_to_do(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"has more than .* pixels, which take too much memory; scale it down"):
        decode(saved(Image.new("RGB", (16, 16))), [(16, 16)])
