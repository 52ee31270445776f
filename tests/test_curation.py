"""dataset_scripts/: lists of captions in and out, tags, findings on images and captions, pages that show them."""

import csv
import json

import pytest
from helpers import json_lines, run_script
from pages import opened_page
from PIL import Image


def picture(path, color="red", size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    for name in ("a.png", "sub/b.jpg", "c.webp"):
        picture(tmp_path / "data" / name)
    return tmp_path / "data"


ROWS = [{"file_name": "a.png", "text": 'a fox, "red"'}, {"file_name": "sub/b.jpg", "text": "zwei Füchse"}]


def write_list(path):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.Table.from_pylist(ROWS), path)
    else:
        entries = {"a": {"caption": ROWS[0]["text"]}, str(path.parent / "sub" / "b.jpg"): {"tags": ROWS[1]["text"]}}
        path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet", "meta_cap.json"])
def test_each_kind_of_list_gives_the_same_captions(root, name, capsys):
    write_list(root / name)
    assert run_script("dataset_scripts/import_captions.py", root) == 0
    assert (root / "a.txt").read_text() == ROWS[0]["text"] + "\n"
    assert (root / "sub" / "b.txt").read_text() == ROWS[1]["text"] + "\n"
    assert capsys.readouterr().out == "1 list, 2 rows, 2 written\n"


def test_json_beside_each_image_gives_its_caption(root):
    (root / "a.json").write_text(json.dumps({"caption": "a fox", "url": "x", "width": 3}))
    (root / "other.json").write_text("{}")
    assert run_script("dataset_scripts/import_captions.py", root) == 0
    assert (root / "a.txt").read_text() == "a fox\n" and not (root / "other.txt").exists()


def test_every_row_is_accounted_for_and_nothing_existing_is_replaced(root, tmp_path, capsys):
    (root / "a.caption").write_text("mine")
    rows = [("a.png", "new"), ("sub/b.jpg", "b"), ("sub/b.jpg", "other"), ("sub/b.jpg", "b "), ("c.webp", " ")]
    rows += [("gone.png", "x"), ("../out.png", "x"), ("a.txt", "x"), (5, "x"), ("c.webp", "\ud800")]
    picture(tmp_path / "out.png")
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (root / "metadata.jsonl").write_text("\n".join([*lines, "{broken", "[" * 100_000]))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run_script("dataset_scripts/import_captions.py", root, "--dry_run") == 1
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run_script("dataset_scripts/import_captions.py", root) == 1
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before | {root / "sub" / "b.txt": b"b\n"}
    dry, real = capsys.readouterr().out.splitlines()
    counts = "1 kept, 1 written, 1 repeated, 1 same, 1 empty, 2 no such image, 1 outside of the folder, 3 not text"
    assert real == f"1 list, 12 rows, {counts}, 1 failed" and dry == f"{real} (dry run)"
    assert run_script("dataset_scripts/import_captions.py", root, "--overwrite") == 1
    assert (root / "a.txt").read_text() == "new\n" and (root / "a.caption").read_text() == "mine"


def test_a_list_without_a_column_of_captions_says_which_it_has(root, capsys):
    (root / "metadata.csv").write_text("file_name,caption\na.png,fox\n")
    assert run_script("dataset_scripts/import_captions.py", root) == 1
    assert (
        "has no column text, only file_name, caption; name the captions with --caption_key" in capsys.readouterr().err
    )
    assert run_script("dataset_scripts/import_captions.py", root, "--caption_key", "caption") == 0


def test_what_is_exported_is_what_hugging_face_reads_and_imports_back(root, capsys):
    (root / "a.txt").write_text('a fox, "red"')
    (root / "sub" / "b.caption").write_text("zwei Füchse\n")
    (root / "c.txt").write_bytes(b"\xff")
    assert run_script("dataset_scripts/export_captions.py", "--data_root", root) == 1
    assert json_lines(root / "metadata.jsonl") == ROWS
    assert "2 captions (1 failed)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="exists; pass --overwrite"):
        run_script("dataset_scripts/export_captions.py", "--data_root", root)
    with pytest.raises(ValueError, match="must be in or above"):
        run_script("dataset_scripts/export_captions.py", "--data_root", root, "--out", root / "sub" / "x.jsonl")
    (root / "a.txt").unlink()
    assert run_script("dataset_scripts/import_captions.py", root / "metadata.jsonl") == 0
    assert (root / "a.txt").read_text() == ROWS[0]["text"] + "\n"


HOSTILE = "<img src=x onerror=alert(1)></script><b>"


def photograph(path, shift=0, quality=90):
    """A part of a photograph; `shift` moves it by pixels."""
    from skimage import data

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = data.astronaut()[shift : 400 + shift, shift : 400 + shift]
    Image.fromarray(pixels).save(path, quality=quality)
    return path


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_tags_are_counted_per_folder_and_words_too(root, tmp_path, capsys):
    for name, text in (("a", "fox, red, fox"), ("sub/b", "fox,Red"), ("c", "\x1b[2J, =cmd|'/c calc'!A0, @_@, 1+1")):
        (root / f"{name}.txt").write_text(text)
    table = tmp_path / "tags.csv"
    assert run_script("dataset_scripts/count_tags.py", "--data_root", root, "--per_folder", "--csv", table) == 0
    rows = list(csv.reader(table.open()))
    assert {tag for _, tag, _ in rows[1:]} >= {r"\x1b[2J", "'=cmd|'/c calc'!A0", "'@_@", "1+1"}  # nothing that acts
    assert [".", "fox", "2"] in rows and ["sub", "fox", "1"] in rows and ["sub", "Red", "1"] in rows
    assert run_script("dataset_scripts/count_tags.py", "--data_root", root, "--words", "--csv", table) == 0
    assert ["all folders", "red", "2"] in list(csv.reader(table.open()))
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--remove", "b"), "a, c, a"),
        (("--rename", "a", "\\1"), "\\1, b, c, \\1"),
        (("--regex", "--rename", "([ab])", r"\1x"), "ax, bx, c, ax"),
        (("--regex", "--remove", "[ab]"), "c"),
        (("--dedup", "--sort", "--first", "z", "c", "--last", "a"), "z, c, b, a"),
    ],
)
def test_edited_tags(root, flags, expected):
    (root / "a.txt").write_text("a,b,  c, a\n")
    before = files(root)
    assert run_script("dataset_scripts/edit_tags.py", "--data_root", root, *flags, "--dry_run") == 0
    assert files(root) == before
    assert run_script("dataset_scripts/edit_tags.py", "--data_root", root, *flags) == 0
    assert files(root) == before | {"a.txt": f"{expected}\n".encode(), "a.txt.bak": b"a,b,  c, a\n"}
    assert run_script("dataset_scripts/edit_tags.py", "--data_root", root, "--first", "new") == 0
    assert (root / "a.txt.bak").read_text() == "a,b,  c, a\n"  # still the original


def test_edits_lose_no_content_and_keep_permissions(root):
    path, edit = root / "a.txt", ("dataset_scripts/edit_tags.py", "--data_root", root, "--rename")
    (root / "a.txt.bak2").mkdir()
    (root / "a.txt.bak3").symlink_to("gone")
    (root / "a.txt.bak4").symlink_to("a.txt")  # has the content of a.txt only until a.txt is replaced
    for text in ("first, x", "of others, x", "of others, x"):
        path.write_text(text)
        path.chmod(0o640)
        assert run_script(*edit, "x", "y") == 0
        assert path.read_text() == f"{text[:-1]}y\n"
    kept = {name: text for name, text in files(root).items() if ".bak" in name and not (root / name).is_symlink()}
    assert kept == {"a.txt.bak": b"first, x", "a.txt.bak5": b"of others, x"}
    assert {(root / name).stat().st_mode & 0o777 for name in ("a.txt", *kept)} == {0o640}


@pytest.mark.parametrize("tags", [("(", "y"), ("x", r"\g<nope>"), ("x", r"\1"), ("x{99999999999}", "y")])
def test_bad_regular_expressions_are_refused(root, tags):
    with pytest.raises(ValueError, match="not a regular expression"):
        run_script("dataset_scripts/edit_tags.py", "--data_root", root, "--regex", "--rename", *tags)


def test_each_kind_of_bad_image_is_found_and_moved_with_its_caption(tmp_path, capsys):
    root, target = tmp_path / "data", tmp_path / "bad"
    data = photograph(root / "a.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(data[: len(data) // 2])
    (root / "text.png").write_text("no image")
    (root / "misnamed.png").write_bytes(photograph(root / "x" / "shifted.jpg", shift=90).read_bytes())
    (root / "copy.jpg").write_bytes(data)
    (root / "copy.txt").write_text("caption")
    (root / "copy.long.txt").write_text("another caption")
    photograph(root / "similar.jpg", quality=60)
    Image.open(root / "a.jpg").resize((300, 300)).save(root / "a smaller one.png")
    with Image.open(root / "a.jpg") as image:
        Image.merge("RGB", image.split()[::-1]).save(root / "other colors.png")
    picture(root / "wide.png", size=(1200, 300))
    picture(root / "small.png", size=(10, 10), color="blue")
    (root / "x" / "shifted.jpg").unlink()
    command = ["dataset_scripts/check_images.py", "--data_root", root]
    before = files(root)
    assert run_script(*command, "--move_to", target, "--dry_run") == 1
    assert files(root) == before and not target.exists()
    lines = capsys.readouterr().out.splitlines()
    for name in ("unreadable", "truncated", "wrong-extension", "too-small", "extreme-aspect", "duplicate"):
        assert f"{name}: 1" in lines
    assert "  a smaller one.png  of a.jpg" in lines and "  copy.jpg  of a.jpg" in lines
    assert "  similar.jpg  of a.jpg" in lines and "  other colors.png  of a.jpg" not in lines
    assert "  a.jpg  of a smaller one.png" not in lines  # the largest and sharpest is kept, not the first
    assert run_script(*command, "--findings", "duplicate", "--move_to", target) == 1
    assert files(target) == {"copy.jpg": data, "copy.txt": b"caption", "copy.long.txt": b"another caption"}
    (root / "copy.jpg").write_bytes(data)
    assert run_script(*command, "--findings", "duplicate", "--move_to", target) == 1
    assert (root / "copy.jpg").exists() and "not moved" in capsys.readouterr().err


def test_images_are_moved_neither_within_the_folder_nor_away_from_what_they_link_to(root, tmp_path, capsys):
    target, command = tmp_path / "bad", ("dataset_scripts/check_images.py", "--data_root", root, "--move_to")
    (root / "c.webp").unlink()
    (tmp_path / "elsewhere.txt").write_text("caption")
    (root / "a.txt").symlink_to("../elsewhere.txt")
    (root / "sub" / "b.txt").symlink_to(tmp_path / "elsewhere.txt")
    before = files(root)
    for inside in (root, root / "bad", tmp_path):
        with pytest.raises(ValueError, match=r"--move_to .*: must be apart from --data_root"):
            run_script(*command, inside)
    assert files(root) == before
    assert run_script(*command, target) == 1
    assert f"{root / 'a.txt'}: not moved, is a link" in capsys.readouterr().err
    assert sorted(files(root)) == ["a.png", "a.txt"] and sorted(files(target)) == ["sub/b.jpg", "sub/b.txt"]


def test_near_groups_are_those_of_comparing_all_pairs():
    import numpy as np

    from cachetrain.curation.pictures import near_groups

    random = np.random.default_rng(0)
    seeds = random.integers(0, 2**63, 40, dtype=np.uint64)
    flips = np.uint64(1) << random.integers(0, 64, (200, 3)).astype(np.uint64)
    hashes = random.choice(seeds, 200) ^ flips[:, 0] ^ flips[:, 1] ^ flips[:, 2]
    for distance in (0, 3, 8):
        groups = {frozenset([i]) for i in range(200)}
        for i in range(200):
            for j in range(i):
                if int(hashes[i] ^ hashes[j]).bit_count() <= distance:
                    joined = [group for group in groups if i in group or j in group]
                    groups = groups.difference(joined) | {frozenset().union(*joined)}
        assert {frozenset(group) for group in near_groups(hashes, distance)} == {g for g in groups if len(g) > 1}


def test_sharpness_and_grain_are_those_of_scipy_and_of_known_noise():
    import numpy as np
    from scipy.ndimage import laplace

    from cachetrain.curation.pictures import sharpness_and_grain

    gray = np.random.default_rng(0).normal(128, 5, (200, 300))
    sharpness, grain = sharpness_and_grain(gray)
    assert sharpness == pytest.approx(laplace(gray)[1:-1, 1:-1].var())
    assert grain == pytest.approx(5, rel=0.02)


def test_each_kind_of_bad_caption_is_found(tmp_path, capsys):
    texts = {"ok": "a red fox in the snow", "same": "a red fox in the snow", "empty": " ", "short": "fox"}
    texts |= {"long": "fox " * 100, "tags": "fox, red, snow", "tags2": "cat, red, snow"}
    for name, text in texts.items():
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    picture(tmp_path / "name_1.png")
    picture(tmp_path / "bytes.png")
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    assert run_script("dataset_scripts/check_captions.py", "--data_root", tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "empty: 1",
        "very short: 2",
        "too long: 1",
        "repeated: 1",
        "file name as caption: 1",
        "mixed styles: 2",
    ):
        assert line in lines
    assert "not readable: 1" in lines and lines[-1] == "8 captions read, 9 findings of 7 kinds"
    tokens = ["--tokenizer", "models/tiny/t5", "--max_length", 99999, "--min_length", 0]
    assert run_script("dataset_scripts/check_captions.py", "--data_root", tmp_path, *tokens) == 1
    assert "tokens:" in capsys.readouterr().out


def test_tools_cover_all_caption_files_when_asked(root, tmp_path, capsys):
    texts = {
        "a.txt": "fox, red",
        "a.caption": "fox, snow",
        "a.LONG.txt": "a fox, it seems, in the snow",
        "c.x.txt": "fox, red",
    }
    for name, text in texts.items():
        (root / name).write_text(f"{text}\n")
    table, before = tmp_path / "tags.csv", files(root)

    def run(script, *flags):
        code = run_script(f"dataset_scripts/{script}.py", "--data_root", root, *flags)
        return code, capsys.readouterr().out.splitlines()

    counting, editing = ("--csv", table), ("--no_backup", "--rename", "fox", "cat")
    assert run("count_tags", *counting)[1][0] == "all folders: 3 captions, 4 tags"
    assert run("count_tags", *counting, "--captions", "files")[1][-1] == "5 captions, 0 failed"
    assert ["all folders", "fox", "3"] in list(csv.reader(table.open()))

    code, lines = run("check_captions", "--captions", "files", "--max_length", 5)
    assert code == 1 and lines[-1] == "5 captions read, 4 findings of 4 kinds"
    assert {"too long: 1", "repeated: 1"} <= set(lines) and "mixed styles" not in "".join(lines)
    assert f"  {root / 'a.LONG.txt'}  {texts['a.LONG.txt']}  7 words" in lines

    assert run("edit_tags", *editing, "--captions", "files", "--dry_run")[0] == 0 and files(root) == before
    assert run("edit_tags", *editing, "--captions", "files")[0] == 0
    changed = {name: text for name, text in texts.items() if name != "a.LONG.txt"}
    assert files(root) == before | {
        name: f"{text}\n".replace("fox", "cat").encode() for name, text in changed.items()
    }


def test_resized_copies_are_upright_never_enlarged_and_keep_captions_and_alpha(tmp_path, capsys):
    root, out = tmp_path / "data", tmp_path / "out"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(root / "turned.jpg", size=(400, 200))
    Image.new("RGB", (400, 200)).save(root / "turned.jpg", exif=exif)
    Image.new("RGBA", (300, 100), (255, 0, 0, 0)).save(root / "alpha.png")
    picture(root / "sub" / "small.bmp", size=(20, 10))
    picture(root / "big.bmp", size=(200, 400))
    (root / "big.txt").write_text("caption")
    (root / "big.long.txt").write_text("another caption")
    (root / "cut.png").write_bytes((root / "alpha.png").read_bytes()[:60])
    picture(root / "often" / "below" / "small.png", size=(20, 10))
    for folder in (root, root / "often"):
        (folder / "multiply.txt").write_text(folder.name)
    command = ["dataset_scripts/resize_images.py", "--data_root", root, "--out", out, "--max_side", 104]
    assert run_script(*command, "--dry_run") == 1 and not out.exists()
    assert run_script(*command) == 1
    assert "3 resized, 2 copied, 1 failed" in capsys.readouterr().out
    sizes = {name: Image.open(out / name).size for name in ("turned.jpg", "alpha.png", "sub/small.bmp", "big.png")}
    assert sizes == {"turned.jpg": (52, 104), "alpha.png": (104, 35), "sub/small.bmp": (20, 10), "big.png": (52, 104)}
    assert Image.open(out / "turned.jpg").getexif().get(0x0112) is None
    assert Image.open(out / "alpha.png").getpixel((0, 0))[3] == 0
    multiples = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("multiply.txt")}
    assert multiples == {"multiply.txt": "data", "often/multiply.txt": "often"}
    assert (out / "big.txt").read_text() == "caption" and (out / "big.long.txt").read_text() == "another caption"
    assert run_script(*command) == 1 and "5 kept" in capsys.readouterr().out
    with pytest.raises(ValueError, match="must be apart"):
        run_script(*command[:4], root / "sub", "--max_side", 104)


def test_listed_split_is_what_the_trainer_holds_out(shapes, capsys):
    from cachetrain.data.index import PairIndex
    from cachetrain.data.split import split_index

    assert run_script("dataset_scripts/list_split.py", "--train_data_dir", shapes, "--val_split", 0.3) == 0
    _, validation = split_index(PairIndex([shapes], ".img_sdxl", ".txt_t5cache"), 0.3)
    assert capsys.readouterr().out.splitlines() == [validation.stem(i) for i in range(len(validation))]


def make_page(kind, root, tmp_path):
    """A page of one of the tools, on files whose names and captions are hostile."""
    other, page = tmp_path / "other", tmp_path / f"{kind}.html"
    photograph(root / "photo.jpg")
    photograph(root / f"{HOSTILE.replace('/', '_')}.jpg")
    (root / "photo.txt").write_text(HOSTILE)
    other.mkdir()
    (other / "photo.txt").write_text(f"{HOSTILE}, \U0001f98a")
    argv = {
        "count_tags": ("--data_root", root, "--html", page),
        "check_images": ("--data_root", root, "--html", page),
        "check_captions": ("--data_root", root, "--html", page),
        "compare_captions": (root, other, "--out", page),
    }[kind]
    run_script(f"dataset_scripts/{kind}.py", *argv)
    return page


@pytest.mark.parametrize("kind", ["count_tags", "check_images", "check_captions", "compare_captions"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_show_hostile_names_and_captions_as_text(browser, root, tmp_path, kind, scheme):
    page_file = make_page(kind, root, tmp_path)
    options = {"color_scheme": scheme, "viewport": {"width": 1000, "height": 800}}
    with opened_page(browser, page_file.as_uri(), ".item", silent=True, **options) as (page, requests):
        assert page.locator("main b:not(.pair b), main script").count() == 0
        assert "<img src=x onerror=alert(1)>" in page.inner_text("main")
        pictures = page.locator("main img")
        assert (pictures.count() > 0) == (kind in ("check_images", "compare_captions"))
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


BROKEN = {
    "more fields": ("a.png,a, b", "more fields than columns"),
    "open quote": ('a.png,"open', "not CSV: unexpected end of data"),
    "text after a quote": ('a.png,"a" b', "not CSV: ',' expected"),
    "two open quotes": ('a.png,"open\na.png,"open', "not CSV: ',' expected"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_row_of_csv_that_would_lose_words_is_named_and_the_other_rows_are_imported(root, kind, capsys):
    rows, reason = BROKEN[kind]
    (root / "metadata.csv").write_text(f'file_name,text\n\nc.webp,"x\ny"\n{rows}\nsub/b.jpg,two\ngone.png,x\n')
    assert run_script("dataset_scripts/import_captions.py", root / "metadata.csv") == 1
    out, err = capsys.readouterr()
    assert f"metadata.csv:5: not text ({reason}" in err and "metadata.csv:3:" not in err
    broken = len(rows.splitlines())
    assert out == f"1 list, {3 + broken} rows, 2 written, {broken} not text, 1 no such image\n"
    assert {path.name: path.read_text() for path in root.rglob("*.txt")} == {"b.txt": "two\n", "c.txt": "x\ny\n"}


@pytest.mark.parametrize("command", [("import_captions",), ("export_captions", "--data_root")])
def test_the_key_of_the_images_is_no_key_of_captions(root, command, capsys):
    with pytest.raises(SystemExit):
        run_script(f"dataset_scripts/{command[0]}.py", *command[1:], root, "--caption_key", "file_name")
    assert "file_name holds the names of the images" in capsys.readouterr().err
