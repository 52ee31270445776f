#!/usr/bin/env python3
"""Shows the same images of two or more directories side by side, matched by relative path.

    ./dataset_scripts/compare_imgdirs.py output/baseline output/min_snr           # writes compare.html
    ./dataset_scripts/compare_imgdirs.py output/baseline output/min_snr --serve   # for many or large images
    ./dataset_scripts/compare_imgdirs.py a/samples/step-000500 b/samples/step-000500 --png sheet.png

A directory that holds a samples/ directory (the output of a training run) stands for that one. Links that lead out
of a directory are left out. Needs Pillow only.
Exit code: 0 done, 1 nothing to compare or not written, 2 wrong arguments.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import re
import sys
import unicodedata
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

try:
    from PIL import Image, ImageDraw, ImageFont, ImageOps
except ModuleNotFoundError:
    sys.exit("compare_imgdirs.py needs Pillow: python3 -m pip install Pillow")

# No SVG: it can carry scripts.
IMAGE_TYPES = {f".{name}": f"image/{name}" for name in ("avif", "bmp", "gif", "jpeg", "png", "webp")}
IMAGE_TYPES[".jpg"] = "image/jpeg"
TEMPLATE = Path(__file__).with_suffix(".html")
LARGE_PAGE_BYTES = 100 * 2**20
MAX_PAGE_BYTES = 350 * 2**20  # as base64 just below the longest string Chromium holds (512 Mi characters)
LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]+)?")
MAX_SHEET_PIXELS = 100_000_000
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on bad files
PAPER, INK, MUTED, EMPTY = "#ffffff", "#1d1c1a", "#79746c", "#f0eeea"


def natural_key(path):
    """Sorts step-9 before step-10, folder by folder; the path itself breaks ties, so the order never varies."""
    parts = [re.split(r"([0-9]+)", part.casefold()) for part in path.split("/")]
    return [[int(p) if i % 2 else p for i, p in enumerate(part)] for part in parts], path


def samples_root(directory):
    """Returns the resolved directory that is compared: `directory`, or the samples/ in it."""
    samples = Path(directory) / "samples"
    return (samples if samples.is_dir() else Path(directory)).resolve()


def column_labels(directories):
    """Returns short unique names: the endings all share are dropped, parents are added where names collide."""
    parts = [Path(os.path.abspath(d).removesuffix("/samples") or "/").parts for d in directories]
    while len({p[-1] for p in parts}) == 1 and len(set(parts)) > 1:
        parts = [p[:-1] for p in parts]
    lengths, labels = [1] * len(parts), []
    for _ in range(max(map(len, parts))):
        labels = ["/".join(p[-n:]) for p, n in zip(parts, lengths, strict=True)]
        lengths = [n + (labels.count(x) > parts.count(p)) for n, x, p in zip(lengths, labels, parts, strict=True)]
    return [label + f" ({labels[:i].count(label) + 1})" * (label in labels[:i]) for i, label in enumerate(labels)]


def resolve_inside(root, relative):
    """Returns the image file `relative` under the resolved `root`, or None if it is none or leads outside."""
    try:
        path = (root / relative).resolve()
        inside = path.is_relative_to(root) and path.suffix.lower() in IMAGE_TYPES and path.is_file()
    except (OSError, ValueError, RuntimeError):  # name too long, NUL byte, symlink loop
        return None
    return path if inside else None


def scan_images(root):
    """Yields the relative paths of the images under `root`; hidden names and links that lead outside are left out."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in IMAGE_TYPES:
                continue
            path = Path(folder, name)
            if not path.is_symlink() or resolve_inside(root, path):
                yield path.relative_to(root).as_posix()


def match_images(roots):
    """Pairs images by relative path, in linear time.

    Returns (rows, missing), lists of (path, indices of the roots that have it) in natural order: `rows` are in two
    roots or more, `missing` lack at least one root (a path can be in both lists).
    """
    found = {}
    for column, root in enumerate(roots):
        for path in scan_images(root):
            found.setdefault(path, []).append(column)
    ordered = [(path, found[path]) for path in sorted(found, key=natural_key)]
    return [row for row in ordered if len(row[1]) > 1], [row for row in ordered if len(row[1]) < len(roots)]


def read_text(file):
    """Returns the text metadata of an image (path or file object) as dict[str, str]; empty if it has none."""
    try:
        with Image.open(file) as image:
            return {key: value for key, value in image.info.items() if isinstance(value, str)}
    except UNREADABLE:
        return {}


def embedded_side(root, column, path):
    """Returns {"src": data URI, "text": metadata} of an image."""
    data = (root / path).read_bytes()
    source = f"data:{IMAGE_TYPES[Path(path).suffix.lower()]};base64,{base64.b64encode(data).decode()}"
    return {"src": source, "text": read_text(io.BytesIO(data))}


def served_side(root, column, path):
    """Returns {"src": address on our server}; the page asks for metadata when the image is shown."""
    return {"src": f"image/{column}/{quote(os.fsencode(path))}"}


def page_chunks(roots, labels, rows, missing, make_side):
    """Yields the text of the HTML page, one row at a time, so that a large page is never held twice."""

    def script_json(value):  # "<" could end or nest the script element that holds the data
        return json.dumps(value).replace("<", "\\u003c")

    head, tail = TEMPLATE.read_text(encoding="utf-8").split("__COMPARE_DATA__")
    yield f'{head}{{"labels": {script_json(labels)}, "missing": {script_json(missing)}, "rows": ['
    for i, (path, columns) in enumerate(rows):
        sides = [make_side(roots[c], c, path) if c in columns else None for c in range(len(roots))]
        yield ("," if i else "") + "\n" + script_json({"path": path, "sides": sides})
    yield f"]}}{tail}"


def make_server(roots, labels, port=0):
    """Returns an HTTP server on 127.0.0.1 that streams the page and the images of `roots`; port 0: any free one."""
    server = ThreadingHTTPServer(("127.0.0.1", port), CompareHandler)
    server.roots, server.labels = roots, labels
    return server


class CompareHandler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of /, /image/COLUMN/PATH and /text/COLUMN/PATH; everything else is 404."""

    def do_GET(self):
        if not LOOPBACK.fullmatch(self.headers.get("Host", "")):  # DNS rebinding: a foreign name that leads here
            return self.send_error(HTTPStatus.FORBIDDEN, "Only for 127.0.0.1 and localhost")
        path, roots = self.path.partition("?")[0], self.server.roots
        if path == "/":  # scanned again on every reload, so a run in progress can be watched
            chunks = page_chunks(roots, self.server.labels, *match_images(roots), served_side)
            return self.send_body("text/html; charset=utf-8", "".join(chunks).encode())
        if not (file := self.requested_file(path)):
            return self.send_error(HTTPStatus.NOT_FOUND)
        if path.startswith("/text/"):
            return self.send_body("application/json", json.dumps(read_text(file)).encode())
        self.send_body(IMAGE_TYPES[file.suffix.lower()], file.read_bytes())

    do_HEAD = do_GET

    def requested_file(self, path):
        """Returns the image that /image/COLUMN/PATH or /text/COLUMN/PATH names, or None."""
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
            with contextlib.suppress(ConnectionError):  # the browser moved on
                self.wfile.write(body)

    def log_message(self, *args):
        pass


def thumbnail(path, cell):
    """Returns RGB of at most cell x cell (small images grow by a whole factor, unsmoothed), or "unreadable"."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGBA")
    except UNREADABLE as error:
        print(f"warning: {path}: {error}", file=sys.stderr)
        return "unreadable"
    image = Image.alpha_composite(Image.new("RGBA", image.size, EMPTY), image).convert("RGB")
    if max(image.size) > cell:
        return ImageOps.contain(image, (cell, cell), Image.Resampling.LANCZOS)
    return ImageOps.scale(image, cell // max(image.size), Image.Resampling.NEAREST)


def draw_text(draw, position, text, width, color, size=12):
    """Writes one line of at most `width` pixels in the letters Pillow's font has: ASCII, others become "?"."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text[:width]) if not unicodedata.combining(c))
    text = re.sub(r"[^ -~]", "?", " ".join(text.split()))[: width // size * 5]  # letters are wider than size / 5
    font = ImageFont.load_default(size)
    while len(text) > 3 and font.getlength(text) > width:
        text = text.removesuffix("...")[:-1] + "..."
    draw.text(position, text, color, font)


def contact_sheet(roots, labels, rows, cell=256):
    """Draws rows = pairs under their path and prompt, columns = directories; returns an RGB image.

    Raises ValueError where the sheet would have more than MAX_SHEET_PIXELS.
    """
    gap, header, caption = 12, 44, 36
    pitch = caption + cell + gap
    width, height = gap + (cell + gap) * len(roots), header + pitch * len(rows)
    if width * height > MAX_SHEET_PIXELS:
        raise ValueError(f"{len(rows)} rows are too much for one sheet; compare one step (RUN/samples/step-000500)")
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


def write_page(path, roots, labels, rows, missing):
    """Writes the page with all images embedded; refuses a size that no browser opens."""
    total = sum((roots[column] / image).stat().st_size for image, columns in rows for column in columns)
    if total > MAX_PAGE_BYTES:
        raise ValueError(f"{total / 2**20:.0f} MiB of images are too much for one page; use --serve")
    if total > LARGE_PAGE_BYTES:
        print(f"warning: {total / 2**20:.0f} MiB of images make a slow page; --serve is better", file=sys.stderr)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(page_chunks(roots, labels, rows, missing, embedded_side))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="two or more directories of images")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--out",
        type=Path,
        default=Path("compare.html"),
        metavar="FILE",
        help="page to write, with all images inside (default: compare.html)",
    )
    output.add_argument(
        "--serve",
        type=port,
        nargs="?",
        const=0,
        metavar="PORT",
        help="serve the page on 127.0.0.1 instead, for many or large images; PORT is 0 to 65535, by default 0: any "
        "free one",
    )
    output.add_argument("--png", type=Path, metavar="FILE", help="write one large PNG instead, a row per image")
    args = parser.parse_args(argv)
    for directory in args.directories:
        if not Path(directory).is_dir():
            parser.error(f"{directory} is not a directory")
    if len(args.directories) < 2:
        parser.error(f"expected two or more directories, got only {args.directories[0]}")
    return args


def port(text):
    """An argparse type. The other scripts share theirs; this one needs nothing but Pillow."""
    if text.isdecimal() and int(text) <= 65535:
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
            print(f"  {root}: {first}", file=sys.stderr)
        return 1
    print(f"{len(rows)} common images, {len(missing)} missing somewhere")
    try:
        if args.serve is not None:
            with make_server(roots, labels, args.serve) as server, contextlib.suppress(KeyboardInterrupt):
                print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
                server.serve_forever()
        elif args.png:
            contact_sheet(roots, labels, rows).save(args.png, "PNG")
            print(f"written: {args.png}")
        else:
            write_page(args.out, roots, labels, rows, missing)
            print(f"written: {args.out}")
    except (OSError, OverflowError, ValueError) as error:  # OverflowError: a port above 65535
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
