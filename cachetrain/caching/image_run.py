"""The main path of the image cache scripts: scan, check, decode, encode, write, summarize."""

import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial

from tqdm import tqdm

from cachetrain import cli
from cachetrain.caching import images, ranks, selection
from cachetrain.caching.buckets import bucket_sizes
from cachetrain.caching.freshness import image_source
from cachetrain.caching.ray_engine import make_on_ray
from cachetrain.caching.shard_run import Encode, ShardRun, check_out_args
from cachetrain.caching.summary import RunSummary
from cachetrain.caching.writer import Row, Writer
from cachetrain.data.sidecar import numbered, sidecar_path
from cachetrain.log import warn
from cachetrain.modeling import load, normalisation
from cachetrain.modeling.files import component_files, read_config


def cache_images(args: Namespace, kind: str, make: Callable[[ShardRun, Encode], int] = ShardRun.make) -> int:
    """Writes a sidecar of this kind beside each image under args.data_root that lacks a fresh one.

    Args:
        args: from `arguments.image_parser` and `check_image_args`.
        make: what to do with --out.

    Returns:
        exit code: 0, or 1 if some image failed.
    """
    summary = RunSummary(kind, args.data_root, args.cache_suffix, args.mask)
    if args.engine:
        return make_on_ray(partial(cache_images, kind=kind), args, summary)
    components = () if args.vae or args.custom else ("vae",)
    model_dir = load.resolve_model(args.model, args.revision, components, code=args.custom)
    vae_dir = model_dir if args.vae else load.component_dir(model_dir, "vae")
    fields = {
        "kind": kind,
        **selection.model_fields(args, model_dir),
        "encoder": load.fingerprint(
            load.all_files(vae_dir, model_dir) if args.custom else component_files(vae_dir, "vae")
        ),
        "settings": json.dumps(_settings(args), sort_keys=True),
    }
    if args.norm:
        fields |= normalisation.of_file(args.norm, fields["encoder"]).header_fields()
        fields["norm"] = os.path.abspath(args.norm)
    if args.out:
        return make(*_inputs(args, model_dir if args.custom else vae_dir, fields, summary))
    source_of = partial(image_source, masked=args.mask == "files")
    pairs = selection.select(selection.find_pairs(args, summary), source_of, fields, args, summary)
    if pairs:
        with summary.time_encoding():
            _encode(args, pairs, model_dir if args.custom else vae_dir, fields, summary)
    return summary.finish(show_coverage=args.bucket)


def _settings(args):
    """What changes the latents, for the header."""
    settings = {
        "width": args.width,
        "height": args.height,
        "aspect_limit": args.aspect_limit if args.bucket else None,
        "flip": args.flip,
        "store_posterior": args.store_posterior,
        "dtype": args.dtype or "auto",
    }
    further = {"custom": args.custom, "mask": args.mask, "crops": args.crops if args.crops > 1 else None}
    return settings | images.POLICY | {name: value for name, value in further.items() if value}


def _encode(args, pairs, vae_dir, fields, summary):
    sizes = _sizes(args)
    # First: workers decode while the model loads.
    batches = _start_decoding(args, images.ImageFiles(pairs, sizes, args.crops, args.mask))
    encoder = _Encoder(args, vae_dir, sizes, fields)
    progress = tqdm(total=len(pairs), desc=fields["kind"], unit="image", disable=None if ranks.rank() == 0 else True)
    with progress, Writer(summary, progress) as writer:
        encoder.write(batches, writer)


def _inputs(args, vae_dir, fields, summary):
    """The ShardRun of the image half of a shard set, and its Encode."""
    sizes = _sizes(args)
    check_out_args(args)
    encoder = cache(partial(_Encoder, args, vae_dir, sizes, fields))

    def encode(samples, writer):
        encoder().write(_start_decoding(args, images.ImagesOfSamples(samples, sizes, args.crops, args.mask)), writer)

    # The scaling is part of the name of the half. The VAE is loaded for it only if its config does not say it.
    scaling = None if args.custom or args.norm else normalisation.of_config(read_config(vae_dir), vae_dir)
    if scaling:
        fields = fields | scaling.header_fields()
    elif not args.norm:
        fields = encoder().fields
    return ShardRun(args, fields, summary), encode


def _sizes(args):
    """The sizes (width, height) of which each image takes the nearest."""
    return bucket_sizes(args.width, args.aspect_limit) if args.bucket else [(args.width, args.height)]


class _Encoder:
    """A VAE, loaded.

    Attributes:
        fields: of the headers of all sidecars.
    """

    def __init__(self, args, vae_dir, sizes, fields):
        self.args = args
        self.vae_dir = vae_dir
        self.vae, self.dtype = _load_vae(args, vae_dir, sizes)
        self.fields = {
            **fields,
            "compute_dtype": str(self.dtype).removeprefix("torch."),
            **({} if args.norm else _scaling_fields(self.vae)),
        }
        self.scaling = normalisation.of_header(self.fields, args.norm or vae_dir)

    def write(self, batches, writer):
        """Encodes collated batches, submits their rows, and reports images that failed."""
        summary, progress = writer.summary, writer.progress
        for pixels, decoded, failures in summary.time_waiting(_of_one_size(batches, self.args.batch_size), progress):
            for path, reason in failures:
                summary.fail(path, reason)
                progress.update()
            if decoded:
                summary.check_sizes(decoded)
                with load.named(self.vae_dir):
                    latents = _latents(self.vae, pixels.to(self.vae.device), self.dtype, self.args)
                if self.scaling:
                    self.scaling.check_channels(latents["latent"].shape[1], self.args.norm or self.vae_dir)
                writer.submit(_rows(latents, decoded, self.fields, self.args.cache_suffix))


def _scaling_fields(vae):
    """Header fields of the VAE's LatentScaling; without one, training needs it from the user."""
    if scaling := normalisation.of_vae(vae):
        return scaling.header_fields()
    warn(
        f"{type(vae).__name__}: its config says neither scaling_factor nor latents_std, without which nothing can be "
        f"trained on its latents; when they are cached, {normalisation.HOW_TO_SAY}"
    )
    return {}


def _load_vae(args, vae_dir, sizes):
    """Loads the VAE of a directory, or with --custom that of the pipeline in it; returns (VAE, compute dtype)."""
    from cachetrain.caching.encoders import check_vae

    device = load.pick_device(args.device)
    dtype = load.pick_dtype(args.dtype, device)
    if args.custom:
        vae = load.load_custom_pipeline(str(vae_dir), dtype=dtype).vae.eval().requires_grad_(False)
    else:
        vae = load.load_vae(vae_dir, dtype)
    check_vae(vae, sizes)
    return vae.to(device), dtype


def _start_decoding(args, files):
    """Starts the processes that decode these ImageFiles, and returns an iterator over their collated batches."""
    from torch.utils.data import DataLoader

    from cachetrain.data.loader import batches_of

    num_workers = max(1, min(8, cli.cores_of_this_rank() - 1)) if args.num_workers is None else args.num_workers
    num_workers = min(num_workers, -(-len(files) // args.batch_size))
    loader = DataLoader(
        files,
        batch_size=args.batch_size,
        num_workers=num_workers,
        collate_fn=images.collate,
        worker_init_fn=_init_worker,
    )
    with _signals_deferred():
        return batches_of(loader)


@contextmanager
def _signals_deferred():
    """Holds signals back while processes start: what a handler raises there may get lost, or end a worker noisily."""
    received = []
    handlers = {n: signal.signal(n, lambda n, _: received.append(n)) for n in cli.STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


def _of_one_size(batches, batch_size):
    """Regroups collated batches of mixed sizes into full ones of one size each; the last of a size may be smaller.

    Yields:
        (uint8 tensor [B, crops, height, width, channels] or None, list of B (path, header fields), list of
         (path, reason)).
    """
    import torch

    waiting = {}
    for groups, failures in batches:
        if failures:
            yield None, [], failures
        for array, rows in groups:
            pixels = torch.from_numpy(array)
            if len(rows) == batch_size:
                yield pixels, rows, []
                continue
            queue = waiting.setdefault(pixels.shape[1:], [])
            # Copies: one image of a group must not keep the memory of all of the group.
            queue += zip(pixels.clone(), rows, strict=True)
            if len(queue) >= batch_size:
                full, waiting[pixels.shape[1:]] = queue[:batch_size], queue[batch_size:]
                yield torch.stack([image for image, _ in full]), [row for _, row in full], []
    for queue in filter(None, waiting.values()):
        yield torch.stack([image for image, _ in queue]), [row for _, row in queue], []


def _init_worker(_):
    """Makes a worker process end without a message: a terminal's Ctrl-C reaches all processes, and the main process
    reports it. A batch that cannot be sent ends it, too."""
    from cachetrain.data.loader import never_wait_in_vain

    never_wait_in_vain()
    for number in cli.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the main process stops the workers
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # a death by signal would be an error to the main process
    sys.excepthook = lambda *_: None  # of the thread that hands over pixels, when the main process is gone


def _latents(vae, pixels, dtype, args):
    """Returns name -> latents [B, C, h, w] on the VAE's device; the host does not wait for them.

    Args:
        pixels: uint8 [B, crops, height, width, channels]; one crop of each image is encoded at a time.
    """
    latents = {}
    for number in range(pixels.shape[1]):
        of_crop = _latents_of_crop(vae, pixels[:, number], dtype, args)
        latents |= {numbered(name, number): batch for name, batch in of_crop.items()}
    return latents


def _latents_of_crop(vae, pixels, dtype, args):
    from cachetrain.caching.encoders import encode_images, encode_posterior, latent_masks, to_model_range

    inputs = to_model_range(pixels[..., :3], dtype)
    mean, logvar = encode_posterior(vae, inputs)
    latents = {"latent": mean}
    if args.flip:
        latents["latent_flip"] = encode_images(vae, inputs.flip(-1))
    if args.store_posterior:
        if logvar is None:
            raise ValueError(f"{type(vae).__name__} has no posterior; run without --store_posterior")
        latents["logvar"] = logvar
    if args.mask:
        latents["mask"] = latent_masks(pixels[..., 3], mean.shape[-2:])
    return latents


def _rows(latents, decoded, fields, suffix):
    """Yields the Rows of one batch. Runs on a writer thread, which is where the host waits for the device."""
    from cachetrain.caching.encoders import storage_dtype

    latents = {name: batch.float().cpu() for name, batch in latents.items()}
    for index, (path, image_fields) in enumerate(decoded):
        tensors = {name: storage_dtype(batch[index]) for name, batch in latents.items()}
        yield Row(path, sidecar_path(path, suffix), *_without_white_masks(tensors, fields | image_fields))


def _without_white_masks(tensors, metadata):
    """(tensors, header fields): without masks if they leave nothing out, else with their mean in the header."""
    masks = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] == "mask"}
    if all(mask.min() == 1 for mask in masks.values()):
        return {name: tensor for name, tensor in tensors.items() if name not in masks}, metadata
    share = sum(float(mask.float().mean()) for mask in masks.values()) / len(masks)
    return tensors, metadata | {"mask_share": f"{share:.4f}"}
