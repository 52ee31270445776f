"""What the tests of the cache scripts share: tiny pipelines, small pictures, tars of them, and shard sets."""

import io
import json
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


# Tars of samples, and shard sets made from them


SHARD_SIZE = ("--target_width", 64, "--target_height", 64, "--num_workers", 0, "--batch_size", 4)


def shard_command(half, model, data, out, *flags):
    """Script and arguments that make the image or the text half of a set, or with out=None sidecars."""
    script, more = ("cache/create_img_sdxl.py", SHARD_SIZE) if half == "img" else ("cache/create_t5cache_768.py", ())
    to = ("--out", out) if out else ()
    return list(map(str, (script, "--model", model, "--data_root", data, *to, *more, *flags)))


def pack_tar(path, members):
    """Writes a tar of (name, bytes), given as a dict or as pairs."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1700000000
            tar.addfile(info, io.BytesIO(data))


def make_tars(root):
    """Three tars as img2dataset writes them, of 5 images each, in a folder; returns it."""
    for number in range(3):
        members = {}
        for i in range(5):
            key = f"{number:05d}{i:04d}"
            save_pictures(root / "pictures", [f"{key}.jpg"], (72 + 8 * i, 64 + number))
            members[f"{key}.jpg"] = (root / "pictures" / f"{key}.jpg").read_bytes()
            members[f"{key}.json"] = json.dumps({"key": key, "caption": f"from json {i}"}).encode()
            if (number, i) != (1, 3):
                members[f"{key}.txt"] = f"picture {i} of {number}".encode()
        pack_tar(root / f"{number:05d}.tar", members)
    shutil.rmtree(root / "pictures")
    return root


def damage_tars(tars, root):
    """Copies those of `make_tars`: an image is none, a caption is no text, one is missing, and one tar is cut off."""
    shutil.copytree(tars, root)
    with tarfile.open(root / "00001.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    members["000010000.jpg"] = b"no image"
    members["000010001.txt"] = b"caf\xe9"
    members["000010003.json"] = b"{}"
    pack_tar(root / "00001.tar", members)
    (root / "00002.tar").write_bytes((root / "00002.tar").read_bytes()[:5000])
    return root


def files(root):
    """{name: bytes} of all files in a shard set."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.*"))}
