#!/usr/bin/env -S python3 -P
"""Measures the cache scripts against their parts (decoding, VAE, T5) run alone on the same files.

    ./benchmarks/cache_throughput.py --work /tmp/cache_throughput

images: photographs from scikit-image (test extra) as JPEGs of 512 to 4000 pixels, cached at 256x256 with a random VAE
        of Stable Diffusion's size and with the tiny VAE. Reference: decoding alone, on all cores, and the VAE alone,
        on one resident batch.
draft:  decoding of large JPEGs at reduced scale, against full scale.
text:   captions of 5 to 200 tokens, encoded by a random T5 of t5-small's size. References: the same, one by one; the
        encoder alone, on resident batches.
variants: captions of 20 tags in 4 orders, encoded by the same T5; sidecars with 4 variants of the size of CLIP's and
        SDXL's, read as a visit in training reads them. Reference: the same with one caption.
scan:   100,000 empty images, captions and real sidecars, listed and checked, and indexed as for training.
start:  `--help` of each cache script.

On a GPU, whose work is over soon, each script also runs on few files first: "without start-up" is the difference.
The last column is the project's target for each ratio. Takes about eight minutes on two CPU cores and 1.5 GB of disk.
Files already in --work are reused.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from argparse import Namespace
from functools import partial
from pathlib import Path

from cachetrain import cli

REPO = Path(__file__).resolve().parent.parent
TINY = REPO / "models" / "tiny"
SIZES = (512, 1024, 2048, 4000)
PARTS = ("images", "draft", "text", "variants", "scan", "start")
# Random T5 encoders of the tiny model, of t5-small and of T5 v1.1 XXL: 4.6 billion parameters.
T5_FIELDS = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj")
T5_SIZES = {
    "tiny": (64, 16, 128, 2, 4, "relu"),
    "small": (512, 64, 2048, 6, 8, "relu"),
    "xxl": (4096, 64, 10240, 24, 64, "gated-gelu"),
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--work", required=True, help="directory for models, pictures and caches; not deleted")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--vaes", nargs="+", choices=("tiny", "sd"), default=("tiny", "sd"), help="sizes of the VAE")
    parser.add_argument(
        "--num_images",
        type=cli.positive_int,
        default=24,
        help="images for the full-size VAE; the tiny VAE gets ten times as many",
    )
    side = cli.Number(int, 64, 2048, step=64)
    parser.add_argument("--side", type=side, default=256, help="side at which images are encoded, in pixels")
    parser.add_argument("--t5", choices=T5_SIZES, default="small", help="size of the T5 encoder")
    parser.add_argument("--num_captions", type=cli.positive_int, default=400, help="captions to encode")
    parser.add_argument("--num_pairs", type=cli.positive_int, default=100_000, help="images with captions to scan")
    cli.add_device_arguments(parser)
    return parser.parse_args(argv)


def seconds(function, *arguments):
    """Calls a function; returns (elapsed seconds, result)."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def run_script(name, *argv):
    """Runs main() of a cache script in this process, in which torch is already imported."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, REPO / "cache" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.main([str(argument) for argument in argv]):
        raise ValueError(f"{name} {argv} failed")


def script_seconds(args, name, few, many, *argv):
    """Runs a cache script on the folder `many`.

    Returns:
        (elapsed seconds; on a GPU, those beyond a run on the folder `few` before it, else None; peak GPU memory in
        GiB). The GPU's libraries must have been loaded before.
    """
    import torch

    from cachetrain.modeling import load

    def run(folder):
        return seconds(run_script, name, "--data_root", folder, *argv, "--overwrite", *shared_arguments(args))[0]

    if load.pick_device(args.device).type == "cpu":
        return run(many), None, 0.0
    start_s = run(few)
    torch.cuda.reset_peak_memory_stats()
    all_s = run(many)
    return all_s, max(all_s - start_s, 1e-9), torch.cuda.max_memory_allocated() / 2**30


def shared_arguments(args):
    given = (("--device", args.device), ("--dtype", args.dtype))
    return [word for flag, value in given if value for word in (flag, value)]


# Images


def make_photographs(folder, count):
    """Writes `count` JPEGs, cycling through the four photographs and the sizes; returns the paths.

    Those that come up again are hard links.
    """
    import skimage.data
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    names, paths = ("astronaut", "chelsea", "coffee", "rocket"), []
    for index in range(count):
        path = folder / f"{index:04}.jpg"
        paths.append(str(path))
        if not path.exists() and index >= 4 * len(SIZES):
            os.link(paths[index - 4 * len(SIZES)], path)
        elif not path.exists():
            image = Image.fromarray(getattr(skimage.data, names[index % 4])())
            scale = SIZES[index // 4 % len(SIZES)] / max(image.size)
            image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS).save(
                path, quality=92
            )
    return paths


def make_vae(work):
    """Saves a random VAE of Stable Diffusion's size; returns its directory."""
    import torch
    from diffusers import AutoencoderKL

    if not (work / "vae").exists():
        torch.manual_seed(0)
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ).save_pretrained(work / "vae")
    return work / "vae"


def decode(path, side=256):
    from cachetrain.caching import images

    return images.decode_file(path, [(side, side)]).pixels


def decode_alone(paths, side):
    """Returns the seconds needed to decode all files on all cores, without starting the processes."""
    decode_one = partial(decode, side=side)
    with multiprocessing.get_context("fork").Pool(cli.available_cores()) as pool:
        pool.map(decode_one, paths[: 2 * cli.available_cores()])
        return seconds(pool.map, decode_one, paths, 4)[0]


def encode_alone(args, vae_dir, count, batch_size=8):
    """Returns the seconds needed to encode `count` images, from the median time of one resident batch."""
    import torch

    from cachetrain.caching.encoders import encode_images
    from cachetrain.modeling import load

    device = load.pick_device(args.device)
    dtype = load.pick_dtype(args.dtype, device)
    batch = torch.rand(batch_size, 3, args.side, args.side).to(device, dtype)
    vae = load.load_vae(vae_dir, dtype).to(device)
    times_s = [seconds(lambda: encode_images(vae, batch).float().cpu())[0] for _ in range(8)]
    return statistics.median(times_s[1:]) * count / batch_size


def measure_images(args, work):
    """Yields the rows of each VAE."""
    from cachetrain.modeling import load

    on_cpu = load.pick_device(args.device).type == "cpu"
    few = work / f"photographs_{len(SIZES)}"
    make_photographs(few, len(SIZES))
    for name in args.vaes:
        vae_dir, count = (TINY / "vae", 10 * args.num_images) if name == "tiny" else (make_vae(work), args.num_images)
        paths = make_photographs(work / f"photographs_{count}", count)
        argv = ["--model", vae_dir, "--vae", "--resolution", args.side]
        decode_s, encode_s = decode_alone(paths, args.side), encode_alone(args, vae_dir, count)
        script_s, steady_s, gib = script_seconds(args, "create_img_sdxl", few, Path(paths[0]).parent, *argv)
        reference_s = decode_s + encode_s if on_cpu else max(decode_s, encode_s)
        parts = f"decode {decode_s:.1f} s {'+' if on_cpu else 'or'} encode {encode_s:.1f} s"
        label = f"{count} images of {args.side} px, VAE of {name} size"
        yield label, f"{script_s:.1f} s", parts, script_s / reference_s, "<= 1.10" if on_cpu else ""
        if steady_s is not None:
            figure = f"{steady_s:.1f} s, {(count - len(SIZES)) / steady_s:.0f} images/s"
            yield f"{label}, without start-up", figure, parts, steady_s / reference_s, "<= 1.10"
            yield f"{label}: peak memory", f"{gib:.1f} GiB", "", None, ""


def measure_draft(args, work):
    """Yields the row that compares reduced-scale with full-scale decoding of large images: PSNR and time."""
    import math

    import numpy as np

    from cachetrain.caching import images

    paths = make_photographs(work / f"photographs_{10 * args.num_images}", 10 * args.num_images)
    large = [path for index, path in enumerate(paths) if SIZES[index // 4 % len(SIZES)] >= 2048][:16]
    margin = images._DRAFT_MARGIN
    reduced_s, reduced = seconds(lambda: [decode(path) for path in large])
    images._DRAFT_MARGIN = math.inf
    full_s, full = seconds(lambda: [decode(path) for path in large])
    images._DRAFT_MARGIN = margin
    errors = [np.mean((a.astype(float) - b) ** 2) for a, b in zip(reduced, full, strict=True)]
    psnr = 10 * math.log10(255**2 / max(errors))
    figure = f"{1000 * reduced_s / len(large):.0f} ms, PSNR >= {psnr:.1f} dB"
    against = f"full scale {1000 * full_s / len(large):.0f} ms"
    yield "decode of 2048 to 4000 px at reduced scale", figure, against, reduced_s / full_s, "< 1"


# Text


def make_t5(args, work):
    """Saves a random T5 encoder with the tiny tokenizer, in which each word is one token; returns its directory.

    It is made on the device and in the dtype in which the script encodes.
    """
    import torch
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    from cachetrain.modeling import load

    out, device = work / f"t5_{args.t5}", load.pick_device(args.device)
    if not (out / "model_index.json").exists():
        torch.manual_seed(0)
        tokenizer = T5Tokenizer.from_pretrained(TINY / "t5" / "tokenizer")
        # XXL's own vocabulary is not needed: an embedding is looked up, whatever the number of rows.
        config = T5Config(vocab_size=len(tokenizer), **dict(zip(T5_FIELDS, T5_SIZES[args.t5], strict=True)))
        config.dtype = load.pick_dtype(args.dtype, device)
        with torch.device(device):
            T5EncoderModel._from_config(config).save_pretrained(out / "text_encoder")
        tokenizer.save_pretrained(out / "tokenizer")
        (out / "model_index.json").write_text("{}")
    return out


def make_captions(folder, count):
    """Writes empty images with captions of 5 to 200 tokens (log-uniform, so mostly short); returns the captions."""
    import numpy as np

    words = "a small red circle on the left on a blue background".split()
    lengths = np.exp(np.random.default_rng(0).uniform(np.log(5), np.log(200), count)).astype(int)
    folder.mkdir(parents=True, exist_ok=True)
    captions = []
    for index, length in enumerate(lengths):
        order = np.random.default_rng(index).integers(0, len(words), length - 1)  # the last token is </s>
        captions.append(" ".join(words[word] for word in order))
        (folder / f"{index:05}.jpg").touch()
        (folder / f"{index:05}.txt").write_text(captions[-1])
    return captions


def measure_text(args, work):
    """Yields the rows for speed and for the share of padding."""
    from cachetrain.data.sidecar import read_sidecar

    folder, few = work / f"captions_{args.num_captions}", work / "captions_8"
    make_captions(few, 8)
    captions, model = make_captions(folder, args.num_captions), make_t5(args, work)
    single_s, batches_s, lengths, expected = encode_captions_alone(args, captions, model)
    argv = ["--model", model, "--raw", "--store_dtype", "bf16" if load_dtype(args) == "bfloat16" else "fp32"]
    script_s, steady_s, gib = script_seconds(args, "create_t5cache_768", few, folder, *argv)
    stored = (read_sidecar(folder / f"{index:05}.txt_t5cache")[0]["emb"] for index in range(len(expected)))
    error = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(stored, expected, strict=True))
    label = f"{len(captions)} captions, T5 of {args.t5} size"
    against, wanted = f"one by one {single_s:.1f} s", ">= 3" if steady_s is None else ""
    yield f"{label}, relative error {error:.0e}", f"{script_s:.1f} s", against, single_s / script_s, wanted
    if steady_s is not None:
        label, against = f"{label}, without start-up", f"batches alone {batches_s:.1f} s"
        figure = f"{steady_s:.1f} s, {sum(lengths) / steady_s:.0f} tokens/s"
        yield label, figure, against, steady_s / batches_s, "<= 1.10"
        yield f"{len(captions)} captions: peak memory", f"{gib:.1f} GiB", "", None, ""
    yield measure_padding(lengths)


def load_dtype(args):
    """Returns the name of the dtype in which the scripts compute, such as bfloat16."""
    from cachetrain.modeling import load

    return str(load.pick_dtype(args.dtype, load.pick_device(args.device))).removeprefix("torch.")


def encode_captions_alone(args, captions, model, num_singles=400):
    """Encodes captions one by one, at most `num_singles`, and all in batches that are on the device already.

    Returns:
        (seconds one by one, of all; seconds in batches; number of tokens of each caption; float32 embeddings [T, D]
        of those encoded one by one).
    """
    import torch
    from transformers import T5EncoderModel, T5Tokenizer, logging

    from cachetrain.caching.text_run import length_batches
    from cachetrain.modeling import load

    logging.disable_progress_bar()
    device = load.pick_device(args.device)
    tokenizer = T5Tokenizer.from_pretrained(model / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(model / "text_encoder", dtype=load.pick_dtype(args.dtype, device))
    encoder.eval().to(device)
    ids = [tokenizer(caption, return_tensors="pt").input_ids[0].to(device) for caption in captions]
    lengths, singles = [len(row) for row in ids], ids[:num_singles]
    batches = [torch.nn.utils.rnn.pad_sequence([ids[i] for i in b], True) for b in length_batches(lengths, 32)]

    @torch.no_grad()
    def encode(inputs):
        return [encoder(i, attention_mask=(i != tokenizer.pad_token_id).long()).last_hidden_state for i in inputs]

    @torch.no_grad()
    def time_batches():
        for batch in batches:
            hidden = encode([batch])[0]
        return hidden.float().cpu()  # the host waits for the device

    encode([batches[0], singles[0][None]])  # warm up
    single_s, expected = seconds(lambda: [h[0].float().cpu() for h in encode(row[None] for row in singles)])
    return single_s * len(ids) / len(singles), seconds(time_batches)[0], lengths, expected


def measure_padding(lengths):
    from cachetrain.caching import text_run

    batches = list(text_run.length_batches(lengths, 32))
    computed = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return "tokens computed", str(computed), f"{sum(lengths)} stored", computed / sum(lengths), "<= 1.10"


# Variants


def make_tags(folder, count, num_tags=20):
    """Writes empty images whose captions are tags of two words in random order."""
    import numpy as np

    words = "a small red circle on the left blue background large green star center yellow".split()
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        drawn = np.random.default_rng(index).integers(0, len(words), (num_tags, 2))
        (folder / f"{index:05}.jpg").touch()
        (folder / f"{index:05}.txt").write_text(", ".join(f"{words[a]} {words[b]}" for a, b in drawn))


def measure_variants(args, work):
    """Yields the rows for encoding 4 variants, and for reading them in training."""
    folder, few, model = work / f"tags_{args.num_captions}", work / "tags_8", make_t5(args, work)
    make_tags(folder, args.num_captions)
    make_tags(few, 8)
    argv = ["--model", model, "--raw"]
    one_s, one_steady_s, _ = script_seconds(args, "create_t5cache_768", few, folder, *argv)
    size = sum(path.stat().st_size for path in folder.glob("0*.txt_t5cache"))
    four_s, four_steady_s, _ = script_seconds(args, "create_t5cache_768", few, folder, *argv, "--shuffle_tags", 4)
    four_size = sum(path.stat().st_size for path in folder.glob("0*.txt_t5cache"))
    label, count = f"{args.num_captions} captions, T5 of {args.t5} size, in 4 variants", args.num_captions
    one_s, four_s = one_steady_s or one_s, four_steady_s or four_s
    yield f"{label}: encode", f"{four_s:.1f} s", f"one caption {one_s:.1f} s", four_s / one_s, "<= 4"
    figures = (f"{number / count / 1000:.1f} kB per image" for number in (four_size, size))
    yield f"{label}: size", *figures, four_size / size, "<= 4"
    for name, kind, shapes in (
        ("CLIP", "txt_clipl", {"emb": (77, 768)}),
        ("SDXL", "txt_sdxl", {"emb": (77, 2048), "pooled": (1280,)}),
    ):
        one, four = (visit_ms(work / f"visits_{kind}_{number}", kind, shapes, number) for number in (1, 4))
        yield f"{name}: read one of 4 variants", f"{four:.2f} ms", f"one caption {one:.2f} ms", four / one, ""


def visit_ms(folder, kind, shapes, num_variants, count=100):
    """Writes sidecars of tensors of these shapes, and returns the milliseconds in which a visit reads one."""
    import torch

    from cachetrain.data.sidecar import read_sidecar, write_sidecar
    from cachetrain.modeling.conditioning import Conditioning, variant_name

    folder.mkdir(exist_ok=True)
    conditioning, paths = Conditioning(kind), [folder / f"{index:03}.{kind}" for index in range(count)]
    for path in paths:
        tensors = {
            variant_name(name, variant): torch.randn(shape).bfloat16()
            for name, shape in shapes.items()
            for variant in range(num_variants)
        }
        write_sidecar(path, tensors, {"kind": kind})

    def visit(index, path):
        return conditioning.of_caption(read_sidecar(path)[0], index % num_variants)

    return 1000 / count * min(seconds(lambda: [visit(*item) for item in enumerate(paths)])[0] for _ in range(5))


# Scan


def make_pairs(root, count, per_folder=1000):
    """Writes empty images and captions, with small but valid sidecars that are fresh."""
    import torch

    from cachetrain.data.sidecar import write_sidecar

    done = root / "count.json"
    if done.exists() and json.loads(done.read_text()) == count:
        return
    latent, emb = torch.zeros(4, 8, 8, dtype=torch.float16), torch.zeros(1, 64, dtype=torch.bfloat16)
    shared = {"model": "model", "revision": "", "encoder": "0" * 64, "settings": "{}", "compute_dtype": "float32"}
    shape = {"width": "64", "height": "64", "original_width": "64", "original_height": "64", "crop_box": "0,0,64,64"}
    shape |= {"scaling_factor": "1.0", "shift_factor": "0.0"}
    for index in range(count):
        stem = root / f"{index // per_folder:04}" / f"photograph_{index:08}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        for suffix, kind, tensors, more in (
            (".jpg", "img_sdxl", {"latent": latent}, shape),
            (".txt", "txt_t5cache", {"emb": emb}, {"num_tokens": "1", "truncated": "0"}),
        ):
            source = stem.with_suffix(suffix)
            source.touch()
            stat = os.stat(source)
            fields = {"source_size": str(stat.st_size), "source_mtime_ns": str(stat.st_mtime_ns)}
            metadata = {"kind": kind, **shared, **fields, "source_sha256": "0" * 64, **more}
            write_sidecar(stem.with_suffix(f".{kind}"), tensors, metadata)
    done.write_text(json.dumps(count))


def check(root, suffix):
    """Lists all files and checks their sidecars, as a cache script does before encoding."""
    from cachetrain.caching import selection
    from cachetrain.caching.freshness import image_source
    from cachetrain.caching.summary import RunSummary

    args = Namespace(data_root=[str(root)], cache_suffix=suffix, overwrite=False, full=False)
    wanted = {"kind": "img_sdxl", "encoder": "0" * 64, "settings": "{}"}
    summary = RunSummary("img_sdxl", [root], suffix)
    return selection.select(selection.find_pairs(args, summary), image_source, wanted, args, summary), summary


def index(root, index_files=None):
    """Builds the index, as the trainer does before the first step."""
    from cachetrain.data.index import PairIndex

    return PairIndex([str(root)], ".img_sdxl", ".txt_t5cache", index_files=index_files)


def saved_index(root):
    """Builds the index from an index file, as of --save_index."""
    from cachetrain.data.saved_index import IndexFiles

    return index(root, IndexFiles())


def bytes_per_pair(function, arguments, count):
    """Returns (peak memory during a call, memory of its result), in bytes per pair."""
    tracemalloc.start()
    result = function(*arguments)
    retained, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del result
    return peak / count, retained / count


def measure_scan(args, work):
    from cachetrain.data.saved_index import IndexFiles

    root, count = work / f"pairs_{args.num_pairs}", args.num_pairs
    make_pairs(root, count)
    index(root, IndexFiles(save=True))
    for label, function, arguments, bound_s in (
        ("check, all fresh", check, (root, ".img_sdxl"), 10),
        ("check, all missing", check, (root, ".img_none"), 10),
        ("training index", index, (root,), 10),
        ("training index, saved", saved_index, (root,), 0.5),
    ):
        bound_s *= count / 100_000
        elapsed_s = min(seconds(function, *arguments)[0] for _ in range(3))  # the first one fills the page cache
        peak, retained = bytes_per_pair(function, arguments, count)
        what = f"{count} pairs, {label}"
        yield what, f"{elapsed_s:.3g} s", f"bound {bound_s:.3g} s", elapsed_s / bound_s, "<= 1"
        figure = f"peak {peak:.0f}, retained {retained:.0f} bytes per pair"
        yield f"{what}: memory", figure, "bound 200", peak / 200, "<= 1"


def measure_start(args, work):
    for path in sorted((REPO / "cache").glob("create_*.py")):
        command = [sys.executable, path, "--help"]
        best_s = min(
            seconds(lambda c: subprocess.run(c, check=True, capture_output=True), command)[0] for _ in range(5)
        )
        yield f"{path.name} --help", f"{best_s:.2f} s", "bound 0.5 s", best_s / 0.5, "<= 1"


def main(argv=None):
    args = parse_args(argv)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    measure = (measure_images, measure_draft, measure_text, measure_variants, measure_scan, measure_start)
    measures = dict(zip(PARTS, measure, strict=True))
    print("| what | figure | against | ratio | wanted |\n|---|---|---|---|---|", flush=True)
    for part in args.parts:
        for what, figure, against, ratio, wanted in measures[part](args, work):
            ratio = "" if ratio is None else f"{ratio:.2f}"
            print(f"| {what} | {figure} | {against} | {ratio} | {wanted} |", flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
