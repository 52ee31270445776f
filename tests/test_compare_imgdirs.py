"""The comparison page, its server and the contact sheet: what is matched, what is shown, and what never leaves."""

import http.client
import io
import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from urllib.parse import quote

import pytest
from helpers import HANG_S, REPO, load_script, run_script
from pages import drawn, opened_page, until
from PIL import Image, ImageDraw, PngImagePlugin

from cachetrain.log import printable

SCRIPT = "dataset_scripts/compare_imgdirs.py"
compare = load_script(SCRIPT)

RED, BLUE, GREEN = (200, 30, 30), (30, 60, 210), (20, 150, 60)


def save_png(path, color, size=(16, 16), **text):
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    Image.new("RGB", size, color).save(path, pnginfo=info)


@pytest.fixture
def runs(tmp_path):
    """Two output directories: red and blue where they differ, green where they are the same, one file missing."""
    settings = {"prompt": "a red circle", "seed": "7", "num_inference_steps": "30"}
    for name, color, cfg in (("baseline", RED, "4"), ("min_snr", BLUE, "7")):
        for step in (50, 100, 1000):
            folder = tmp_path / name / "samples" / f"step-{step:06d}"
            save_png(folder / "00-a-red-circle_cfg4.png", color, **settings, cfg=cfg, step=str(step))
            save_png(folder / "01-same.png", GREEN, **settings, cfg="1")
    save_png(tmp_path / "baseline/samples/step-001000/02-only-here.png", RED)
    return [tmp_path / "baseline", tmp_path / "min_snr"]


# ---- matching


def test_pairs_are_matched_by_relative_path_in_natural_order(tmp_path):
    for name in ("step-9/b.png", "step-10/a10.png", "step-10/a9.png", "step-10/only_a.png"):
        save_png(tmp_path / "a" / name, RED)
    for name in ("step-9/b.png", "step-10/a10.png", "step-10/a9.png", "b.png", ".staged/x.png", "step-9/.hidden.png"):
        save_png(tmp_path / "b" / name, RED)
    (tmp_path / "b" / "step-9" / "b.txt").write_text("not an image")
    rows, missing = compare.match_images([tmp_path / "a", tmp_path / "b"])
    assert rows == [("step-9/b.png", [0, 1]), ("step-10/a9.png", [0, 1]), ("step-10/a10.png", [0, 1])]
    assert missing == [("b.png", [1]), ("step-10/only_a.png", [0])]


def test_an_image_in_two_of_three_directories_is_shown_and_listed_missing(tmp_path):
    for folder in "abc":
        save_png(tmp_path / folder / "everywhere.png", RED)
    for folder in "ac":
        save_png(tmp_path / folder / "twice.png", RED)
    rows, missing = compare.match_images([tmp_path / folder for folder in "abc"])
    assert rows == [("everywhere.png", [0, 1, 2]), ("twice.png", [0, 2])]
    assert missing == [("twice.png", [0, 2])]


def test_natural_order_is_total_for_names_that_differ_only_in_case_or_zeros():
    expected = ["A1.png", "a01.png", "a1.png", "a2.png", "a10.png"]
    for names in itertools.permutations(expected):
        assert sorted(names, key=compare.natural_key) == expected


class Counted(str):
    """A path that counts how often one is compared with another."""

    comparisons, __hash__ = 0, str.__hash__

    def __eq__(self, other):
        Counted.comparisons += 1
        return str.__eq__(self, other)


def test_pairs_are_listed_in_linear_time(tmp_path, monkeypatch):
    number, keys, scan, key = 2000, [], compare.scan_images, compare.natural_key
    for folder in "ab":
        (tmp_path / folder).mkdir()
        for i in range(number):
            (tmp_path / folder / f"{i}.png").touch()
    roots = [tmp_path / "a", tmp_path / "b"]
    monkeypatch.setattr(compare, "scan_images", lambda root: map(Counted, scan(root)))
    monkeypatch.setattr(compare, "natural_key", lambda path: keys.append(path) or key(path))
    rows, missing = compare.match_images(roots)
    page = "".join(compare.page_chunks(roots, ["a", "b"], rows, missing, compare.served_side))
    assert len(rows) == number and not missing and len(page) < 300 * number
    assert Counted.comparisons <= 2 * number and len(keys) == number


def test_run_directory_stands_for_its_samples(tmp_path):
    (tmp_path / "run" / "samples").mkdir(parents=True)
    assert compare.samples_root(tmp_path / "run") == compare.samples_root(tmp_path / "run" / "samples")
    assert compare.samples_root(tmp_path / "run" / "samples").name == "samples"


@pytest.mark.parametrize(
    ("directories", "labels"),
    [
        (["/x/a", "/x/b"], ["a", "b"]),
        (["/x/a/samples", "/x/b"], ["a", "b"]),
        (["/x/a/samples/step-5", "/x/b/samples/step-5"], ["a", "b"]),
        (["/x/a", "/y/a"], ["x", "y"]),
        (["/x/a", "/y/a", "/y/b"], ["x/a", "y/a", "b"]),
        (["/x/a", "/x/a"], ["a", "a (2)"]),
    ],
)
def test_column_labels_are_short_and_unique(directories, labels):
    assert compare.column_labels(directories) == labels


# ---- command line


def run_program(*args, cwd):
    return subprocess.run(
        [sys.executable, REPO / SCRIPT, *args], cwd=cwd, capture_output=True, text=True, timeout=HANG_S
    )


def test_script_writes_compare_html_and_reports_counts(runs, tmp_path):
    done = run_program(*runs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 common images, 1 missing somewhere" in done.stdout
    assert (tmp_path / "compare.html").stat().st_size > 10_000


def test_script_without_common_images_says_what_each_directory_has(runs, tmp_path):
    save_png(tmp_path / "other" / "elsewhere.png", RED)
    done = run_program(runs[0], tmp_path / "other", cwd=tmp_path)
    assert done.returncode == 1
    assert "step-000050/00-a-red-circle_cfg4.png" in done.stderr and "elsewhere.png" in done.stderr
    assert not (tmp_path / "compare.html").exists()


HOSTILE_NAME = "no\x1b[31m\nwhere\x9b\u202e é"


@pytest.mark.parametrize(
    "arguments",
    [["nowhere", "."], ["."], [".", ".", "--png", "a.png", "--serve"], [HOSTILE_NAME, "."], [".", ".", HOSTILE_NAME],
     [".", ".", f"--{HOSTILE_NAME}"], [".", ".", "--out", HOSTILE_NAME], [".", ".", "--serve", HOSTILE_NAME]],
)  # fmt: skip
def test_wrong_arguments_exit_2_with_a_line_that_changes_nothing_else(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run_script(SCRIPT, *arguments)
    errors = capsys.readouterr().err
    assert exit.value.code == 2 and "error:" in errors.splitlines()[-1]
    assert compare.printable(errors.replace("\n", "")) == errors.replace("\n", "")
    assert compare.printable(HOSTILE_NAME) == printable(HOSTILE_NAME) == r"no\x1b[31m\nwhere\x9b\u202e é"


def test_large_pages_warn_and_too_large_ones_are_refused(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "LARGE_PAGE_BYTES", 100)
    assert run_script(SCRIPT, *runs) == 0
    assert "better use --serve" in capsys.readouterr().err
    monkeypatch.setattr(compare, "MAX_PAGE_BYTES", 100)
    assert run_script(SCRIPT, *runs, "--out", "refused.html") == 1
    assert "use --serve" in capsys.readouterr().err and not (tmp_path / "refused.html").exists()


# ---- contact sheet


def test_contact_sheet_has_a_row_per_pair_and_a_column_per_directory(tmp_path):
    save_png(tmp_path / "a/x.png", RED, (16, 16), prompt="крас́ный 円 😀\nline" * 40)
    save_png(tmp_path / "b/x.png", BLUE, (300, 150))
    save_png(tmp_path / "a/y.png", GREEN)
    (tmp_path / "b/y.png").write_bytes(b"not a picture")
    roots = [tmp_path / "a", tmp_path / "b"]
    sheet = compare.contact_sheet(roots, ["é 円", "b" * 200], compare.match_images(roots)[0], cell=100)
    lefts, tops = [12, 124], [80, 228]
    assert sheet.size == (236, 340)
    assert sheet.getpixel((lefts[0], tops[0])) == sheet.getpixel((lefts[0] + 95, tops[0] + 95)) == RED  # 16 px x 6
    assert sheet.getpixel((lefts[0] + 96, tops[0])) == (255, 255, 255)
    assert sheet.getpixel((lefts[1] + 99, tops[0] + 49)) == BLUE  # 300 x 150 shrunk to 100 x 50
    assert sheet.getpixel((lefts[1], tops[0] + 50)) == (255, 255, 255)
    assert sheet.getpixel((lefts[0] + 50, tops[1] + 50)) == GREEN
    assert sheet.getpixel((lefts[1] + 99, tops[1] + 99)) == (240, 238, 234)  # the empty cell of the unreadable image


def test_contact_sheet_enlarges_small_images_without_smoothing(tmp_path):
    pixels = Image.new("RGB", (2, 1), RED)
    pixels.putpixel((1, 0), BLUE)
    pixels.save(tmp_path / "x.png")
    enlarged = compare.thumbnail(tmp_path / "x.png", 101)
    assert enlarged.size == (100, 50)
    assert [enlarged.getpixel((x, 49)) for x in (0, 49, 50, 99)] == [RED, RED, BLUE, BLUE]


def test_exif_data_that_cannot_be_read_hides_no_image(tmp_path):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "x.webp", lossless=True, exif=b"Exif\0\0what")
    assert compare.thumbnail(tmp_path / "x.webp", 8).getpixel((0, 0)) == RED


def test_contact_sheet_text_falls_back_to_letters_the_font_has():
    def drawn(text):
        image = Image.new("RGB", (200, 40), "white")
        compare.draw_text(ImageDraw.Draw(image), (4, 4), text, 190, "black")
        return image.tobytes()

    assert drawn("é 円\n\t😀\udcff") == drawn("e ? ??")
    assert drawn("a" * 500) == drawn("a" * 100) != drawn("a")  # cut with an ellipsis


def test_contact_sheet_is_written_as_png_and_a_huge_one_is_refused(runs, tmp_path, monkeypatch, capsys):
    target = tmp_path / "sheet.png"
    assert run_script(SCRIPT, *runs, "--png", target) == 0
    with Image.open(target) as sheet:
        assert (sheet.format, sheet.width) == ("PNG", 12 + 2 * 268)
    monkeypatch.setattr(compare, "MAX_SHEET_PIXELS", 1000)
    assert run_script(SCRIPT, *runs, "--png", target) == 1
    assert "compare the directories of one step" in capsys.readouterr().err


# ---- server


@contextmanager
def serving(directories):
    roots = [compare.samples_root(directory) for directory in directories]
    with compare.make_server(roots, compare.column_labels(directories)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def request(server, path, method="GET", host=None):
    """Sends `path` as it is (no normalization) and returns (status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=HANG_S)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
    connection.endheaders()
    reply = connection.getresponse()
    return reply.status, reply.headers, reply.read()


IMAGE = "step-000050/00-a-red-circle_cfg4.png"


def test_server_streams_images_and_metadata_from_loopback_only(runs):
    with serving(runs) as server:
        assert server.server_address[0] == "127.0.0.1"
        status, headers, body = request(server, f"/image/1/{IMAGE}")
        assert (status, headers["Content-Type"]) == (200, "image/png")
        assert body == (runs[1] / "samples" / IMAGE).read_bytes()
        assert json.loads(request(server, f"/text/1/{IMAGE}")[2])["cfg"] == "7"
        assert request(server, f"/image/1/{IMAGE}", method="POST")[0] == 501
        page = request(server, "/")[2].decode()
        assert f"image/0/{IMAGE}" in page and "data:image" not in page


def test_server_answers_head_without_a_body(runs):
    with serving(runs) as server, socket.create_connection(server.server_address, timeout=HANG_S) as connection:
        connection.sendall(f"HEAD /image/1/{IMAGE} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        reply = connection.makefile("rb").read()
    assert reply.startswith(b"HTTP/1.0 200") and reply.endswith(b"\r\n\r\n")
    assert f"Content-Length: {(runs[1] / 'samples' / IMAGE).stat().st_size}\r\n".encode() in reply


def test_server_shows_images_that_appear_later(runs):
    with serving(runs) as server:
        for run in runs:
            save_png(run / "samples" / "step-002000" / "00 50%#?.png", RED)
        page = request(server, "/")[2].decode()
        source = re.search(r'image/1/step-002000/[^"]+', page)[0]
        assert request(server, "/" + source)[0] == 200


def test_server_confines_paths_to_its_directories(runs, tmp_path):
    save_png(tmp_path / "secret.png", RED)
    root = runs[0] / "samples"
    (root / "notes.txt").write_text("not an image")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "inside.png").symlink_to(root / IMAGE)
    secret = str(tmp_path / "secret.png")
    escapes = ["../../secret.png", "..%2f..%2fsecret.png", "%2e%2e/%2e%2e/secret.png", "step-50/../../../secret.png",
               quote(secret), "/" + secret, "link.png", "folder/secret.png", "loop.png", "notes.txt", "step-000050",
               "a%00.png", "x" * 5000 + ".png", "absent.png"]  # fmt: skip
    with serving(runs) as server:
        for path in escapes:
            for kind in ("image", "text"):
                assert request(server, f"/{kind}/0/{path}")[0] == 404, path
        for path in ("/image/2/" + IMAGE, "/image/-1/" + IMAGE, "/image/", "/../secret.png", "/index.html", "//["):
            assert request(server, path)[0] == 404, path
        assert request(server, "/image/0/inside.png")[0] == 200
        page = request(server, "/")[2].decode()
    assert "link.png" not in page and "secret" not in page


def test_server_serves_no_hidden_file_that_is_named(runs, tmp_path):
    for name in (".hidden.png", ".staged/x.png"):
        (path := runs[0] / "samples" / name).parent.mkdir(exist_ok=True)
        shutil.copy(runs[0] / "samples" / IMAGE, path)
    (runs[0] / "samples" / "link.png").symlink_to(".hidden.png")
    with serving(runs) as server:
        for name in (".hidden.png", ".staged/x.png", "%2estaged/x.png", "link.png", "a/../b/../.hidden.png"):
            for kind in ("image", "text"):
                assert request(server, f"/{kind}/0/{name}")[0] == 404, name
        assert request(server, f"/image/0/{IMAGE}")[0] == 200


def test_server_closes_connections_that_send_half_a_request(runs, monkeypatch):
    assert compare.CompareHandler.timeout <= 60
    monkeypatch.setattr(compare.CompareHandler, "timeout", 0.05)
    with serving(runs) as server:
        for part in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: local"):
            with socket.create_connection(server.server_address, timeout=HANG_S) as connection:
                connection.sendall(part)
                assert connection.recv(1) == b"", part  # closed


def test_server_answers_only_loopback_host_names(runs):
    with serving(runs) as server:
        for host in ("localhost", "localhost:9000", "127.0.0.1", "[::1]:80"):
            assert request(server, "/", host=host)[0] == 200, host
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "evil@localhost", "["):
            for path in ("/", f"/image/0/{IMAGE}"):
                assert request(server, path, host=host)[0] == 403, host


def test_embedded_page_leaves_out_links_that_lead_outside(runs, tmp_path):
    save_png(tmp_path / "secret.png", RED)
    for run in runs:
        (run / "samples" / "link.png").symlink_to(tmp_path / "secret.png")
    rows, _ = compare.match_images([compare.samples_root(run) for run in runs])
    assert len(rows) == 6


# ---- the page in a browser

HOSTILE = "</script><script>document.title='hit'</script><img src=x onerror=\"document.title='hit'\">"


@contextmanager
def opened(browser, directories, tmp_path, start="#1", **options):
    """Writes the page, opens it from disk at its first pair and yields (page, addresses that it asked for)."""
    target = tmp_path / "page.html"
    assert run_script(SCRIPT, *directories, "--out", target) == 0
    options["viewport"] = {"width": 1000, "height": 800}
    with opened_page(browser, target.as_uri() + start, ".frame img", **options) as opening:
        yield opening


def pixel(page, x, y, selector=".frame"):
    """RGB of the screen at a fraction of the element's width and height."""
    image = Image.open(io.BytesIO(page.locator(selector).first.screenshot())).convert("RGB")
    return image.getpixel((int(image.width * x), int(image.height * y)))


def test_page_from_disk_asks_the_network_for_nothing(browser, runs, tmp_path):
    with opened(browser, runs, tmp_path) as (page, requests):
        for key in ("ArrowRight", "2", "3", "+", "0", "1"):
            page.keyboard.press(key)
        drawn(page)
        assert requests
        assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def test_page_opens_at_the_last_step(browser, runs, tmp_path):
    with opened(browser, runs, tmp_path, start="") as (page, _):
        assert page.text_content("#path") == "step-001000/00-a-red-circle_cfg4.png"


def test_arrow_keys_move_through_pairs_and_steps(browser, runs, tmp_path):
    with opened(browser, runs, tmp_path) as (page, _):
        path = page.locator("#path")
        assert path.text_content() == "step-000050/00-a-red-circle_cfg4.png"
        for key, expected in (
            ("ArrowLeft", "step-000050/00-a-red-circle_cfg4.png"),  # the first one stays
            ("ArrowRight", "step-000050/01-same.png"),
            ("ArrowDown", "step-000100/01-same.png"),
            ("ArrowDown", "step-001000/01-same.png"),
            ("ArrowDown", "step-001000/01-same.png"),  # the last step stays
            ("ArrowLeft", "step-001000/00-a-red-circle_cfg4.png"),
            ("ArrowUp", "step-000100/00-a-red-circle_cfg4.png"),
            ("Home", "step-000050/00-a-red-circle_cfg4.png"),
            ("End", "step-001000/01-same.png"),
        ):
            page.keyboard.press(key)
            assert path.text_content() == expected, key


def test_side_by_side_shows_each_directory_under_its_label(browser, runs, tmp_path):
    with opened(browser, runs, tmp_path) as (page, _):
        assert page.locator("figcaption b").all_text_contents() == ["baseline", "min_snr"]
        assert page.locator("figcaption span").all_text_contents() == ["16 × 16", "16 × 16"]
        assert pixel(page, 0.5, 0.5, "figure:nth-of-type(1) .frame") == RED
        assert pixel(page, 0.5, 0.5, "figure:nth-of-type(2) .frame") == BLUE


def test_slider_reveals_first_directory_left_and_second_right(browser, runs, tmp_path):
    with opened(browser, runs, tmp_path) as (page, _):
        page.keyboard.press("2")
        assert [pixel(page, x, 0.1) for x in (0.1, 0.4, 0.6, 0.9)] == [RED, RED, BLUE, BLUE]
        box = page.locator(".frame").bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] * 0.5)
        page.mouse.up()
        assert [pixel(page, x, 0.1) for x in (0.1, 0.7, 0.9)] == [RED, RED, BLUE]
        for _ in range(30):
            page.keyboard.press("Shift+ArrowLeft")
        assert [pixel(page, x, 0.1) for x in (0.1, 0.4, 0.9)] == [RED, BLUE, BLUE]


def test_difference_is_black_for_identical_images_and_scaled_by_gain(browser, runs, tmp_path):
    with opened(browser, runs, tmp_path) as (page, _):
        page.keyboard.press("3")
        page.select_option("#gain", "1")
        expected = tuple(abs(a - b) for a, b in zip(RED, BLUE, strict=True))
        assert pixel(page, 0.5, 0.5) == expected
        assert page.locator("figcaption span").text_content() == f"mean {sum(expected) / 3:.2f}, max 180 of 255"
        page.keyboard.press("]")
        assert pixel(page, 0.5, 0.5) == tuple(min(255, 2 * value) for value in expected)
        page.keyboard.press("ArrowRight")
        until(page, "document.querySelector('figcaption span').textContent === 'identical'")
        assert pixel(page, 0.5, 0.5) == (0, 0, 0)


def test_jump_to_step_keeps_the_sample_and_gives_the_keyboard_back(browser, runs, tmp_path):
    with opened(browser, runs, tmp_path) as (page, _):
        assert page.locator("#step option").all_text_contents() == ["50", "100", "1000"]
        page.keyboard.press("ArrowRight")
        page.focus("#step")
        page.select_option("#step", "1000")
        assert page.text_content("#path") == "step-001000/01-same.png"
        page.keyboard.press("ArrowLeft")
        assert page.text_content("#path") == "step-001000/00-a-red-circle_cfg4.png"
        page.fill("#position", "4")
        page.keyboard.press("Enter")
        assert page.text_content("#path") == "step-000100/01-same.png"


def test_settings_that_differ_are_marked_and_missing_images_listed(browser, runs, tmp_path):
    with opened(browser, runs, tmp_path) as (page, _):
        assert page.text_content("#prompt") == "a red circle"
        assert page.locator("#differs tbody tr").all_text_contents() == ["≠ cfg47"]
        assert page.locator("#same div").all_text_contents() == ["seed7", "step50", "num_inference_steps30"]
        page.click("summary")
        page.wait_for_selector("#missing li")
        assert page.locator("#missing li").all_text_contents() == ["step-001000/02-only-here.pngmissing in min_snr"]


def test_markup_in_prompts_names_and_labels_is_shown_as_text(browser, tmp_path):
    name = "<img src=x onerror=alert(1)>&amp;.png"
    directories = [tmp_path / "<b>a", tmp_path / "b"]
    for directory in directories:
        save_png(directory / name, RED, **{"prompt": HOSTILE, "<i>key": str(directory)})
    with opened(browser, directories, tmp_path) as (page, _):
        assert page.text_content("#prompt") == HOSTILE
        assert page.text_content("#path") == name
        assert page.locator("figcaption b").first.text_content() == "<b>a"
        assert page.text_content("#differs tbody th") == "≠ <i>key"
        assert page.title() == "<b>a | b"
        assert page.locator("main img").count() == 2


def test_zoom_keeps_hard_pixels_and_moves_all_frames_together(browser, tmp_path):
    for name in "ab":
        image = Image.new("RGB", (2, 2), RED)
        image.putpixel((1, 1), BLUE)
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "x.png")
    with opened(browser, [tmp_path / "a", tmp_path / "b"], tmp_path) as (page, _):
        assert [pixel(page, x, x) for x in (0.49, 0.51)] == [RED, BLUE]  # a smoothed enlargement would mix them
        box = page.locator(".frame").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2)
        for _ in range(2):
            page.mouse.wheel(0, -200)
        until(page, "document.getElementById('zoom').textContent === '4×'")
        for frame in (1, 2):  # zoomed about the pointer, in the lower right corner
            assert pixel(page, 0.02, 0.02, f"figure:nth-of-type({frame}) .frame") == BLUE
        page.keyboard.press("0")
        assert pixel(page, 0.02, 0.02) == RED


def test_three_directories_show_all_and_any_two_overlaid(browser, runs, tmp_path):
    save_png(tmp_path / "third" / IMAGE, GREEN)
    with opened(browser, [*runs, tmp_path / "third"], tmp_path) as (page, _):
        assert page.locator("figure").count() == 3
        page.keyboard.press("2")
        page.select_option("#right", "2")
        assert [pixel(page, x, 0.1) for x in (0.1, 0.9)] == [RED, GREEN]
        page.select_option("#left", "2")  # the same on both sides would compare nothing: they swap
        assert [pixel(page, x, 0.1) for x in (0.1, 0.9)] == [GREEN, RED]
        page.keyboard.press("ArrowRight")
        page.wait_for_selector(".note")
        assert page.text_content(".note") == "missing in third"


def test_unreadable_image_is_named_not_fatal(browser, runs, tmp_path):
    (runs[1] / "samples" / IMAGE).write_bytes(b"\x89PNG cut")
    with opened(browser, runs, tmp_path) as (page, _):
        assert page.text_content(".note") == "unreadable image"
        page.keyboard.press("3")
        assert page.text_content(".note") == "unreadable image"


def test_served_page_loads_only_what_is_shown(browser, runs):
    with serving(runs) as server:
        page = browser.new_page()
        page.set_default_timeout(1000 * HANG_S)
        requests = []
        page.on(
            "request", lambda sent: requests.append(sent.url.removeprefix(f"http://127.0.0.1:{server.server_port}"))
        )
        page.goto(f"http://127.0.0.1:{server.server_port}/#1")
        page.wait_for_selector(".frame img")
        kinds = [f"/{kind}/{column}/{IMAGE}" for kind in ("image", "text") for column in (0, 1)]
        assert sorted(requests) == sorted(["/", *kinds])
        assert page.locator("#differs tbody tr").all_text_contents() == ["≠ cfg47"]
        page.keyboard.press("3")
        page.select_option("#gain", "1")
        assert pixel(page, 0.5, 0.5) == tuple(abs(a - b) for a, b in zip(RED, BLUE, strict=True))
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_and_follows_the_color_scheme(browser, runs, tmp_path, scheme):
    with opened(browser, runs, tmp_path, color_scheme=scheme) as (page, _):
        page.set_viewport_size({"width": 420, "height": 800})
        for key in "123":
            page.keyboard.press(key)
            assert page.evaluate("document.documentElement.scrollWidth") <= 420
        background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
        assert brightness > 240 if scheme == "light" else brightness < 40


# Notes the images that are decoded while `late` is there, after the page has been told.
NOTE_DECODED = """
const decode = HTMLImageElement.prototype.decode;
HTMLImageElement.prototype.decode = function () {
  const decoded = decode.call(this);
  decoded.finally(() => setTimeout(() => window.late?.push(this.src)));
  return decoded;
};
"""


def test_image_that_loads_late_does_not_replace_a_newer_one(browser, runs):
    with serving(runs) as server:
        page = browser.new_page()
        page.add_init_script(NOTE_DECODED)
        page.set_default_timeout(1000 * HANG_S)
        page.goto(f"http://127.0.0.1:{server.server_port}/#1")
        page.wait_for_selector(".frame img")
        held = []
        page.route("**/image/0/step-000050/01-same.png", lambda route: held.append(route))
        with page.expect_request("**/image/0/step-000050/01-same.png"):
            page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        newer = ".frame img[src='image/0/step-000100/00-a-red-circle_cfg4.png']"
        page.wait_for_selector(newer)
        page.evaluate("window.late = []")
        held[0].continue_()
        until(page, "late.length > 0")
        drawn(page)
        assert page.locator(newer).count() == 1
        page.close()
