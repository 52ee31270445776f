"""The main path of the text cache scripts: scan, check, encode each caption once, write, summarize."""

import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import chain, pairwise

import numpy as np
from tqdm import tqdm

from cachetrain.caching import ranks, selection
from cachetrain.caching.arguments import caption_settings
from cachetrain.caching.assembly import Assembly, Embedded, Texts
from cachetrain.caching.freshness import caption_source
from cachetrain.caching.ray_engine import make_on_ray
from cachetrain.caching.shard_run import Encode, ShardRun, check_out_args
from cachetrain.caching.summary import RunSummary
from cachetrain.caching.unknown_words import unknown_test
from cachetrain.caching.writer import Row, Writer
from cachetrain.data.sidecar import sidecar_path
from cachetrain.data.variants import read_captions
from cachetrain.data.walk import null_pair
from cachetrain.modeling import load

# Captions are read and sorted by length in windows of this many images, and encoded once per window.
_WINDOW = 65536
# Where images have several captions: batches that are encoded before the next images are taken.
_CHUNK = 16

# By load.text_family: (its name in messages, the kind of its caches, the script that makes them).
_FAMILIES = {
    "clip": ("one CLIP encoder", "txt_clipl", "create_clipl.py"),
    "t5": ("T5", "txt_t5cache", "create_t5cache_768.py"),
    "sdxl": ("SDXL's two CLIP encoders", "txt_sdxl", "create_sdxl_text.py"),
}

# Components whose files do not change what the encode_prompt of a repository's own pipeline returns.
_NOT_TEXT = ("unet", "vae", "scheduler", "safety_checker", "feature_extractor", "image_encoder")


def cache_captions(
    args: Namespace, kind: str, settings: dict, make: Callable[[ShardRun, Encode], int] = ShardRun.make
) -> int:
    """Writes a sidecar of this kind beside each image under args.data_root that lacks a fresh one.

    The sidecar of the null caption, one per data root, is made like the others.

    Args:
        args: from `arguments.text_parser`.
        settings: what changes the embeddings of a caption, besides the dtypes: clip_skip, or max_length and raw; for
            SDXL, whether the empty caption is zeros is added. {"custom": True}: encode with the pipeline code in the
            model's repository.
        make: what to do with --out.

    Returns:
        exit code: 0, or 1 if some caption failed.
    """
    summary = RunSummary(kind, args.data_root, args.cache_suffix)
    if args.engine:
        return make_on_ray(partial(cache_captions, kind=kind, settings=settings), args, summary)
    of_captions = caption_settings(args)
    custom = "custom" in settings
    components = () if custom else load.text_components(kind, settings)
    model_dir = load.resolve_model(args.model, args.revision, components, code=custom)
    if kind == "txt_sdxl":
        settings = settings | {"force_zeros_for_empty_prompt": load.zeros_for_empty_prompt(model_dir)}
    dtypes = {"dtype": args.dtype or "auto", "store_dtype": args.store_dtype}
    fields = {
        "kind": kind,
        **selection.model_fields(args, model_dir),
        "encoder": load.fingerprint(
            _custom_files(model_dir) if custom else _encoder_files(model_dir, kind, settings)
        ),
        "settings": json.dumps(settings | dtypes, sort_keys=True),
    }
    make_encoder = (
        partial(_custom_encoder, model_dir)
        if custom
        else partial(_batch_encoder, model_dir, settings, kind, args.batch_size)
    )
    if args.out:
        return make(*_inputs(args, of_captions, make_encoder, fields, summary))
    nulls = map(null_pair, dict.fromkeys(args.data_root))
    candidates = chain(nulls, selection.find_pairs(args, summary, "files" in of_captions.captions))
    source_of = partial(caption_source, settings=of_captions)
    pairs = selection.select(candidates, source_of, fields, args, summary)
    summary.leftovers.unused.warn_of_file_names()
    if pairs:
        with summary.time_encoding():
            _encode(args, pairs, of_captions, make_encoder, fields, summary)
    return summary.finish()


def _custom_files(model_dir):
    folders = (path for path in sorted(model_dir.iterdir()) if path.is_dir() and path.name[0] != ".")
    return load.all_files(model_dir, *(folder for folder in folders if folder.name not in _NOT_TEXT))


def _encoder_files(model_dir, kind, settings):
    found, its_kind, script = _FAMILIES[load.text_family(model_dir)]
    if its_kind != kind:
        expected = next(name for name, of_kind, _ in _FAMILIES.values() if of_kind == kind)
        raise ValueError(
            f"{model_dir}: encodes captions with {found}, expected {expected}; use cache/{script}, or pass another "
            "--model"
        )
    if "projection" in load.text_components(kind, settings) and not (model_dir / "projection").is_dir():
        raise ValueError(
            f"{model_dir}: has no projection/; make it with models/compose_t5_sd.py, or pass --raw to keep T5's own "
            "width, or --custom to run the pipeline code in the model's repository"
        )
    return load.text_files(model_dir, kind, settings)


def _encode(args, pairs, of_captions, make_encoder, fields, summary):
    """Encodes and writes all pairs.

    Args:
        of_captions: CaptionSettings.
        make_encoder: as of `_Encoder`.
    """
    encoder, read = _Encoder(args, make_encoder, fields), partial(read_captions, settings=of_captions)
    progress = tqdm(
        total=len(pairs), desc=fields["kind"], unit=summary.unit, disable=None if ranks.rank() == 0 else True
    )
    with progress, Writer(summary, progress) as writer:
        windows = (_by_captions(window, read, summary, progress) for window in _windows(pairs, of_captions))
        for images_of in summary.time_waiting(windows, progress):
            encoder.write(images_of, writer)


def _inputs(args, of_captions, make_encoder, fields, summary):
    """Makes the null caption of a shard set; returns the ShardRun of its text half and its Encode."""
    check_out_args(args)
    run = ShardRun(args, fields, summary, of_captions.in_header())
    encoder = cache(partial(_Encoder, args, make_encoder, fields))

    def encode(samples, writer):
        read = partial(samples.captions, settings=of_captions)
        encoder().write(_by_captions(samples.pairs, read, summary, writer.progress), writer)

    def encode_null(writer):
        pair = null_pair("")
        captions = read_captions(pair)
        encoder().write({captions.texts: [(pair, captions)]}, writer)

    run.put_null_caption(encode_null)
    return run, encode


class _Encoder:
    """A text encoder, loaded.

    Args:
        make_encoder: function of (device, dtype) that returns a function: captions -> batches, lists of Embedded;
            and the tokenizer.
    """

    def __init__(self, args, make_encoder, fields):
        import torch

        device = load.pick_device(args.device)
        dtype = load.pick_dtype(args.dtype, device)
        self.encode, tokenizer = make_encoder(device, dtype)
        self.is_unknown = unknown_test(tokenizer)
        self.fields = {**fields, "compute_dtype": str(dtype).removeprefix("torch.")}
        self.store_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.store_dtype]
        self.chunk_size = _CHUNK * args.batch_size
        self.suffix = args.cache_suffix

    def write(self, images_of, writer):
        """Encodes the captions of images, as of `_by_captions`, and submits their rows."""
        assembly = Assembly(images_of, self.chunk_size)
        for captions, complete in assembly.chunks():
            writer.submit(_rows(complete, images_of, self.fields, self.store_dtype, self.suffix))
            for batch in self.encode(captions) if captions else ():
                for item in batch:
                    caption = captions[item.index]
                    count = assembly.num_images.pop(caption, 0)
                    writer.summary.unknown_words.add(caption, count, self.is_unknown)
                complete = assembly.add(captions, batch)
                writer.submit(_rows(complete, images_of, self.fields, self.store_dtype, self.suffix))


def _windows(pairs, of_captions):
    """Yields iterables of about _WINDOW pairs each; all images with the same captions are in one of them."""
    count = len(pairs)
    order, bounds = range(count), [0, count]
    if count > _WINDOW:
        # Reads each caption one more time, which costs little compared with encoding it in several windows.
        keys = np.fromiter((_captions_key(pair, of_captions) for pair in pairs), np.int64, count)
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[0]]))  # of runs of equal captions
        bounds = [*np.unique(starts[np.searchsorted(starts, range(0, count, _WINDOW), side="right") - 1]), count]
    for start, end in pairwise(bounds):
        yield (pairs[index] for index in order[start:end])


def _captions_key(pair, of_captions):
    try:
        return hash(read_captions(pair, of_captions).texts)
    except (OSError, ValueError):
        return 0  # reported when its window is read


def _by_captions(pairs, read, summary, progress) -> dict[Texts, list]:
    """Returns captions -> list of (Pair, Captions); captions that read(pair) cannot read are reported."""
    images_of = {}
    for pair in pairs:
        try:
            captions = read(pair)
        except (OSError, ValueError) as error:
            summary.fail(pair.caption_file or pair.image, error)
            progress.update()
        else:
            images_of.setdefault(captions.texts, []).append((pair, captions))
    return images_of


def _batch_encoder(model_dir, settings, kind, batch_size, device, dtype):
    """Returns a function: list of captions -> batches, lists of Embedded; and the tokenizer."""
    from cachetrain.modeling.conditioning import text_kind
    from cachetrain.modeling.text_encoders import open_text_encoder

    encoder, lengths_differ = open_text_encoder(model_dir, kind, settings, device, dtype), text_kind(kind).masked

    def encode(captions):
        ids, truncated = encoder.tokenize(captions)
        # CLIP always computes all of its 77 positions.
        for batch in length_batches([len(row) if lengths_differ else 0 for row in ids], batch_size):
            encoded = encoder.tensors_of([ids[index] for index in batch])
            yield [Embedded(i, one, len(ids[i]), truncated[i]) for i, one in zip(batch, encoded, strict=True)]

    return encode, encoder.tokenizer


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yields lists of indices such that captions of similar length share a batch and little padding is computed.

    The longest come first, so that a batch too big for the memory fails at once. A caption of less than 5/6 of the
    longest in its batch starts a new one.
    """
    batch = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == batch_size or lengths[index] < 5 / 6 * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _custom_encoder(model_dir, device, dtype):
    """Returns the same function as `_batch_encoder`, with the repository's pipeline code, one caption at a time."""
    from cachetrain.caching.encoders import CustomTextEncoder

    encoder = CustomTextEncoder(load.load_custom_pipeline(str(model_dir), dtype=dtype), device)

    def encode(captions):
        for index, caption in enumerate(captions):
            emb, num_tokens, truncated = encoder.encode(caption)
            yield [Embedded(index, {"emb": emb}, num_tokens, truncated)]

    return encode, encoder.pipeline.tokenizer


def _rows(complete: Iterable[tuple[Texts, list[Embedded]]], images_of, fields, store_dtype, suffix):
    """Yields a Row per image of the groups that `Assembly` returns."""
    from cachetrain.modeling.conditioning import variant_name

    for texts, embedded in complete:
        tensors, of_variants = {}, {}
        for variant, item in enumerate(embedded):
            tensors |= {variant_name(name, variant): one.to(store_dtype) for name, one in item.tensors.items()}
            of_variants[variant_name("num_tokens", variant)] = str(item.num_tokens)
            of_variants[variant_name("truncated", variant)] = str(int(item.truncated))
        for pair, captions in images_of[texts]:
            metadata = {**fields, **captions.header_fields(), **of_variants}
            yield Row(pair.image, sidecar_path(pair.image, suffix), tensors, metadata)
