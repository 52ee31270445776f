"""The main path of the image cache scripts: scan, check, decode, encode, write, account."""

import json
import signal

from tqdm import tqdm

from cachetrain.caching import images, runner
from cachetrain.caching.freshness import image_source
from cachetrain.modeling import load
from cachetrain.sidecar import sidecar_path


def cache_images(args, kind):
    """Writes one `kind` sidecar beside each image under args.data_root that lacks a fresh one.

    Args:
        args: what `arguments.image_parser` and `check_image_args` give.

    Returns:
        exit code: 0, or 1 if some image failed.
    """
    tally = runner.Tally(kind)
    model_dir = load.resolve_model(
        args.model, args.revision, () if args.vae or args.custom else ("vae",), code=args.custom
    )
    vae_dir = model_dir if args.vae else load.component_dir(model_dir, "vae")
    settings = {"width": args.width, "height": args.height, "flip": args.flip, "dtype": args.dtype or "auto"}
    if args.custom:
        settings["custom"] = True
    fields = {
        "kind": kind,
        **runner.model_fields(args, model_dir),
        "encoder": load.fingerprint(vae_dir, *([model_dir] if args.custom else [])),
        "settings": json.dumps(settings | images.POLICY, sort_keys=True),
    }
    pairs = runner.find_pairs(args, tally)
    paths = [pair.image for pair in runner.select(pairs, image_source, fields, args, tally)]
    if paths:
        with runner.account(tally):
            _encode(args, paths, vae_dir, model_dir, fields, tally)
    return tally.finish()


def _encode(args, paths, vae_dir, model_dir, fields, tally):
    batches = _batches(args, paths)  # first: workers decode while the model loads
    device = load.pick_device(args.device)
    dtype = load.pick_dtype(args.dtype, device)
    if args.custom:
        vae = load.load_custom_pipeline(str(model_dir), dtype=dtype).vae.eval().requires_grad_(False)
    else:
        vae = load.load_vae(vae_dir, dtype)
    vae = vae.to(device)
    fields = {
        **fields,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "scaling_factor": repr(float(getattr(vae.config, "scaling_factor", None) or 1.0)),
        "shift_factor": repr(float(getattr(vae.config, "shift_factor", None) or 0.0)),
    }
    progress = tqdm(total=len(paths), desc=fields["kind"], unit="image", disable=None)
    with progress, runner.Writer(tally, progress) as writer:
        for pixels, decoded, failures in batches:
            for path, reason in failures:
                tally.fail(path, reason)
                progress.update()
            if decoded:
                latents = _latents(vae, pixels.to(device), dtype, args.flip)
                writer.submit(_rows(latents, decoded, fields, args.cache_suffix))


def _batches(args, paths):
    """Starts the worker processes and returns an iterator over their collated batches."""
    from torch.utils.data import DataLoader

    num_workers = min(args.num_workers, -(-len(paths) // args.batch_size))
    loader = DataLoader(
        images.ImageFiles(paths, args.width, args.height),
        batch_size=args.batch_size,
        num_workers=num_workers,
        collate_fn=images.collate,
        worker_init_fn=_ignore_interrupt,
    )
    return iter(loader)


def _ignore_interrupt(_):
    """Ctrl-C reaches every process of a terminal; the main one stops the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _latents(vae, pixels, dtype, flip):
    """Returns name -> latents [B, C, h, w] on the VAE's device; the host does not wait for them."""
    from cachetrain.caching.encoders import encode_images, to_model_range

    inputs = to_model_range(pixels, dtype)
    latents = {"latent": encode_images(vae, inputs)}
    if flip:
        latents["latent_flip"] = encode_images(vae, inputs.flip(-1))
    return latents


def _rows(latents, decoded, fields, suffix):
    """Yields the Rows of one batch. Runs on a writer thread, which is where the host waits for the device."""
    from cachetrain.caching.encoders import storage_dtype

    latents = {name: batch.float().cpu() for name, batch in latents.items()}
    for index, (path, image_fields) in enumerate(decoded):
        tensors = {name: storage_dtype(batch[index]) for name, batch in latents.items()}
        yield runner.Row(path, sidecar_path(path, suffix), tensors, fields | image_fields)
