"""What several test files need: arguments of a script, running it, reading what it left, cached samples, drawing."""

import functools
import hashlib
import importlib.util
import json
import os
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

REPO = Path(__file__).resolve().parent.parent
TINY = REPO / "models" / "tiny"
# All scripts by their paths in the repository, those of benchmarks apart.
SCRIPTS, BENCHMARKS = (
    sorted(path.relative_to(REPO).as_posix() for folder in folders for path in (REPO / folder).glob("*.py"))
    for folders in ((".", "cache", "models", "dataset_scripts"), ("benchmarks",))
)
# Suffixes of the image and text caches of both flavours.
T5, CLIP = (".img_sdxl", ".txt_t5cache"), (".img_sdxl", ".txt_clipl")
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name
# Of a cache script: latents wider than those of the fixture `shapes`.
WIDE = ("--target_width", 96, "--target_height", 64, "--num_workers", 0)
# Groups of tags that cost little; all fifteen take as long as training.
BRIEF_LOG, FULL_LOG = ("1", "2", "3", "4"), ("--log_groups", *range(1, 16))
HANG_S = 600  # a test that waits for longer hangs; so long that no loaded machine gets there


# Scripts


@functools.cache
def load_script(relative):
    """Imports a script by its path in the repository ("cache/create_clipl.py"), once; scripts are not a package."""
    path = REPO / relative
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look up annotations
    spec.loader.exec_module(module)
    if relative == "train_from_cached.py":
        count_and_estimate_once()
    return module


def count_and_estimate_once():
    """From here on the FLOPs of each UNet config are counted once, not in each run and each forked process, where it
    takes half a second; the same for the memory that a step takes, whatever the length of its captions."""
    from cachetrain.training import memory
    from cachetrain.training.logs import run_logs

    count, run_step = run_logs.forward_flops, memory.MemoryModel._run_step

    def forward_flops(unet, latent_shape, example):
        return _remembered([unet.config, latent_shape, *example.args], lambda: count(unet, latent_shape, example))

    def once(self, setup):
        same = setup._replace(optimizer="", ema=False, offload=False)
        trained = [(parameter.numel(), parameter.requires_grad) for parameter in self.unet.parameters()]
        return _remembered([self.unet.config, self.latent_shape, same, trained], lambda: run_step(self, setup))

    run_logs.forward_flops, memory.MemoryModel._run_step = forward_flops, once


def _remembered(key, compute):
    """compute(), an int, or what it was before, in this process or in another that these tests have started."""
    name = hashlib.sha256(json.dumps(key, default=str, sort_keys=True).encode()).hexdigest()
    path = Path(os.environ["CACHETRAIN_TEST_NUMBERS"], name)
    if not path.exists():
        part = path.with_name(f"{name}.{os.getpid()}")
        part.write_text(str(compute()))
        part.rename(path)
    return int(path.read_text())


def run_script(relative, *argv):
    """Runs a script's main in this process with `argv`, of anything that has a str(); returns its exit code."""
    return load_script(relative).main(list(map(str, argv)))


def trainer_argv(data, model, out, *flags, suffixes=T5):
    """Arguments of a small run on the CPU, list of str; `flags` come last and win.

    Args:
        data: directory of caches, or a list of them.
        out: output_dir. TensorBoard's files go to "tb" beside it.
    """
    directories = data if isinstance(data, list | tuple) else [data]
    argv = ["--train_data_dir", *directories, "--model", model, "--output_dir", out, "--logdir", out.parent / "tb"]
    argv += ["--imgcache_suffix", suffixes[0], "--txtcache_suffix", suffixes[1], "--precision", "fp32"]
    argv += ["--num_workers", 0, "--log_step", 1, "--device", "cpu", "--log_groups", *BRIEF_LOG]
    return list(map(str, [*argv, *flags]))


def train(data, model, out, *flags, suffixes=T5):
    """Runs the trainer in this process on `trainer_argv`; returns (metrics lines, final UNet weights)."""
    argv = trainer_argv(data, model, out, *flags, suffixes=suffixes)
    assert run_script("train_from_cached.py", *argv) == 0
    steps = int(argv[-argv[::-1].index("--max_steps")])  # what follows the last one
    return json_lines(out / "metrics.jsonl"), weights_of(out / f"checkpoint-{steps:06d}" / "unet")


def refused(data, model, out, *flags, suffixes=T5):
    """The message with which the trainer refuses to start."""
    try:
        train(data, model, out, "--max_steps", 1, "--batch_size", 2, *flags, suffixes=suffixes)
    except ValueError as error:
        return str(error)
    raise AssertionError("it was not refused")


def wait_until(condition, alive=lambda: True):
    """Returns the first true value of condition(), which comes while alive() is true."""
    deadline_s = time.monotonic() + HANG_S
    while not (value := condition()):
        assert alive(), "it has ended"
        assert time.monotonic() < deadline_s, "it hangs"
        time.sleep(0.002)
    return value


# What they left


def json_lines(path):
    """The values in the lines of a file; NaN and Infinity, which are not JSON, are refused."""

    def constant(name):
        raise AssertionError(f"{path}: {name} is not JSON")

    return [json.loads(line, parse_constant=constant) for line in path.read_text().splitlines()]


def weights_of(folder):
    """{name: tensor} of a model that diffusers has saved."""
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS)


@contextmanager
def fake_s3():
    """Yields the address of an empty bucket of a fake S3, which the environment names."""
    import pytest
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    # What an earlier server of this process holds would be in the bucket.
    for path, method in (("moto-api/reset", "POST"), ("bucket", "PUT")):
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{path}", method=method))
    names = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (names | {"AWS_REGION": "us-east-1"}).items():
            patch.setenv(name, value)
        yield "s3://bucket"
    server.stop()


def digest(tensors):
    """A hash of {name: tensor}."""
    import torch

    parts = hashlib.sha256()
    for name in sorted(tensors):
        data = tensors[name].detach().contiguous().view(-1).view(torch.uint8)
        parts.update(name.encode() + data.numpy().tobytes())
    return parts.hexdigest()


def distance(weights, expected, start):
    """How far two trained UNets are apart, as a share of how far training moved them.

    Adam divides by the gradient's size, so that single elements with gradients near 0 amplify rounding; the whole
    does not.
    """
    apart = sum((weights[name] - tensor).square().sum() for name, tensor in expected.items())
    moved = sum((start[name] - tensor).square().sum() for name, tensor in expected.items())
    return (apart / moved).sqrt().item()


def read_events(log_dir):
    """TensorBoard's reader of an event directory, which has read all of every kind."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kinds = ("images", "scalars", "histograms", "tensors")
    return EventAccumulator(str(log_dir), size_guidance=dict.fromkeys(kinds, 0)).Reload()


def without_headers(source, folder):
    """Copies T5 caches without their metadata, as other programs write them; returns the folder."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(exist_ok=True)
    for path in source.glob("*.*"):
        if path.suffix in T5:
            save_file(load_file(path), folder / path.name)
    return folder


# Parts of a run


def open_pairs(index, scale=1.0, shift=0.0, null=None, dtype=None, sidecars=None, masked=False, **draws):
    """CachedPairs of an index.

    Args:
        null: text embedding [T, D] that takes a dropped caption's place.
        dtype: of the conditions, float32 when None.
        masked: whether samples have masks.
        draws: fields of Draws.
    """
    import torch

    from cachetrain.data.dataset import CachedPairs, Draws, LatentScaling
    from cachetrain.modeling.conditioning import Conditioning

    conditioning = Conditioning(index.text_kind, dtype=dtype or torch.float32)
    null = None if null is None else {"emb": null}
    scaling = LatentScaling(scale, shift)
    return CachedPairs(index, scaling, conditioning, Draws(**draws), null, sidecars, masked=masked)


def render(unet, vae, sampler, embeddings, null, cfg, seeds, steps, kind, batch_size=16):
    """Draws one 8 x 8 latent per embedding [T, D] with the path that all scripts use; returns PIL images."""
    from cachetrain.modeling.conditioning import Conditioning
    from cachetrain.sampling.render import Drawing, Renderer

    drawings = [
        Drawing("", "", "", seed, (8, 8), {"emb": embedding}, {"emb": null})
        for seed, embedding in zip(seeds, embeddings, strict=True)
    ]
    renderer = Renderer(unet, vae, sampler, Conditioning(kind), steps, batch_size)
    return [image for _, _, image in renderer.draw(drawings, [cfg])]


def where_the_host_may_wait(monkeypatch, allowed):
    """Runs log steps, validations, saves and samples of the trainer in the context that `allowed` makes."""
    from cachetrain.checkpoints.save import Saving
    from cachetrain.sampling.samples import SampleImages
    from cachetrain.training import run
    from cachetrain.training.logs.run_logs import Logs
    from cachetrain.training.validation import Validation

    for owner, name in ((Logs, "write"), (Validation, "measure"), (Saving, "save"), (SampleImages, "draw"),
                        (run, "run_state")):  # fmt: skip
        monkeypatch.setattr(owner, name, _within(allowed, getattr(owner, name)))


def _within(context, function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with context():
            return function(*args, **kwargs)

    return wrapped


def bare_run(**fields):
    """A Run of just these fields; dicts become namespaces."""
    return SimpleNamespace(**{k: SimpleNamespace(**v) if isinstance(v, dict) else v for k, v in fields.items()})


SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
}  # config of a UNet that differs from diffusers' defaults in these


def memory_model(config, kind, widths, tokens, side):
    """MemoryModel of a UNet with this config, trained on captions of `tokens` tokens and latents [4, side, side]."""
    import torch
    from diffusers import UNet2DConditionModel

    from cachetrain.modeling.conditioning import Conditioning
    from cachetrain.training.memory import MemoryModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    conditioning = Conditioning(kind)
    blank = conditioning.blank(widths, tokens)
    return MemoryModel(unet, (4, side, side), lambda batch_size: conditioning.collate([blank] * batch_size))
