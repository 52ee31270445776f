"""Captions in variants: which ones are made, what is encoded again, which one a visit draws."""

import json
import shutil
from collections import Counter
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cache_fixtures import changed, make_pipeline, save_pictures, sidecars
from helpers import T5, digest, load_script, open_pairs, refused, run_script, train, trainer_argv
from safetensors.torch import load_file, save_file

from cachetrain.caching import assembly, text_run
from cachetrain.data import ram
from cachetrain.data.captions import Pair
from cachetrain.data.dataset import SampleKey
from cachetrain.data.index import PairIndex
from cachetrain.data.loader import on_device
from cachetrain.data.sidecar import read_header, read_sidecar
from cachetrain.data.variants import PLAIN, draw_variant, read_captions, sources_of
from cachetrain.data.walk import Folder, Pairs, find_images, pair_up
from cachetrain.distributed import World
from cachetrain.modeling.text_encoders import TextEncoder
from cachetrain.sampling.prompts import caption_of
from cachetrain.training import run as setup

TAGS = "red, circle, small, on the left, blue background"
SHUFFLED = ("--shuffle_tags", 4, "--keep_tags", 1)
TEXT_KINDS = {"clip": ("create_clipl.py", ".txt_clipl"), "t5": ("create_t5cache_768.py", ".txt_t5cache"),
              "sdxl": ("create_sdxl_text.py", ".txt_sdxl")}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory, model_sdxl):
    folder = tmp_path_factory.mktemp("models")
    return {name: make_pipeline(folder / name, name) for name in ("clip", "t5")} | {"sdxl": model_sdxl}


@pytest.fixture
def root(tmp_path):
    """Pictures a to d: tags; tags and a sentence; two lines, one of them b's sentence; one word."""
    folder = tmp_path / "data"
    save_pictures(folder, ["a.png", "b.png", "c.png", "d.png"], size=(8, 8))
    texts = {"a.txt": TAGS, "b.txt": f"square, {TAGS}", "b.long.txt": "a long sentence, with a comma",
             "c.txt": "one line\r\n\n  a long sentence, with a comma \n", "d.txt": "word"}  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def cache(models, root):
    def run(*argv, kind="t5"):
        return run_script(f"cache/{TEXT_KINDS[kind][0]}", "--data_root", root, "--model", models[kind], *argv)

    return run


@pytest.fixture(scope="module")
def varied(shapes, model_t5, tmp_path_factory):
    """The pairs of `shapes`, with variants of every other caption: 4 orders of 4 parts, and a sentence."""
    folder = tmp_path_factory.mktemp("varied") / "data"
    folder.mkdir()
    for place, path in enumerate(sorted(shapes.glob("*.png"))):
        shutil.copy(path, folder)
        shutil.copy(path.with_suffix(".img_sdxl"), folder)
        words = path.with_suffix(".txt").read_text().split()
        (folder / f"{path.stem}.txt").write_text(", ".join(words[:4]) if place % 2 else " ".join(words))
        if place % 2:
            (folder / f"{path.stem}.long.txt").write_text(" ".join(words))
    argv = ("--captions", "files", "--shuffle_tags", 4, "--tag_files", ".txt")
    assert run_script("cache/create_t5cache_768.py", "--data_root", folder, "--model", model_t5, *argv) == 0
    return folder


def captions_of(folder, name, **settings):
    (pair,) = [p for p in find_images([str(folder)], pytest.fail, all_captions=True) if p.image.endswith(f"/{name}")]
    return read_captions(pair, PLAIN._replace(**settings))


# Which captions there are


def test_lines_and_files_are_captions_of_their_own_and_equal_ones_are_stored_once(root):
    (root / "b.caption").write_text(f"square, {TAGS}")
    sentence = "a long sentence, with a comma"
    assert captions_of(root, "c.png", captions=("lines",)).texts == ("one line", sentence)
    assert captions_of(root, "c.png").texts == ("one line\r\n\n  a long sentence, with a comma",)
    found = captions_of(root, "b.png", captions=("files",), prefix="a photo, ")
    assert found.texts == (f"a photo, square, {TAGS}", f"a photo, {sentence}")
    assert found.sources == ((".txt", ((0,),)), (".caption", ((0,),)), (".long.txt", ((1,),)))
    (root / "b.caption").write_text("\n")  # an empty caption beside others would train like caption dropout
    assert [source for source, _ in captions_of(root, "b.png", captions=("files",)).sources] == [".txt", ".long.txt"]
    (root / "b.txt").write_text("x, y")
    both = captions_of(root, "b.png", captions=("files", "lines"), shuffle_tags=9, tag_files=(".txt",))
    assert both.texts == ("x, y", "y, x", sentence)
    (root / "d.txt").write_text(" \n\n")
    assert captions_of(root, "d.png", captions=("lines",), suffix=", photo").texts == (", photo",)


def test_captions_of_further_files_go_to_the_image_with_the_longest_name():
    names = ["a.jpg", "a.b.jpg", "a.txt", "a.long.txt", "a.b.long.txt", "a.caption", "a.TXT", "c.long.txt", "e.png"]
    pairs = list(pair_up(Folder("d", sorted(names)), pytest.fail, all_captions=True))
    expected = [
        Pair("d/a.b.jpg", "d/a.b.long.txt"),
        Pair("d/a.jpg", "d/a.txt", ("d/a.TXT", "d/a.caption", "d/a.long.txt")),
        Pair("d/e.png", None),
    ]
    assert pairs == expected
    packed = Pairs()
    for pair in pairs * 2:
        packed.append(pair)
    assert [packed[i] for i in range(len(packed))] == expected * 2


def test_shuffled_variants_keep_the_first_tags_and_all_others_in_any_order(root):
    number = 200
    texts = captions_of(root, "b.png", shuffle_tags=number, keep_tags=2).texts
    tags = ["square", *TAGS.split(", ")]
    assert texts[0] == f"square, {TAGS}" and len(texts) == 24  # all orders of the four others
    assert all(text.split(", ")[:2] == tags[:2] and sorted(text.split(", ")) == sorted(tags) for text in texts)
    dropping = captions_of(root, "b.png", shuffle_tags=number, keep_tags=2, drop_tags=0.3)
    counts = Counter(tag for place in dropping.texts[1:] for tag in place.split(", "))
    assert counts["square"] == counts["red"] == len(dropping.texts) - 1
    shares = []
    for seed in range(60):
        last = captions_of(root, "b.png", shuffle_tags=2, keep_tags=2, drop_tags=0.3, seed=seed).texts[-1]
        shares.append((len(last.split(", ")) - 2) / 4)
    assert np.mean(shares) == pytest.approx(0.7, abs=5 * np.sqrt(0.3 * 0.7 / 240))


def test_variants_are_a_pure_function_of_caption_and_seed_and_more_of_them_only_add(root):
    few, many = (captions_of(root, "a.png", shuffle_tags=number).texts for number in (3, 6))
    assert many[: len(few)] == few
    # Written down, so that another version of Python, numpy or this project makes no other ones.
    assert few[1:] == (
        "small, red, circle, blue background, on the left",
        "red, on the left, blue background, small, circle",
    )
    assert captions_of(root, "a.png", shuffle_tags=3, seed=1).texts[1:] != few[1:]
    (root / "a.txt").write_text("red|circle | small")
    assert all(sorted(text.split("|")) == ["circle", "red", "small"]
               for text in captions_of(root, "a.png", shuffle_tags=6, tag_separator="|").texts[1:])  # fmt: skip


def test_too_many_captions_of_one_image_are_named_and_the_rest_is_cached(cache, root, capsys):
    (root / "c.txt").write_text("\n".join(map(str, range(257))))
    assert cache("--captions", "lines") == 1
    assert f"{root}/c.txt: makes more than 256 captions of one image" in capsys.readouterr().err
    assert sorted(sidecars(root, ".txt_t5cache")) == ["_null_caption", "a", "b", "d"]


@pytest.mark.parametrize("flag", [("--keep_tags", 1), ("--drop_tags", 0.1), ("--tag_separator", "|"), ("--seed", 1)])
def test_options_of_shuffling_alone_are_refused(cache, flag):
    with pytest.raises(ValueError, match=f"{flag[0]} needs --shuffle_tags"):
        cache(*flag)


# What is encoded


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_each_variant_has_the_tensors_of_its_text_alone_and_the_null_caption_none(
    kind, models, cache, root, tmp_path
):
    script, suffix = TEXT_KINDS[kind]
    flags = ("--captions", "files", "lines", "--prefix", "photo of ", "--store_dtype", "fp32")
    assert cache(*flags, *SHUFFLED, kind=kind) == 0
    settings = {"captions": ("files", "lines"), "prefix": "photo of ", "shuffle_tags": 4, "keep_tags": 1}
    texts = [text for name in "abcd" for text in captions_of(root, f"{name}.png", **settings).texts]
    alone = tmp_path / "alone"
    save_pictures(alone, [f"{place:03}.png" for place in range(len(texts))], size=(8, 8))
    for place, text in enumerate(texts):
        (alone / f"{place:03}.txt").write_text(text)
    argv = ("--data_root", alone, "--model", models[kind], "--store_dtype", "fp32")
    assert run_script(f"cache/{script}", *argv) == 0
    place = 0
    for name in "abcd":
        tensors, header = read_sidecar(root / f"{name}{suffix}")
        number = len(captions_of(root, f"{name}.png", **settings).texts)
        assert len(tensors) == number * (2 if kind == "sdxl" else 1)
        assert ("variants" in header.metadata) == (number > 1)
        for variant in range(number):
            expected = read_sidecar(alone / f"{place:03}{suffix}")
            for key, tensor in expected[0].items():
                stored = tensors[f"{key}.{variant}" if variant else key]
                torch.testing.assert_close(stored, tensor, rtol=1e-4, atol=1e-4)
            tokens = header.metadata[f"num_tokens.{variant}" if variant else "num_tokens"]
            assert tokens == expected[1].metadata["num_tokens"]
            place += 1
    null, plain = (read_sidecar(folder / f"_null_caption{suffix}") for folder in (root, alone))
    torch.testing.assert_close(null[0], plain[0], rtol=1e-4, atol=1e-4)
    assert null[1].metadata.keys() == plain[1].metadata.keys() and place == len(texts) > 8


def test_one_caption_makes_the_same_sidecar_whatever_the_settings_and_is_not_encoded_again(cache, root, monkeypatch):
    assert cache() == 0
    plain = {name: read_sidecar(root / f"{name}.txt_t5cache") for name in "abd"}
    written = {"kind", "model", "revision", "encoder", "settings", "compute_dtype", "num_tokens", "truncated"}
    hashes = {"source_size", "source_mtime_ns", "source_sha256", "cachetrain_format", "sha256", "header_sha256"}
    assert plain["a"][1].metadata.keys() == written | hashes
    (root / "c.txt").write_text("one line")
    monkeypatch.setattr(
        text_run, "_encode", lambda args, pairs, *_: [pytest.fail(p.image) for p in pairs if "/c." not in p.image]
    )
    before = sidecars(root, ".txt_t5cache")
    assert cache("--captions", "lines") == 0
    for name, (tensors, header) in plain.items():
        found = read_sidecar(root / f"{name}.txt_t5cache")
        assert torch.equal(found[0]["emb"], tensors["emb"])
        assert found[1].metadata | {"header_sha256": ""} == header.metadata | {
            "captions": '{"captions": ["lines"]}', "header_sha256": ""
        }  # fmt: skip
    settled = sidecars(root, ".txt_t5cache")
    assert changed(before, settled) == ["a", "b", "d"]
    assert cache("--captions", "lines") == 0 and sidecars(root, ".txt_t5cache") == settled
    assert cache() == 0  # back to the settings without a name in the header
    back = read_header(root / "a.txt_t5cache").metadata
    # safetensors writes the fields in any order, which header_sha256 covers.
    assert back | {"header_sha256": ""} == plain["a"][1].metadata | {"header_sha256": ""}


def test_what_changes_a_caption_is_encoded_again_and_nothing_else(cache, root):
    flags = ("--captions", "files", "lines")

    def encoded(*argv):
        """Names whose tensors a run has made again."""
        before = {name: read_header(root / f"{name}.txt_t5cache").metadata["sha256"] for name in "abcd"}
        files = sidecars(root, ".txt_t5cache")
        assert cache(*flags, *argv) == 0
        again = sidecars(root, ".txt_t5cache")
        assert cache(*flags, *argv) == 0 and sidecars(root, ".txt_t5cache") == again  # and nothing the second time
        assert all(name in changed(files, again) for name in "abcd" if hash_of(name) != before[name])
        return "".join(name for name in "abcd" if hash_of(name) != before[name])

    def hash_of(name):
        return read_header(root / f"{name}.txt_t5cache").metadata["sha256"]

    cache(*flags)
    assert encoded("--shuffle_tags", 9) == "abc"
    assert encoded("--shuffle_tags", 10) == "ab"  # c's sentence has two tags, and both of their orders by now
    assert encoded("--shuffle_tags", 10, "--seed", 5) == "ab"
    settings = ("--shuffle_tags", 10, "--seed", 5)
    (root / "b.long.txt").write_text("another sentence")
    assert encoded(*settings) == "b"
    (root / "d.caption").write_text("a new file")
    assert encoded(*settings) == "d"
    (root / "b.long.txt").unlink()
    assert encoded(*settings) == "b"
    assert encoded(*settings, "--prefix", "photo of ") == "abcd"


@pytest.mark.parametrize("shared", [256, 1])
def test_equal_captions_of_any_images_are_encoded_once_in_chunks_too(shared, cache, root, monkeypatch):
    save_pictures(root, [f"n{place}.png" for place in range(12)], size=(8, 8))
    for place in range(12):
        (root / f"n{place}.txt").write_text(
            f"{'red ' * place}ring\nof all\n{'of some' if place % 2 else 'of others'}"
        )
    monkeypatch.setattr(text_run, "_CHUNK", 1)
    monkeypatch.setattr(assembly, "_MAX_SHARED", shared)
    encoded, encode_ids = [], TextEncoder.encode_ids
    monkeypatch.setattr(TextEncoder, "encode_ids", lambda self, ids: encoded.extend(ids) or encode_ids(self, ids))
    assert cache("--captions", "lines", "--batch_size", 3, "--store_dtype", "fp32") == 0
    pairs = [*find_images([str(root)], pytest.fail), Pair(str(root / "_null_caption"), None)]
    distinct = {text for pair in pairs for text in read_captions(pair, PLAIN._replace(captions=("lines",))).texts}
    assert len(set(map(tuple, encoded))) == len(distinct)
    assert len(encoded) == len(distinct) if shared > 1 else len(distinct) < len(encoded) < 40
    all_of = [read_sidecar(root / f"n{place}.txt_t5cache")[0] for place in range(12)]
    for tensors in all_of:  # one was encoded in another batch if it was not kept
        torch.testing.assert_close(tensors["emb.1"], all_of[0]["emb.1"], rtol=1e-4, atol=1e-4)


# Which variant a visit draws


def test_variants_are_drawn_by_source_then_caption_then_order():
    sources = {".txt": [[0, 1, 2, 3], [4]], ".long.txt": [[5]], ".caption": [[0]]}
    uniform = (np.arange(48_000) + 0.5) / 48_000
    counts = Counter(draw_variant(u, sources, {".txt": 3, ".long.txt": 2}) for u in uniform)
    shares = {place: counts[place] / 48_000 for place in range(6)}
    expected = {0: 3 / 6 / 2 / 4 + 1 / 6, 1: 1 / 16, 2: 1 / 16, 3: 1 / 16, 4: 1 / 4, 5: 2 / 6}
    assert shares == pytest.approx(expected, abs=1e-4)
    assert {draw_variant(u, sources, {}) for u in (0.0, np.nextafter(1, 0))} == {0}


WRONG = ("[1]", "{}", "x", '{".txt": 1}', '{".txt": []}', '{".txt": [0, 1]}', '{".txt": [[0], []]}',
         '{".txt": [[0]]}', '{".txt": [[0, 2]]}', '{".txt": [[0, "1"]]}')  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_a_header_that_does_not_fit_the_variants_is_named(text):
    assert sources_of("p", {"variants": '{".txt": [[0], [1]]}'}, 2) == {".txt": [[0], [1]]}
    with pytest.raises(ValueError, match=r"^p: "):
        sources_of("p", {"variants": text}, 2)


def test_each_visit_draws_a_variant_and_no_other_draw_changes(varied, shapes):
    index = PairIndex([varied], *T5)
    plain = open_pairs(PairIndex([shapes], *T5), seed=3)
    pairs, in_memory = open_pairs(index, seed=3), open_pairs(index, seed=3, sidecars=ram.RamCache(index))
    drawn = Counter()
    for epoch in range(40):
        for repeat in (0, 1):
            key = SampleKey(epoch, 1, repeat)
            found = pairs[key]
            tensors = load_file(index.text_path(1))
            (name,) = [
                name for name, tensor in tensors.items() if torch.equal(tensor.float(), found["condition"]["emb"])
            ]
            drawn[name] += 1
            assert torch.equal(found["condition"]["emb"], in_memory[key]["condition"]["emb"])
            for other in ("noise", "timesteps", "latents"):
                assert np.array_equal(found[other], plain[key][other])
    number = len(tensors)
    assert drawn.keys() == tensors.keys() and number > 3
    last = f"emb.{number - 1}"  # of .long.txt: half of the visits
    assert abs(drawn[last] - 40) < 5 * np.sqrt(80 / 4)
    weighted = open_pairs(index, seed=3, caption_weights={".long.txt": 1000.0})
    sentences = [weighted[SampleKey(epoch, 1)]["condition"]["emb"] for epoch in range(10)]
    assert all(torch.equal(emb, tensors[last].float()) for emb in sentences)
    fixed = open_pairs(index, fixed=True)
    assert torch.equal(fixed[SampleKey(0, 1)]["condition"]["emb"], fixed[SampleKey(7, 1, 1)]["condition"]["emb"])


def test_workers_memory_and_a_resume_train_the_same_weights_on_variants(varied, model_t5, tmp_path):
    flags = ["--max_steps", 4, "--batch_size", 6, "--lr", 1e-3, "--caption_weights", ".long.txt:3", "--save_steps", 2]
    _, expected = train(varied, model_t5, tmp_path / "run", *flags, "--num_workers", 2)
    shutil.rmtree(tmp_path / "run" / "checkpoint-000004")
    _, found = train(varied, model_t5, tmp_path / "run", *flags, "--resume", "latest", "--cache_in_ram")
    assert digest(found) == digest(expected)
    assert "captions of 12 of 24 pairs have variants" in refused_weights(varied, model_t5, tmp_path / "a")


def refused_weights(varied, model, out):
    """What is printed before a run with an unknown source is refused."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        message = refused(varied, model, out, "--caption_weights", ".lnog.txt:3")
    assert "--caption_weights .lnog.txt: variants of captions come from .long.txt, .txt; use these" in message
    return printed.getvalue()


def test_validation_uses_the_caption_as_written(varied, model_t5, tmp_path):
    argv = trainer_argv(varied, model_t5, tmp_path, "--val_split", 0.5, "--cond_dropout", 0)
    run = setup.open_run(load_script("train_from_cached.py").parse_args(argv), World(torch.device("cpu")))
    batches = list(on_device(setup.open_validation(run)._loader, torch.device("cpu")))
    assert run.held_out.num_with_variants > 2
    for batch in batches:
        for row, sample in enumerate(batch["samples"].tolist()):
            emb = load_file(run.held_out.text_path(sample))["emb"]
            assert torch.equal(batch["conditioning"]["encoder_hidden_states"][row, : len(emb)], emb.float())


# Other readers


def test_the_index_counts_the_longest_and_all_variants(varied, tmp_path):
    index = PairIndex([varied], *T5)
    for i in range(len(index)):
        lengths = [len(tensor) for tensor in load_file(index.text_path(i)).values()]
        assert (index.tokens[i], index.all_tokens[i]) == (max(lengths), sum(lengths))
    assert index.num_with_variants == 12 and index.caption_sources == [".long.txt", ".txt"]
    real = sum(path.stat().st_size for suffix in T5 for path in varied.glob(f"[0-9]*{suffix}"))
    assert 0.5 * real < ram.needed_bytes(index) < 2 * real
    half = index.subset(np.arange(0, 24, 2))
    assert half.num_with_variants == 0
    before = index.checksum()
    index.all_tokens[1] += 1  # of a resumed run, whose captions have other variants
    assert index.checksum() != before


def test_ranks_that_share_the_headers_know_the_variants_of_all(varied):
    told = {}  # (rank, number of the exchange) -> what the rank has said

    def rank(number):
        exchange = count()

        def tell(value):
            told[number, place := next(exchange)] = value
            return [told.get((other, place), value) for other in range(2)]

        world = SimpleNamespace(rank=number, ranks=2, gather=tell, sum_array=lambda array: sum(tell(array)))
        world.share = lambda make, _: make()
        return world

    for number in (0, 1, 0):  # by the third time the other rank has said everything
        index = PairIndex([varied], *T5, world=rank(number))
    alone = PairIndex([varied], *T5)
    assert index.checksum() == alone.checksum() and index.caption_sources == alone.caption_sources


@pytest.mark.parametrize(
    ("names", "message"),
    [(["emb", "emb.2"], "expected a tensor 'emb.1'"), (["emb", "emb.1", "narrow"], "its variants have widths")],
)
def test_sidecars_of_others_with_variants_are_checked_and_drawn_from(names, message, shapes, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    shutil.copy(shapes / "00000.img_sdxl", folder)
    text = folder / "00000.txt_t5cache"
    emb = load_file(shapes / "00000.txt_t5cache")["emb"]
    save_file({"emb": emb, "emb.1": emb * 2, "emb.2": emb[:2] * 3}, text)
    pairs = open_pairs(PairIndex([folder], *T5))
    found = {float(pairs[SampleKey(epoch, 0)]["condition"]["emb"][0, 0] / emb[0, 0]) for epoch in range(30)}
    assert sorted(found) == pytest.approx([1, 2, 3], rel=0.01)  # bfloat16
    save_file(
        {name.replace("narrow", "emb.2"): emb[:, : 3 if name == "narrow" else None].clone() for name in names}, text
    )
    with pytest.raises(ValueError, match=message):
        PairIndex([folder], *T5)


def test_tools_count_variants(cache, root, capsys):
    flags = ("--captions", "files", "--tag_files", ".txt", *SHUFFLED)
    assert cache(*flags) == 0
    assert "5 encoded, 0 fresh, 2 with variants, 8 in all" in capsys.readouterr().out
    argv = ("cache/cache_status.py", "--data_root", root)
    assert run_script(*argv) == 0
    out = capsys.readouterr().out
    assert "captions in variants: 2 with 1, 1 with 3, 1 with 5; 10 in all" in out
    assert "1 further caption file, for --captions files of the text scripts" in out
    made = "4 captions made with --captions files --shuffle_tags 4 --keep_tags 1 --tag_files .txt"
    assert made in out and "captions without an image" not in out
    (root / "b.long.txt").write_text("changed")
    assert run_script(*argv) == 1
    out = capsys.readouterr().out
    assert "1 stale: b.txt_t5cache" in out
    (command,) = [line.split("$ ")[1] for line in out.splitlines() if "create_t5cache" in line and "$" in line]
    assert run_script(*command.split()) == 0 and run_script(*argv) == 0  # that is what it takes
    assert run_script("cache/check_text_cache_std.py", root) == 0
    assert "4 captions in 10 variants of" in capsys.readouterr().out
    other = root.parent / "other"
    shutil.copytree(root, other)
    for suffix in ("txt_t5cache", "long.txt"):
        (other / f"b.{suffix}").unlink()
    assert run_script("cache/create_t5cache_768.py", "--data_root", other, "--model", read_header(
        root / "a.txt_t5cache").metadata["model"], *flags) == 0  # fmt: skip
    capsys.readouterr()
    compared = [f"{folder}/b.txt_t5cache" for folder in (root, other)]
    assert run_script("cache/compare_tensorfiles.py", *compared) == 1
    out = capsys.readouterr().out
    assert "emb.4: cosine n/a, relative L2 n/a, only in A" in out and "emb.3: cosine 1.0" in out


def test_a_sample_is_labelled_with_the_caption_that_it_was_encoded_from(root):
    settings = PLAIN._replace(captions=("files", "lines"), prefix="photo of ", shuffle_tags=4)
    (root / "d.txt").unlink()
    (root / "d.short.txt").write_text("short")
    labels = {name: caption_of(str(root / name), settings) for name in "cd"}
    assert labels == {"c": "photo of one line", "d": "photo of short"}
    assert settings.from_header("p", {"captions": settings.in_header()}) == settings
    for text in ("[]", '{"nothing": 1}', '{"shuffle_tags": 1000000}', '{"captions": [1]}', json.dumps({"seed": "1"})):
        with pytest.raises(ValueError, match=r"^p: "):
            settings.from_header("p", {"captions": text})
