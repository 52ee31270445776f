#!/usr/bin/env -S python3 -P
"""Shows the same images of two or more directories side by side, matched by relative path.

    ./dataset_scripts/compare_imgdirs.py output/baseline output/min_snr           # writes compare.html
    ./dataset_scripts/compare_imgdirs.py output/baseline output/min_snr --serve   # for many or large images
    ./dataset_scripts/compare_imgdirs.py a/samples/step-000500 b/samples/step-000500 --png sheet.png

For the output directory of a training run, its samples/ directory is compared. Symbolic links to files outside a
directory are skipped. The script needs only Pillow.
Exit code: 0 done, 1 nothing to compare or output not written, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

try:
    from PIL import Image, ImageDraw, ImageFont, ImageOps
except ModuleNotFoundError:
    sys.exit("compare_imgdirs.py needs Pillow: python3 -m pip install Pillow")

# No SVG, which can contain scripts.
IMAGE_TYPES = {f".{name}": f"image/{name}" for name in ("avif", "bmp", "gif", "jpeg", "png", "webp")}
IMAGE_TYPES[".jpg"] = "image/jpeg"
# For files of any name: Pillow also has decoders that run programs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "WEBP")
TEMPLATE = Path(__file__).with_suffix(".html")
LARGE_PAGE_BYTES = 100 * 2**20
MAX_PAGE_BYTES = 350 * 2**20  # in base64, just below Chromium's longest string (512 Mi characters)
LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]+)?")
MAX_SHEET_PIXELS = 100_000_000
# What begins the files that this script writes; see cachetrain/outputs.py, which the script must not need.
PAGE_MARK, SHEET_MARK, MARK_BYTES = '<meta name="generator" content="cachetrain">', "cachetrain sheet", 2**16
SOFTWARE = 0x0131  # EXIF tag for the mark of a sheet
# What cachetrain.log.printable escapes.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on bad files
PAPER, INK, MUTED, EMPTY = "#ffffff", "#1d1c1a", "#79746c", "#f0eeea"

Row = tuple[str, list[int]]  # relative path of an image, and the indices of the directories that have this image


def printable(text: object) -> str:
    """The text in one line that changes nothing else on a terminal, as cachetrain.log.printable."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def natural_key(path: str) -> tuple:
    """Sort key that puts step-9 before step-10, folder by folder; the path breaks ties, so the order is fixed."""
    parts = [re.split(r"([0-9]+)", part.casefold()) for part in path.split("/")]
    return [[int(p) if i % 2 else p for i, p in enumerate(part)] for part in parts], path


def samples_root(directory: str) -> Path:
    """Returns the resolved directory to compare: the samples/ directory in `directory`, else `directory`."""
    samples = Path(directory) / "samples"
    return (samples if samples.is_dir() else Path(directory)).resolve()


def column_labels(directories: Sequence[str]) -> list[str]:
    """Returns short unique names: common endings are dropped, and parents are added if names would be equal."""
    parts = [Path(os.path.abspath(d).removesuffix("/samples") or "/").parts for d in directories]
    while len({p[-1] for p in parts}) == 1 and len(set(parts)) > 1:
        parts = [p[:-1] for p in parts]
    lengths, labels = [1] * len(parts), []
    for _ in range(max(map(len, parts))):
        labels = ["/".join(p[-n:]) for p, n in zip(parts, lengths, strict=True)]
        lengths = [n + (labels.count(x) > parts.count(p)) for n, x, p in zip(lengths, labels, parts, strict=True)]
    return [label + f" ({labels[:i].count(label) + 1})" * (label in labels[:i]) for i, label in enumerate(labels)]


def resolve_inside(root: Path, relative: str | Path) -> Path | None:
    """Returns the image file `relative` under the resolved `root`; None if it is not an image, is hidden, or lies
    outside."""
    try:
        path = (root / relative).resolve()
        names = (root / relative).relative_to(root).parts + path.relative_to(root).parts
        hidden = any(name.startswith(".") for name in names)
        inside = not hidden and path.suffix.lower() in IMAGE_TYPES and path.is_file()
    except (OSError, ValueError, RuntimeError):  # name too long, NUL byte, symlink loop
        return None
    return path if inside else None


def scan_images(root: Path) -> Iterator[str]:
    """Yields the relative paths of the images under `root`; hidden names and links to the outside are skipped."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in IMAGE_TYPES:
                continue
            path = Path(folder, name)
            if path.is_file() and (not path.is_symlink() or resolve_inside(root, path)):
                yield path.relative_to(root).as_posix()


def match_images(roots: Sequence[Path]) -> tuple[list[Row], list[Row]]:
    """Matches images by relative path, in linear time.

    Returns:
        (rows, missing), both in natural order: `rows` are images in two roots or more, `missing` are images that at
        least one root lacks. An image can be in both lists.
    """
    found = {}
    for column, root in enumerate(roots):
        for path in scan_images(root):
            found.setdefault(path, []).append(column)
    ordered = [(path, found[path]) for path in sorted(found, key=natural_key)]
    return [row for row in ordered if len(row[1]) > 1], [row for row in ordered if len(row[1]) < len(roots)]


def read_text(file) -> dict[str, str]:
    """Returns the text metadata of an image, given as path or file object; empty if there is none."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return {key: value for key, value in image.info.items() if isinstance(value, str)}
    except UNREADABLE:
        return {}


def embedded_side(root: Path, column: int, path: str) -> dict:
    """Returns {"src": data URI, "text": metadata} for an image."""
    data = (root / path).read_bytes()
    source = f"data:{IMAGE_TYPES[Path(path).suffix.lower()]};base64,{base64.b64encode(data).decode()}"
    return {"src": source, "text": read_text(io.BytesIO(data))}


def served_side(root: Path, column: int, path: str) -> dict:
    """Returns {"src": address on the server}; the page requests the metadata when the image is shown."""
    return {"src": f"image/{column}/{quote(os.fsencode(path))}"}


def page_chunks(
    roots: Sequence[Path], labels: list[str], rows: list[Row], missing: list[Row], make_side: Callable
) -> Iterator[str]:
    """Yields the HTML page row by row, so that a large page need not fit into memory."""

    def script_json(value):  # "<" could end the script element that holds the data, or open another one
        return json.dumps(value).replace("<", "\\u003c")

    head, tail = TEMPLATE.read_text(encoding="utf-8").split("__COMPARE_DATA__")
    yield f'{head}{{"labels": {script_json(labels)}, "missing": {script_json(missing)}, "rows": ['
    for i, (path, columns) in enumerate(rows):
        sides = [make_side(roots[c], c, path) if c in columns else None for c in range(len(roots))]
        yield ("," if i else "") + "\n" + script_json({"path": path, "sides": sides})
    yield f"]}}{tail}"


def make_server(roots: Sequence[Path], labels: list[str], port: int = 0) -> ThreadingHTTPServer:
    """Returns an HTTP server on 127.0.0.1 for the page and the images under `roots`; port 0: any free port."""
    server = ThreadingHTTPServer(("127.0.0.1", port), CompareHandler)
    server.roots = roots
    server.labels = labels
    return server


class CompareHandler(BaseHTTPRequestHandler):
    """Handles GET and HEAD for /, /image/COLUMN/PATH and /text/COLUMN/PATH; other paths give 404."""

    timeout = 30  # seconds that a connection may be silent

    def do_GET(self):
        if not LOOPBACK.fullmatch(self.headers.get("Host", "")):  # against DNS rebinding
            return self.send_error(HTTPStatus.FORBIDDEN, "Only for 127.0.0.1 and localhost")
        path, roots = self.path.partition("?")[0], self.server.roots
        if path == "/":  # scanned again on every reload, to show new samples of a run in progress
            chunks = page_chunks(roots, self.server.labels, *match_images(roots), served_side)
            return self.send_body("text/html; charset=utf-8", "".join(chunks).encode())
        if not (file := self.requested_file(path)):
            return self.send_error(HTTPStatus.NOT_FOUND)
        if path.startswith("/text/"):
            return self.send_body("application/json", json.dumps(read_text(file)).encode())
        self.send_body(IMAGE_TYPES[file.suffix.lower()], file.read_bytes())

    do_HEAD = do_GET

    def requested_file(self, path: str) -> Path | None:
        """Returns the image for /image/COLUMN/PATH or /text/COLUMN/PATH, or None."""
        match = re.fullmatch(r"/(?:image|text)/([0-9]{1,4})/(.+)", path)
        if not match or int(match[1]) >= len(self.server.roots):
            return None
        return resolve_inside(self.server.roots[int(match[1])], os.fsdecode(unquote_to_bytes(match[2])))

    def send_body(self, content_type, body):
        self.send_response(HTTPStatus.OK)
        headers = {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-cache",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Content-Security-Policy": "frame-ancestors 'none'",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError, TimeoutError):  # the browser has closed it, or does not read
                self.wfile.write(body)

    def log_message(self, *args):
        pass


def thumbnail(path: Path, cell: int) -> Image.Image | str:
    """Returns an RGB image of at most cell x cell pixels, or "unreadable".

    Small images are enlarged by a whole factor, without smoothing.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            with contextlib.suppress(Exception):  # of EXIF data that cannot be read, Pillow raises almost anything
                image = ImageOps.exif_transpose(image)
            image = image.convert("RGBA")
    except UNREADABLE as error:
        print(printable(f"warning: {path}: {error}"), file=sys.stderr)
        return "unreadable"
    image = Image.alpha_composite(Image.new("RGBA", image.size, EMPTY), image).convert("RGB")
    if max(image.size) > cell:
        return ImageOps.contain(image, (cell, cell), Image.Resampling.LANCZOS)
    return ImageOps.scale(image, cell // max(image.size), Image.Resampling.NEAREST)


def draw_text(
    draw: ImageDraw.ImageDraw, position: tuple[int, int], text: str, width: int, color: str, size: int = 12
) -> None:
    """Draws a line of at most `width` pixels. Pillow's default font has only ASCII; other characters become "?"."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text[:width]) if not unicodedata.combining(c))
    text = re.sub(r"[^ -~]", "?", " ".join(text.split()))[: width // size * 5]  # characters are wider than size / 5
    font = ImageFont.load_default(size)
    while len(text) > 3 and font.getlength(text) > width:
        text = text.removesuffix("...")[:-1] + "..."
    draw.text(position, text, color, font)


def contact_sheet(roots: Sequence[Path], labels: list[str], rows: list[Row], cell: int = 256) -> Image.Image:
    """Draws a row per image, under its path and prompt, with a column per directory; returns an RGB image.

    Raises:
        ValueError: the sheet would have more than MAX_SHEET_PIXELS.
    """
    gap, header, caption = 12, 44, 36
    pitch = caption + cell + gap
    width, height = gap + (cell + gap) * len(roots), header + pitch * len(rows)
    if width * height > MAX_SHEET_PIXELS:
        raise ValueError(
            f"{len(rows)} rows are too many for one PNG; compare the directories of one step "
            "(RUN/samples/step-000500)"
        )
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = range(gap, width - gap, cell + gap)
    for left, label in zip(lefts, labels, strict=True):
        draw_text(draw, (left, gap), label, cell, INK, 16)
    for top, (path, columns) in zip(range(header, height, pitch), rows, strict=True):
        prompt = read_text(roots[columns[0]] / path).get("prompt", "")
        draw_text(draw, (gap, top), path, width - 2 * gap, MUTED)
        draw_text(draw, (gap, top + 16), prompt, width - 2 * gap, INK)
        for column, left in enumerate(lefts):
            image = thumbnail(roots[column] / path, cell) if column in columns else "missing"
            if isinstance(image, str):
                draw.rectangle((left, top + caption, left + cell - 1, top + caption + cell - 1), EMPTY)
                draw_text(draw, (left + 8, top + caption + 8), image, cell - 16, MUTED)
            else:
                sheet.paste(image, (left, top + caption))
    return sheet


def write_page(path: Path, roots: Sequence[Path], labels: list[str], rows: list[Row], missing: list[Row]) -> None:
    """Writes the page with all images embedded.

    Raises:
        ValueError: the page would be too large for browsers.
    """
    total = sum((roots[column] / image).stat().st_size for image, columns in rows for column in columns)
    if total > MAX_PAGE_BYTES:
        raise ValueError(f"{total / 2**20:.0f} MiB of images are too much for one page; use --serve")
    if total > LARGE_PAGE_BYTES:
        print(f"warning: a page with {total / 2**20:.0f} MiB of images is slow; better use --serve", file=sys.stderr)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(page_chunks(roots, labels, rows, missing, embedded_side))


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, whatever characters the names in it have."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")


def output_problem(path: Path, suffix: str, mark: str) -> str | None:
    """What is wrong with a file to write: another suffix, or something other than an earlier page or sheet."""
    if path.suffix.lower() != suffix:
        return f"{path}: expected a file name that ends with {suffix}"
    try:
        if not path.exists():
            return None
        if not path.is_file():
            return f"{path}: is not a regular file, and is not replaced; choose another name"
        with path.open("rb") as file:
            start = file.read(MARK_BYTES)
    except OSError as error:
        return f"{path}: {error.strerror}; choose another name"
    if start and mark.encode() not in start:
        return f"{path} exists, and is not of this script; choose another name, or delete it"
    return None


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="two or more directories of images")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--out",
        type=Path,
        default=Path("compare.html"),
        metavar="FILE",
        help="HTML page to write, with all images embedded (default: compare.html)",
    )
    output.add_argument(
        "--serve",
        type=port,
        nargs="?",
        const=0,
        metavar="PORT",
        help="serve the page on 127.0.0.1 instead, for many or large images (PORT from 0 to 65535; default: 0, any "
        "free port)",
    )
    output.add_argument("--png", type=Path, metavar="FILE", help="write one large PNG instead, with a row per image")
    args = parser.parse_args(argv)
    for directory in args.directories:
        if not Path(directory).is_dir():
            parser.error(f"{directory} is not a directory")
    if len(args.directories) < 2:
        parser.error(f"expected two or more directories, got only {args.directories[0]}")
    target = (args.png, ".png", SHEET_MARK) if args.png else (args.out, ".html", PAGE_MARK)
    if args.serve is None and (problem := output_problem(*target)):
        parser.error(problem)
    return args


def port(text):
    """An argparse type; cachetrain.cli has the same, but this script must not need cachetrain."""
    if text.isascii() and text.isdecimal() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 65535, got {text}")


def main(argv=None):
    args = parse_args(argv)
    roots = [samples_root(directory) for directory in args.directories]
    labels = column_labels(args.directories)
    rows, missing = match_images(roots)
    if not rows:
        print("error: no image has the same relative path in two of these directories:", file=sys.stderr)
        for root in roots:
            first = min(scan_images(root), key=natural_key, default="no images")
            print(printable(f"  {root}: {first}"), file=sys.stderr)
        return 1
    print(f"{len(rows)} common image{'s' * (len(rows) != 1)}, {len(missing)} missing somewhere")
    try:
        if args.serve is not None:
            with make_server(roots, labels, args.serve) as server, contextlib.suppress(KeyboardInterrupt):
                print(f"http://127.0.0.1:{server.server_port}/ (stop with Ctrl-C)", flush=True)
                server.serve_forever()
        elif args.png:
            exif = Image.Exif()
            exif[SOFTWARE] = SHEET_MARK
            contact_sheet(roots, labels, rows).save(args.png, "PNG", exif=exif)
            print(printable(f"wrote {args.png}"))
        else:
            write_page(args.out, roots, labels, rows, missing)
            print(printable(f"wrote {args.out}"))
    except (OSError, OverflowError, ValueError) as error:  # OverflowError: a port above 65535
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
