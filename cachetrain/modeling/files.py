"""The files of a model's components: which of them are read, and what they must not contain.

The files that `component_files` lists are loaded, copied, exported and fingerprinted; all others are ignored. Pickles
and a model's code are never among them.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cachetrain import reading

CONFIG = "config.json"
# Code that plain diffusers needs in a pipeline. It is always this project's own, never the model's.
_HERE = Path(__file__).parent
_PROJECTION_CODE = _HERE / "t5_projection.py"
_PIPELINE_CODE = {"StableDiffusionT5Pipeline": _HERE / "t5_pipeline.py"}
TOKENIZER = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
# Components without weights.
_DATA = {"tokenizer": TOKENIZER, "tokenizer_2": TOKENIZER, "feature_extractor": ("preprocessor_config.json",)}
_INDEX = ".index.json"
# Config entries that make transformers or diffusers fetch code, run code of other packages, change the weights, or
# read other files than those of `component_files`.
_CODE = re.compile(
    r"auto_map|custom_pipelines|quantization_config|\w*_implementation\w*"
    r"|configuration_files|transformers_weights|fast_tokenizer_files"
)
_BUILT_IN = (None, "eager", "sdpa")
_MAX_LAYERS = 1000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_config(directory: str | Path) -> dict:
    """Returns the config.json of a component.

    Raises:
        ValueError: it does not exist, is not a JSON object, or names code to run.
    """
    path = Path(directory) / CONFIG
    config = read_json(path)
    _refuse_code(path, config)
    _refuse_endless(path, config)
    return config


def read_json(path: Path) -> dict:
    """Reads a file of a model that holds one JSON object.

    Raises:
        ValueError: it does not exist, or is not a JSON object.
        OSError: it cannot be read.
    """
    try:
        return reading.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file; pass a directory that contains this component") from None
    except ValueError as error:
        raise ValueError(f"{error}; get the file again") from None


def _refuse_endless(path, config):
    """Refuses numbers of layers that take for ever to make."""
    for key, value in config.items():
        for number in value if isinstance(value, list) else [value]:
            if "layers" in key and isinstance(number, int) and number > _MAX_LAYERS:
                raise ValueError(f"{path}: {key} is {value!r:.40}, expected at most {_MAX_LAYERS}; get it again")


def _refuse_code(path, config):
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_code(path, value)
        if _CODE.fullmatch(key) and value not in _BUILT_IN:
            raise ValueError(
                f"{path}: {key!r} is {value!r}, which would run code that is not part of this project or of the "
                "libraries it needs, or read files that are not checked; if the model works without this entry, "
                "delete the entry"
            )


def weight_files(directory: str | Path) -> list[Path]:
    """Returns the files with a component's weights: one safetensors file, or an index followed by its shards.

    Raises:
        ValueError: there are none, or the index names a file that does not exist, is not a safetensors file or lies
            elsewhere. For weights in files of another kind, the message contains the command that converts them.
    """
    directory = Path(directory)
    stem = "diffusion_pytorch_model" if "_class_name" in read_config(directory) else "model"
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors{_INDEX}"
    _check_regular(directory)
    if single.exists() and index.exists():  # the libraries differ in which they prefer
        raise ValueError(f"{directory}: contains both {single.name} and {index.name}; remove the outdated one")
    if index.exists():
        return [index, *_shards(index)]
    if not single.exists():
        raise ValueError(f"{directory}: contains no {single.name}; {_advice(directory)}")
    return [single]


def has_weights(directory: str | Path) -> bool:
    """Whether a directory contains any weights, in files of whatever kind."""
    return any(any(Path(directory).glob(kind)) for kind in ("*.safetensors*", *_PICKLES))


def _shards(index):
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: is not an index of safetensors files ({error!r}); get the file again") from None
    for name in names:
        if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)):
            raise ValueError(f"{index}: names {name!r}, which is not a safetensors file in the same directory")
        if not (index.parent / name).exists():
            raise ValueError(f"{index}: names {name}, which does not exist; get the file again")
    return [index.parent / name for name in names]


def _advice(directory):
    """What to do about a component without the safetensors files that are read."""
    pickles = [path.name for kind in _PICKLES for path in sorted(directory.glob(kind))]
    variants = sorted(path.name for path in directory.glob("*.fp16*"))
    if variants:
        found, argument = f"only the variant {variants[0]}", 'variant="fp16"'
    elif pickles:
        found, argument = f"only {pickles[0]}, a pickle, and pickles are never read", "use_safetensors=False"
    else:
        text = "pass a model with safetensors weights (a Hugging Face model's .bin files are not downloaded)"
        if read_config(directory).get("_class_name") == "UNet2DConditionModel":
            text += "; to start from new random weights, use --fresh_unet of models/compose_*.py, or --reinit_unet"
        return text
    return f"it contains {found}; to convert it, run: {_conversion(directory, argument)}"


def _conversion(directory, argument):
    """The command that loads the weights with this argument of from_pretrained and saves them as safetensors."""
    config = read_config(directory)
    library, name = "diffusers", config.get("_class_name")
    if name is None:
        library, name = "transformers", "T5EncoderModel" if config.get("model_type") == "t5" else "CLIPTextModel"
        if "CLIPTextModelWithProjection" in config.get("architectures", ()):  # SDXL's second text encoder
            name = "CLIPTextModelWithProjection"
    elif name == "T5Projection":
        library = "cachetrain.modeling.t5_projection"
    where = str(directory)
    code = f"from {library} import {name} as M; M.from_pretrained({where!r}, {argument}).save_pretrained({where!r})"
    return f"python -c {shlex.quote(code)}"


def component_files(directory: str | Path, name: str) -> list[Path]:
    """Returns the files that are read of a component, sorted by name.

    Args:
        directory: of the component. In a bare model, it may contain the files of other components, too.
        name: of the component in a pipeline, like "unet" or "tokenizer".

    Raises:
        ValueError: there are none, or those of `weight_files`.
    """
    directory = Path(directory)
    if name in _DATA:
        _check_regular(directory)
        files = [path for name in _DATA[name] if (path := directory / name).exists()]
        if not files:
            raise ValueError(f"{directory}: contains none of {', '.join(_DATA[name])}; pass a model with a {name}")
        for path in files:
            if path.name.endswith("_config.json"):
                _refuse_code(path, read_json(path))
    else:
        files = [directory / CONFIG, *weight_files(directory)]
        files += [_PROJECTION_CODE] if name == "projection" else []
    return sorted(files, key=lambda path: path.name)


@contextmanager
def only_files(files: Iterable[Path]) -> Iterator[Path]:
    """Yields a temporary directory with links to `files` and nothing else.

    from_pretrained also reads files that it finds beside them, or that a config names: adapters, older versions.
    """
    with tempfile.TemporaryDirectory(prefix="cachetrain-") as directory:
        for path in files:
            os.symlink(os.path.abspath(path), os.path.join(directory, path.name))
        yield Path(directory)


def _check_regular(directory):
    """Checks what libraries are going to open: of a pipe they would wait for the other end."""
    for path in directory.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path}: is a pipe, socket or device; get the file again")


def pipeline_code(model_dir: str | Path) -> Path | None:
    """Returns the file of this project that a pipeline needs as its pipeline.py; None if it needs none of ours."""
    path = Path(model_dir) / "model_index.json"
    name = read_json(path).get("_class_name") if path.exists() else None
    return _PIPELINE_CODE.get(name[-1]) if isinstance(name, list) and name else None
