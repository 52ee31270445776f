"""What the tests of the cache scripts share: tiny pipelines, small pictures, and a way to run a script."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
from helpers import TINY
from PIL import Image

# A pipeline as model repositories bring along: its code leaves a trace when it is executed.
CUSTOM_PIPELINE = """
from pathlib import Path
import torch
from diffusers import DiffusionPipeline

Path({canary!r}).write_text("the repository's code ran")

class FixturePipeline(DiffusionPipeline):
    def __init__(self, vae, text_encoder, tokenizer):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)

    def encode_prompt(self, prompt, device, do_classifier_free_guidance=True):
        assert not do_classifier_free_guidance
        tokens = self.tokenizer(prompt, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
        hidden = self.text_encoder(tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device))
        return 2 * hidden.last_hidden_state, None
"""


def make_pipeline(directory, flavour):
    """A pipeline directory from the embedded default: flavour "clip" or "t5" (with a random projection 64 -> 48)."""
    import torch

    from cachetrain.modeling.t5_projection import T5Projection

    shutil.copytree(TINY / flavour, directory)
    shutil.copytree(TINY / "vae", directory / "vae")
    (directory / "model_index.json").write_text("{}")
    if flavour == "t5":
        torch.manual_seed(0)
        T5Projection(64, 48, scaling_factor=0.5).save_pretrained(directory / "projection")
    return directory


def make_custom_pipeline(directory, canary):
    """A t5 pipeline directory with its own pipeline.py, which writes the file `canary` when it runs."""
    make_pipeline(directory, "t5")
    shutil.rmtree(directory / "projection")
    (directory / "pipeline.py").write_text(CUSTOM_PIPELINE.format(canary=str(canary)))
    (directory / "model_index.json").write_text(
        """{"_class_name": ["pipeline", "FixturePipeline"], "_diffusers_version": "0.36.0",
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"]}"""
    )
    return directory


def picture(width, height, seed=0):
    """A smooth random RGB image, as photographs are: uint8 array [height, width, 3]."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def save_pictures(folder, names, size=(72, 64)):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(*size, seed)).save(folder / name)


def sidecars(root, suffix):
    """Name (relative to root, without suffix) -> (inode, mtime): what changes whenever a file is written."""
    paths = sorted(Path(root).rglob(f"*{suffix}"))
    return {
        str(path.relative_to(root)).removesuffix(suffix): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in paths
    }


def changed(before, after):
    """Names whose file was written between two calls of `sidecars`."""
    return sorted(name for name in after if before.get(name) != after[name])


def touch(path):
    """Gives a file another modification time and leaves its content."""
    stat = os.stat(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))


def waiting_at(path, folder):
    """Environment in which whoever reads the image `path` first waits at the other end of the pipe folder/pipe."""
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "sitecustomize.py").write_text(
        "import cachetrain.reading as files\n"
        "original = files.open_regular\n"
        "def open_regular(path, *mode):\n"
        f"    if str(path) == {str(path)!r}:\n"
        f"        open({str(folder / 'pipe')!r}).read()\n"
        "    return original(path, *mode)\n"
        "files.open_regular = open_regular\n"
    )
    return os.environ | {"PYTHONPATH": str(folder)}


def pack_tar(path, members):
    """Writes a tar of (name, bytes), given as a dict or as pairs."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1700000000
            tar.addfile(info, io.BytesIO(data))
