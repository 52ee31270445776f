"""What several test files need: running a script, opening cached samples, drawing, a Run without its trainer."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

REPO = Path(__file__).resolve().parent.parent
TINY = REPO / "models" / "tiny"
# Suffixes of the image and text caches of both flavours, and their kinds.
T5, CLIP = (".img_sdxl", ".txt_t5cache"), (".img_sdxl", ".txt_clipl")
KINDS = {".txt_t5cache": "txt_t5cache", ".txt_clipl": "txt_clipl"}


def load_script(relative):
    """Imports a script by its path in the repository ("cache/create_clipl.py"); scripts are not a package."""
    path = REPO / relative
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(relative, *argv):
    """Runs a script's main in this process with `argv`, of anything that has a str(); returns its exit code."""
    return load_script(relative).main(list(map(str, argv)))


def open_pairs(index, scale=1.0, shift=0.0, null=None, dtype=None, sidecars=None, **draws):
    """CachedPairs of an index.

    Args:
        null: text embedding [T, D] that takes a dropped caption's place.
        dtype: of the conditions, float32 when None.
        draws: fields of Draws.
    """
    import torch

    from cachetrain.data.dataset import CachedPairs, Draws, LatentScaling
    from cachetrain.modeling.conditioning import Conditioning

    conditioning = Conditioning(index.text_kind, dtype=dtype or torch.float32)
    null = None if null is None else {"emb": null}
    return CachedPairs(index, LatentScaling(scale, shift), conditioning, Draws(**draws), null, sidecars)


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


def bare_run(**fields):
    """A Run of just these fields; dicts become namespaces."""
    return SimpleNamespace(**{k: SimpleNamespace(**v) if isinstance(v, dict) else v for k, v in fields.items()})
