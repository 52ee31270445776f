#!/usr/bin/env python3
"""Checks an image cache against its images: decodes latents and measures how far they are from the sources (PSNR).

    cache/validate_img_cache.py --model models/t5_sd15 --data_root photos --num_images 200 --min_psnr 25

Each source is resized and cropped again as its sidecar's header says (a foreign sidecar has no header: then to the
size it decodes to). A wrong VAE, a shifted crop, a rotation or the latent of another image show as low PSNR; what is
normal depends on VAE and images, which `cache/validate_vae.py` tells. The exit code is 1 if some image is below
--min_psnr or could not be compared (each is named), 2 on any other error.
"""

try:
    import os

    from cachetrain import cli
    from cachetrain.caching import arguments
    from cachetrain.caching.inspect import previews
    from cachetrain.data import many_files, scan
    from cachetrain.data.sidecar import sidecar_path
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None

_NUM_WORST = 10
_SHEET_SIDE = 512


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    previews.add_vae_arguments(parser)
    parser.add_argument("--data_root", action="append", required=True, metavar="DIR",
                        help="folder of images with sidecars, sub-folders included; may be given again")  # fmt: skip
    parser.add_argument("--cache_suffix", metavar="SUFFIX",
                        help=f"of the sidecars; default: {' and '.join(previews.IMAGE_SUFFIXES)}")  # fmt: skip
    arguments.add_choice_arguments(parser, 100)
    parser.add_argument("--min_psnr", type=float, metavar="DB", help="an image below this makes the exit code 1")
    parser.add_argument("--sheet", type=previews.png_file, metavar="FILE",
                        help=f"PNG that shows the {_NUM_WORST} worst: source, decoded, difference")  # fmt: skip
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    from tqdm import tqdm

    from cachetrain.sampling.render import save_png

    fail = previews.Failures()
    cached = find_cached(args, fail)
    chosen = dict(many_files.random_subset(cached, args.num_images, args.seed))
    measured, stale, worst = [], [], []
    compared = comparisons(previews.Decoder(args, fail), chosen, stale)
    for comparison in tqdm(compared, total=len(chosen), desc="comparing", unit="image", disable=None):
        measured.append((comparison.psnr, comparison.name))
        worst = sorted([*worst, comparison], key=lambda one: one.psnr)[:_NUM_WORST]
    num_low = report(sorted(measured), stale, args.min_psnr)
    statistics = previews.statistics([value for value, _ in measured])
    print(f"{statistics} of {len(cached)} cached, {len(stale)} stale, {fail.count} failed")
    if args.sheet and worst:
        save_png(previews.comparison_sheet(worst, _SHEET_SIDE), args.sheet, model=args.model)
        print(args.sheet)
    return 1 if num_low or fail.count or not measured else 0


def find_cached(args, fail):
    """Returns a list of (sidecar, its image)."""
    suffixes = [args.cache_suffix] if args.cache_suffix else previews.IMAGE_SUFFIXES
    candidates = (
        (str(sidecar_path(pair.image, suffix)), pair.image)
        for pair in scan.scan(args.data_root, fail)
        for suffix in suffixes
    )
    cached = [candidate for candidate in candidates if os.path.exists(candidate[0])]
    if not cached:
        raise ValueError(
            f"no images with {' or '.join(suffixes)} under {', '.join(args.data_root)}; "
            "run an image cache script first"
        )
    return cached


def comparisons(decoder, images, stale):
    """Yields a Comparison per sidecar.

    Args:
        images: sidecar -> its image.
        stale: list that gets the sidecars whose image has changed since; they are not compared.
    """
    for latent, pixels in decoder.pictures(decoder.read(images)):
        try:
            source = source_of(latent, images[latent.path], pixels)
        except (OSError, ValueError) as error:
            decoder.fail(latent.path, error)
            continue
        if source is None:
            stale.append(latent.path)
        else:
            yield previews.compare(latent.path, source, pixels)


def source_of(latent, image, pixels):
    """Returns the pixels that were encoded, uint8 like `pixels`, or None if the image has changed since.

    Raises:
        ValueError: the latent decodes to another size than was encoded, or the image cannot be read.
        OSError: the image cannot be read.
    """
    height, width = pixels.shape[:2]
    metadata = latent.header.metadata  # of a foreign sidecar {}: then its size is all that is known
    wanted = int(metadata.get("width", width)), int(metadata.get("height", height))
    if wanted != (width, height):
        raise ValueError(
            f"decodes to {width}x{height} pixels, was made of {wanted[0]}x{wanted[1]}; give --model the VAE that "
            f"made it ({metadata.get('model')})"
        )
    return previews.source_pixels(image, width, height, metadata.get("source_sha256"))


def report(measured, stale, min_psnr):
    """Prints the stale sidecars, the worst and all too low ones as a table, and what to do; returns how many are low.

    Args:
        measured: list of (PSNR in dB, sidecar), ascending.
    """
    for path in stale:
        print(f"{path}: stale, its image has changed; run the cache script again")
    num_low = 0 if min_psnr is None else sum(value < min_psnr for value, _ in measured)
    print(f"{'PSNR':>7}  the worst")
    for value, path in measured[: max(_NUM_WORST, num_low)]:
        print(f"{value:7.2f}  {path}")
    if num_low:
        print(
            f"{num_low} of {len(measured)} below {min_psnr:g} dB. If all are: --model has another VAE than made the "
            "cache, or a poor one (see cache/validate_vae.py). If some are: delete these sidecars and run the cache "
            "script again"
        )
    return num_low


if __name__ == "__main__":
    cli.run(main)
