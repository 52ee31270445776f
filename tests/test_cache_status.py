"""cache/cache_status.py: each state, made by really doing it, is counted exactly; nothing is written or lost."""

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_fixtures import make_pipeline, picture, save_pictures, sidecars, touch
from helpers import REPO, run_script
from PIL import Image
from safetensors.torch import save_file

from cachetrain.atomic import temporary_path
from cachetrain.data.index import PairIndex
from cachetrain.data.sidecar import read_header, read_sidecar, write_sidecar

IMG, CLIP, T5 = ".img_sdxl", ".txt_clipl", ".txt_t5cache"
STATES = ("fresh", "stale", "corrupt", "foreign", "missing", "orphaned")
NAMES = ("a.png", "b.jpg", "c.webp", "sub/d.png", "sub/e.png", "sub/f_1.png")
CAPTIONS = {"a.txt": "a cat", "b.txt": "a red cross", "sub/d.txt": "a dog " * 200, "sub/e.caption": "two dogs"}


@pytest.fixture(scope="module")
def models(tmp_path_factory, model_sdxl):
    folder = tmp_path_factory.mktemp("models")
    return {flavour: make_pipeline(folder / flavour, flavour) for flavour in ("clip", "t5")} | {"sdxl": model_sdxl}


@pytest.fixture(scope="module")
def cached(models, tmp_path_factory):
    """Six pictures with three kinds of sidecars, all fresh. Copy it before changing anything."""
    root = tmp_path_factory.mktemp("cached") / "data"
    save_pictures(root, NAMES)
    for name, caption in CAPTIONS.items():
        (root / name).write_text(caption)
    cache_images(root, models["t5"])
    assert run_script("cache/create_t5cache_768.py", "--data_root", root, "--model", models["t5"]) == 0
    assert run_script("cache/create_clipl.py", "--data_root", root, "--model", models["clip"]) == 0
    return root


@pytest.fixture
def root(cached, tmp_path):
    return shutil.copytree(cached, tmp_path / "data")


@pytest.fixture
def status(root, capsys):
    """Runs cache_status on `root`, or others; returns (exit code, output)."""

    def run(*argv, roots=(root,)):
        capsys.readouterr()
        code = run_script("cache/cache_status.py", *(word for one in roots for word in ("--data_root", one)), *argv)
        return code, capsys.readouterr().out

    return run


def cache_images(root, model, *argv, size=("--resolution", 64)):
    argv = ("--data_root", root, "--model", model, "--num_workers", 0, *size, *argv)
    assert run_script("cache/create_img_sdxl.py", *argv) == 0


def table(output):
    """suffix -> {state: count}, without zeros, of the table in the output."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("sidecars"))
    assert tuple(lines[start].split()[1:-1]) == STATES
    rows = [line.split() for line in lines[start + 1 : lines.index("", start)]]
    return {
        suffix: {state: int(n.replace(",", "")) for state, n in zip(STATES, counts, strict=True) if n != "-"}
        for suffix, *counts, _ in rows
    }


def kilobytes(line):
    return float(re.search(r"([\d.]+)kB", line)[1])


def everything(root):
    """Path -> (inode, mtime, size) of all files, hidden ones too."""
    paths = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    return {str(path): (s.st_ino, s.st_mtime_ns, s.st_size) for path in paths for s in [path.lstat()]}


def alter(path, change):
    path.write_bytes(change(bytearray(path.read_bytes())))


def flip_last(data):
    data[-1] ^= 1
    return data


def flip_header(data):
    data[data.index(b"bicubic")] ^= 1
    return data


def foreign(path, **metadata):
    save_file({"latent" if path.suffix == IMG else "emb": torch.zeros(4, 8, 8)}, path, metadata or None)


ALL_FRESH = {suffix: {"fresh": 6} for suffix in (IMG, CLIP, T5)}


# ---- states ----


def test_further_caption_files_are_no_captions_for_a_cache_without_captions_files(root, models, status):
    for folder in ("lone", "both"):
        save_pictures(root / folder, ["g_1.png"])
        (root / folder / "g_1.long.txt").write_text("a long caption")
    (root / "both" / "g_1.TXT").write_text("a caption")
    lone = (root / "lone", root / "both")
    roots = [word for one in lone for word in ("--data_root", one)]
    assert run_script("cache/create_t5cache_768.py", *roots, "--model", models["t5"]) == 0
    assert table(status(roots=lone)[1]) == {T5: {"fresh": 2}}


def test_fresh_and_complete_is_exit_code_0(status):
    code, output = status()
    assert code == 0
    assert table(output) == ALL_FRESH
    assert "6 images; captions: 3 .txt, 1 .caption, 2 file name" in output
    assert "all fresh and complete" in output and "to do" not in output
    total = sum(size for path, (*_, size) in everything(Path(output.split(":")[0])).items() if path.endswith(T5))
    assert kilobytes(next(line for line in output.splitlines() if line.startswith(T5))) == pytest.approx(
        total / 1000, rel=0.01
    )


def fresh_but_one(state, *suffixes):
    return {suffix: {"fresh": 5, state: 1} for suffix in suffixes}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda root: (root / "a.txt").write_text("a dog"), fresh_but_one("stale", CLIP, T5)),
        (lambda root: (root / "a.txt").unlink(), fresh_but_one("stale", CLIP, T5)),
        (lambda root: save_pictures(root, ["b.jpg"], size=(80, 80)), fresh_but_one("stale", IMG)),
        (lambda root: [touch(root / name) for name in (*NAMES, *CAPTIONS)], {}),
        (lambda root: alter(root / "sub/d.img_sdxl", lambda data: data[:-1]), fresh_but_one("corrupt", IMG)),
        (lambda root: alter(root / "sub/d.txt_clipl", lambda data: data[:5]), fresh_but_one("corrupt", CLIP)),
        (lambda root: alter(root / "c.img_sdxl", flip_header), fresh_but_one("corrupt", IMG)),
        (lambda root: foreign(root / "c.img_sdxl"), fresh_but_one("foreign", IMG)),
        (lambda root: foreign(root / "c.txt_clipl", format="pt", num_tokens="?"), fresh_but_one("foreign", CLIP)),
        (lambda root: (root / "c.txt_t5cache").unlink(), fresh_but_one("missing", T5)),
        (
            lambda root: save_pictures(root, ["sub/new.jpg"]),
            {key: {"fresh": 6, "missing": 1} for key in (IMG, CLIP, T5)},
        ),
        (lambda root: (root / "sub/e.png").unlink(), fresh_but_one("orphaned", IMG, CLIP, T5)),
    ],
    ids="edited,uncaptioned,repainted,touched,cut,stump,header,foreign,format,deleted,new,gone".split(","),
)
def test_each_state_is_counted_exactly(status, root, change, expected):
    change(root)
    code, output = status()
    assert code == (1 if expected else 0)
    assert table(output) == ALL_FRESH | expected


def test_all_states_at_once(status, root):
    (root / "a.txt").write_text("a dog")
    save_pictures(root, ["b.jpg"], size=(80, 80))
    alter(root / "c.img_sdxl", lambda data: data[:-1])
    (root / "sub/d.txt_t5cache").unlink()
    (root / "sub/e.png").unlink()
    foreign(root / "sub/f_1.txt_clipl")
    code, output = status()
    assert code == 1
    assert table(output) == {
        IMG: {"fresh": 3, "stale": 1, "corrupt": 1, "orphaned": 1},
        CLIP: {"fresh": 3, "stale": 1, "foreign": 1, "orphaned": 1},
        T5: {"fresh": 3, "stale": 1, "missing": 1, "orphaned": 1},
    }
    assert f"damaged: 1\n  {root / 'c.img_sdxl'}\n" in output
    for line in ("1 missing: sub/d.png", "1 stale: b.img_sdxl", "1 stale: a.txt_clipl", "3 orphaned, "):
        assert line in output


def test_flipped_payload_byte_is_found_by_verify_alone(status, root):
    alter(root / "b.img_sdxl", flip_last)
    alter(root / "_null_caption.txt_clipl", flip_last)
    assert status()[0] == 0
    code, output = status("--verify")
    assert code == 1
    assert table(output)[IMG] == {"fresh": 5, "corrupt": 1}
    assert f"damaged: 2\n  {root / 'b.img_sdxl'}\n  {root / '_null_caption.txt_clipl'}\n" in output
    assert f"null caption corrupt in {root}" in output


def test_missing_or_stale_null_caption_is_told_per_root(status, root, cached):
    (root / "_null_caption.txt_clipl").unlink()
    tensors, header = read_sidecar(root / "_null_caption.txt_t5cache")
    write_sidecar(root / "_null_caption.txt_t5cache", tensors, header.metadata | {"encoder": "0" * 64})
    code, output = status(roots=(cached, root))
    assert code == 1
    assert f"null caption missing in {root}\n" in output and f"null caption stale in {root}\n" in output
    assert f"in {cached}\n" not in output


def test_sources_that_cannot_be_used_are_named_and_the_rest_is_counted(status, root):
    (root / "a.txt").write_bytes(b"\xff\xfe")
    save_pictures(root, ["b.png"])  # beside b.jpg
    code, output = status()
    assert code == 1
    assert table(output) == {IMG: {"fresh": 6}, CLIP: {"fresh": 5}, T5: {"fresh": 5}}
    assert f"{root / 'a.txt'}: not UTF-8" in output
    assert "would share its sidecar" in output


def test_only_the_first_damaged_are_listed_and_all_are_counted(status, tmp_path, root):
    more = tmp_path / "more"
    save_pictures(more, [f"{i:02d}.png" for i in range(25)], size=(8, 8))
    for i in range(25):
        (more / f"{i:02d}.img_sdxl").write_bytes(b"damaged")
    output = status(roots=(more,))[1]
    assert table(output)[IMG] == {"corrupt": 25}
    assert "damaged: 25\n" in output and "... and 5 more" in output and output.count(".img_sdxl\n") == 20 + 1


# ---- who made them, and how ----


@pytest.mark.parametrize(
    "case", ["one", "settings", "settings of another root", "encoder of another root", "foreign"]
)
def test_mixed_is_what_the_trainer_refuses(status, root, models, tmp_path, case):
    roots = [root]
    if case == "settings":
        cache_images(root / "sub", models["t5"], size=("--resolution", 128))
    if case.endswith("another root"):
        roots.append(tmp_path / "other")
        shutil.copytree(root, roots[1], ignore=shutil.ignore_patterns("*.img_sdxl"))
        vae = shutil.copytree(models["t5"] / "vae", tmp_path / "vae")
        if case.startswith("encoder"):
            config = json.loads((vae / "config.json").read_text())
            (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
        cache_images(roots[1], vae, "--vae", size=("--resolution", 128))
    if case == "foreign":
        foreign(root / "c.img_sdxl")
    code, output = status(roots=roots)
    try:
        PairIndex(roots, IMG, CLIP)
        refused = False
    except ValueError as error:
        assert "mixed caches" in str(error)
        refused = True
    assert refused == ("\n  mixed: " in output) == (code == 1)
    assert refused == (case not in ("one", "settings of another root"))


def test_minority_is_stale_and_the_printed_command_makes_all_one(status, root, models):
    shutil.rmtree(root / "sub")
    save_pictures(root, ["sub/d.png"])
    cache_images(root / "sub", models["t5"], size=("--target_width", 64, "--target_height", 128))
    output = status()[1]
    assert table(output)[IMG] == {"fresh": 3, "stale": 1}
    assert "\n  3 by " in output and "\n  1 by " in output
    assert f"differs in height; the first: {root / 'sub/d.img_sdxl'}\n" in output
    assert "1 stale: sub/d.img_sdxl\n" in output
    assert run_printed(output, IMG) == 0
    assert table(status()[1])[IMG] == {"fresh": 4}


def run_printed(output, suffix):
    """Runs the command that the output prints for a suffix."""
    section = output[output.index("to do") :].split(f"\n  {suffix}\n")[1]
    script, *argv = shlex.split(re.search(r"^    \$ (.*)$", section, re.MULTILINE)[1])
    assert (REPO / script).is_file()
    return run_script(script, *argv, *(("--num_workers", 0) if "img" in script else ()))


@pytest.mark.parametrize(
    ("script", "flavour", "argv"),
    [
        ("cache/create_img_sdxl.py", "t5", ["--bucket", "--resolution", 64, "--aspect_limit", 3]),
        ("cache/create_img_sdxl.py", "t5", ["--target_width", 72, "--target_height", 64, "--store_posterior"]),
        (
            "cache/create_img_sdvae.py",
            "clip",
            ["--flip", "--dtype", "bf16", "--resolution", 64, "--cache_suffix", ".mine"],
        ),
        ("cache/create_clipl.py", "clip", ["--clip_skip", 1, "--store_dtype", "fp32", "--cache_suffix", ".clip1"]),
        ("cache/create_t5cache_768.py", "t5", ["--raw", "--max_length", 7]),
        ("cache/create_sdxl_text.py", "sdxl", ["--max_length", 152]),
    ],
)
def test_printed_command_makes_exactly_what_is_missing(tmp_path, models, status, script, flavour, argv):
    root = tmp_path / "my data"
    save_pictures(root, ["a.png", "b.png", "c.png"])
    assert run_script(script, "--data_root", root, "--model", models[flavour], *argv) == 0
    suffix = argv[argv.index("--cache_suffix") + 1] if "--cache_suffix" in argv else None
    suffix = suffix or next(s for s in (IMG, CLIP, T5, ".txt_sdxl") if (root / f"b{s}").exists())
    (root / f"b{suffix}").unlink()
    before = sidecars(root, suffix)
    code, output = status(roots=(root,))
    assert code == 1 and table(output)[suffix] == {"fresh": 2, "missing": 1}
    assert run_printed(output, suffix) == 0
    after = sidecars(root, suffix)
    assert {name for name in after if after[name] != before.get(name)} == {"b"}
    assert status(roots=(root,))[0] == 0


def test_printed_command_gives_the_numbers_that_the_others_got_from_norm(root, models, status, tmp_path):
    path = tmp_path / "my norm.json"
    path.write_text(json.dumps({"scaling_factor": [0.9, 1.1, 1, 2], "shift_factor": 0.5}))
    (root / "b.img_sdxl").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # the command holds wherever it is run
        cache_images(root, models["t5"], "--norm", path.name)  # makes one, and changes the headers of five
    for name in ("b", "c"):
        (root / f"{name}.img_sdxl").unlink()
        assert run_printed(status()[1], IMG) == 0
    numbers = {read_header(file).metadata["scaling_factor"] for file in root.rglob("*.img_sdxl")}
    assert numbers == {"0.9,1.1,1.0,2.0"} and status()[0] == 0


def test_buckets_and_upscaled_images_are_counted(status, tmp_path, models):
    root = tmp_path / "pictures"
    sizes = [(300, 300), (256, 256), (100, 100), (640, 320), (320, 640), (641, 320)]
    for i, (width, height) in enumerate(sizes):
        root.mkdir(exist_ok=True)
        Image.fromarray(picture(width, height, i)).save(root / f"{i}.png")
    cache_images(root, models["t5"], "--bucket", size=("--resolution", 256))
    output = status(roots=(root,))[1]
    rows = [line.split() for line in output.splitlines() if re.match(r" +(\d+x\d+|all) ", line)]
    aspects = {}
    for path in root.glob("*.img_sdxl"):  # what the tensors are, not what is said of them
        height, width = (8 * side for side in read_sidecar(path)[0]["latent"].shape[1:])
        aspects[f"{width}x{height}"] = aspects.get(f"{width}x{height}", 0) + 1
    assert len(aspects) == 3 and aspects["256x256"] == 3
    assert {size: int(images) for size, images, *_ in rows[:-1]} == aspects
    assert rows[0][2:] == ["50.0%", "0.0%"] and rows[-1][:3] == ["all", "6", "100.0%"]
    assert "  1 image upscaled\n" in output


def test_token_lengths_are_those_of_the_embeddings(status, root):
    output = status()[1]
    section = output[output.index(f"\n{T5}\n") :].split("\n\n")[0]
    paths = [path for path in root.rglob(f"*{T5}") if path.stem != "_null_caption"]
    lengths = sorted(read_header(path).shapes["emb"][0] for path in paths)
    assert lengths[-1] == 256
    median = np.quantile(lengths, 0.5, method="inverted_cdf")
    assert f"{lengths[0]} to 256 tokens, median {median}; 1 caption truncated" in section
    bins = [(int(a), int(b), int(n)) for a, b, n in re.findall(r"^ +(\d+)-(\d+) +(\d+)", section, re.MULTILINE)]
    assert bins[0][0] == lengths[0] and len(bins) <= 6
    assert [n for *_, n in bins] == [sum(a <= length <= b for length in lengths) for a, b, _ in bins]


# ---- suffixes ----


def test_suffix_of_ones_own_is_found_by_a_header(status, root, models):
    cache_images(root / "sub", models["t5"], "--cache_suffix", ".mine")
    (root / "sub/d.mine").write_bytes(b"the first one is damaged")
    for name in ("a.json", "b.json", "c.safetensors", "no_suffix"):
        (root / name).write_text("{}")
    foreign(root / "b.safetensors")
    code, output = status()
    assert code == 1
    assert table(output) == ALL_FRESH | {".mine": {"fresh": 2, "corrupt": 1, "missing": 3}}
    assert "3 missing: a.png, b.jpg, c.webp\n" in output


def test_named_suffix_is_missed_and_unnamed_one_is_not(status, root):
    assert status("--cache_suffix", IMG)[0] == 0
    code, output = status("--cache_suffix", ".img_sdvae")
    assert code == 1
    assert table(output) == {".img_sdvae": {"missing": 6}} | ALL_FRESH
    assert f"$ cache/create_img_sdvae.py --data_root {root}\n" in output
    assert status("--cache_suffix", ".other")[0] == 1


def test_suffix_with_two_dots_is_counted_once_named_and_never_pruned(status, root, models):
    cache_images(root, models["t5"], "--cache_suffix", ".64.img_sdxl")
    before = everything(root)
    code, output = status("--prune", "--yes")
    assert code == 1 and everything(root) == before
    assert table(output)[IMG] == {"fresh": 6, "orphaned": 6}
    assert "orphaned, but kept by --prune: 6\n" in output
    code, output = status("--cache_suffix", ".64.img_sdxl")
    assert code == 0
    assert table(output) == ALL_FRESH | {".64.img_sdxl": {"fresh": 6}}
    (root / "a.png").unlink()
    assert table(status("--cache_suffix", ".64.img_sdxl")[1])[".64.img_sdxl"] == {"fresh": 5, "orphaned": 1}


def test_images_without_sidecars_are_told_what_to_run(status, tmp_path):
    save_pictures(tmp_path / "new", ["a.png"])
    code, output = status(roots=(tmp_path / "new",))
    assert code == 1
    assert "no image sidecars yet" in output and "no text sidecars yet" in output


# ---- nothing is written, nothing is lost ----


def test_status_changes_no_file(status, root):
    for name in (*NAMES, *CAPTIONS):
        touch(root / name)
    (root / "a.txt").write_text("another caption")
    (root / "sub/e.png").unlink()
    alter(root / "b.img_sdxl", flip_last)
    abandoned = temporary_path(root / "x.img_sdxl")
    abandoned.write_bytes(b"of a run that was killed")
    os.utime(abandoned, (0, 0))
    before = everything(root)
    assert [status(*argv)[0] for argv in ([], ["--verify"], ["--prune"])] == [1, 1, 1]
    assert everything(root) == before


def test_folder_of_sidecars_alone_is_verified_and_nothing_is_orphaned(status, root, tmp_path):
    alone = tmp_path / "alone"
    for path in root.rglob("*.*_*"):
        if path.suffix in ALL_FRESH:
            (alone / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, alone / path.relative_to(root))
    code, output = status("--verify", roots=(alone,))
    assert code == 0 and table(output) == ALL_FRESH
    assert f"{alone}: no images, so whether its sidecars are up to date is not known" in output
    alter(alone / "b.img_sdxl", flip_last)
    code, output = status("--verify", roots=(root, alone))
    assert code == 1 and table(output)[IMG] == {"fresh": 11, "corrupt": 1}
    code, output = status("--verify", roots=(alone,))
    assert code == 1 and "copy these again from where the images are" in output and "--prune" not in output
    before = everything(alone)
    assert "nothing to prune" in status("--prune", "--yes", roots=(alone,))[1] and everything(alone) == before


@pytest.fixture
def orphans(root):
    """`root` with two images gone; returns the paths that pruning must delete."""
    (root / "b.jpg").unlink()
    (root / "sub/f_1.png").unlink()
    gone = {str(root / f"{stem}{suffix}") for stem in ("b", "sub/f_1") for suffix in ALL_FRESH}
    alter(root / "b.img_sdxl", lambda data: data[:-10])  # damaged, but plainly one of ours
    foreign(root / "sub/f_1.txt_clipl")
    (root / "b.txt_clipl").write_bytes(b"no sidecar at all")
    return gone - {str(root / "sub/f_1.txt_clipl"), str(root / "b.txt_clipl")}


def test_prune_deletes_exactly_the_orphans_after_listing_them(status, root, orphans):
    before = everything(root)
    code, output = status("--prune", "--yes")
    assert code == 1  # two were kept
    assert before.keys() - everything(root).keys() == orphans
    assert all(before[path] == now for path, now in everything(root).items())
    listed, deleted = output.split("to be deleted:\n")[1].split("4 sidecars, ")
    assert {line.strip() for line in listed.splitlines()} == orphans and "4 deleted" in deleted
    assert kilobytes(deleted) == pytest.approx(sum(before[path][2] for path in orphans) / 1000, rel=0.01)
    assert "orphaned, but kept by --prune: 2\n" in output
    (root / "sub/f_1.txt_clipl").unlink()
    (root / "b.txt_clipl").unlink()
    (root / "a.png").unlink()
    assert status("--prune", "--yes")[0] == 0
    assert not list(root.glob("a.*_*"))


def answered(root, answer, meanwhile=lambda: None):
    """Runs cache_status --prune at a terminal, and answers its question; returns the exit code."""
    terminal, end = pty.openpty()
    command = [sys.executable, REPO / "cache/cache_status.py", "--data_root", root, "--prune"]
    process = subprocess.Popen(command, stdin=end, stdout=subprocess.PIPE, text=True)
    shown = ""
    while not shown.endswith("[y/N] "):
        character = process.stdout.read(1)
        assert character, shown
        shown += character
    meanwhile()
    os.write(terminal, answer.encode())
    process.communicate()
    os.close(terminal)
    os.close(end)
    return process.returncode


def test_prune_deletes_nothing_without_a_yes(status, root, orphans, capsys):
    before = everything(root)
    assert run_script("cache/cache_status.py", "--data_root", root, "--prune") == 1  # pytest's stdin is no terminal
    assert "--yes" in capsys.readouterr().err
    assert answered(root, "\n") == 1
    assert everything(root) == before


def test_prune_at_a_terminal_spares_an_image_that_came_back(root, orphans):
    before = everything(root)
    answered(root, "y\n", meanwhile=lambda: save_pictures(root, ["sub/f_1.png"]))
    after = everything(root)
    assert before.keys() - after.keys() == {path for path in orphans if not path.startswith(str(root / "sub"))}


# ---- where it runs ----


def test_symbolic_links_in_circles_are_followed_once(status, root):
    (root / "sub/loop").symlink_to(root)
    (root / "again").symlink_to(root / "sub")
    code, output = status()
    assert code == 0 and table(output) == ALL_FRESH
    assert table(status(roots=(root, root / "sub/.."))[1]) == ALL_FRESH


def test_ranks_of_a_launcher_make_no_difference(status, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert table(status()[1]) == ALL_FRESH


def test_file_names_that_are_not_text_are_shown(root):
    name = os.fsdecode(b"\xff\xfe.png")
    Image.fromarray(picture(8, 8)).save(root / name)
    command = [sys.executable, REPO / "cache/cache_status.py", "--data_root", root]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1 and rb"\udcff\udcfe.png" in done.stdout


def test_looking_needs_no_torch(root):
    code = (
        f"import runpy, sys; sys.argv = ['cache_status.py', '--data_root', {str(root)!r}]\n"
        f"try:\n    runpy.run_path({str(REPO / 'cache/cache_status.py')!r}, run_name='__main__')\n"
        "finally:\n    assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    "argv", [["--data_root", "nowhere"], ["--data_root", "."], ["--data_root", ".", "--yes"], []], ids=str
)
def test_usage_errors_are_exit_code_2(tmp_path, argv):
    command = [sys.executable, REPO / "cache/cache_status.py", *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr
