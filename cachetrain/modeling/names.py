"""How users name a model: a directory or a Hugging Face model id, or a component of one, `name:subfolder`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

# What is read of a model.
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
CONFIG_PATTERNS = ("*.json", "*.txt", "*.model")


def split_subfolder(model: str | Path) -> tuple[str, str]:
    """Returns (directory or model id, subfolder or "") of `name:subfolder`; a directory whose name has a colon wins.

    Raises:
        ValueError: the subfolder is empty or lies elsewhere.
    """
    text = str(model)
    name, colon, subfolder = text.rpartition(":")
    if not colon or Path(text).expanduser().is_dir():
        return text, ""
    path = PurePosixPath(subfolder)
    if not (name and path.parts) or path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{text}: no such directory; a component is written as owner/name:subfolder or directory:subfolder"
        )
    return name, path.as_posix()


def is_local(model: str | Path) -> bool:
    """Whether a model is a directory, or a component of one, rather than a Hugging Face model id."""
    return Path(split_subfolder(model)[0]).expanduser().is_dir()


def tokenizer_beside(encoder: str) -> str:
    """The name of the folder with the tokenizer of a text encoder: "tokenizer_2" for "text_encoder_2"."""
    return encoder.replace("text_encoder", "tokenizer")


def download_patterns(subfolder: str, components: Sequence[str], code: bool) -> list[str]:
    """Returns the patterns of the files to download of a Hugging Face repository.

    Args:
        subfolder: to look in; "" for the root.
        components: folders with components; () for all.
        code: also Python files.
    """
    configs = [*CONFIG_PATTERNS, *(["*.py"] if code else [])]
    kinds = [*WEIGHT_PATTERNS, *configs]
    patterns = [f"{folder}/{kind}" for folder in components or ("*",) for kind in kinds]
    # The files of a bare component are at the root of the repository. Pipelines keep single-file copies of all
    # weights there, under other names, which must not be downloaded.
    patterns += ["model*.safetensors*", "diffusion_pytorch_model*.safetensors*", *configs]
    if not subfolder:
        return patterns
    path = PurePosixPath(subfolder)
    tokenizer = path.with_name(tokenizer_beside(path.name))
    return [f"{subfolder}/{pattern}" for pattern in patterns] + [f"{tokenizer}/{kind}" for kind in configs]
