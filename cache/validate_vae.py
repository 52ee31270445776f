#!/usr/bin/env python3
"""Shows what a VAE does to images, before anything is cached with it: image -> encode -> decode -> PSNR and picture.

    cache/validate_vae.py --model models/t5_sd15 img1.jpg img2.png photos/ --out validated.png

The picture has a row per image: source, decoded, difference. To compare two VAEs, run it once with each on the same
images. The exit code is 1 if some image could not be read (each is named), 2 on any other error.
"""

try:
    import os

    from cachetrain import cli
    from cachetrain.caching import arguments
    from cachetrain.caching.inspect import previews
    from cachetrain.data import many_files, scan
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None

_MAX_ROWS = 16


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="images, and folders of them at any depth")
    previews.add_vae_arguments(parser)
    arguments.add_choice_arguments(parser, 100)
    parser.add_argument("--resolution", type=arguments.resolution, default=512, metavar="N",
                        help="side of the square that is cut out: 64 to 2048 in steps of 64")  # fmt: skip
    parser.add_argument("--out", type=previews.png_file, metavar="FILE",
                        help=f"PNG that shows the first {_MAX_ROWS} of them")  # fmt: skip
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    from cachetrain.caching.encoders import check_vae
    from cachetrain.sampling.render import save_png

    fail = previews.Failures()
    paths = many_files.random_subset(find_images(args.paths, fail), args.num_images, args.seed)
    decoder = previews.Decoder(args, fail)
    check_vae(decoder.vae, [(args.resolution, args.resolution)])
    values, shown = [], []
    print(f"{'PSNR':>7}  image")
    for comparison in round_trips(decoder, paths, args.resolution):
        print(f"{comparison.psnr:7.2f}  {comparison.name}")
        values.append(comparison.psnr)
        if len(shown) < _MAX_ROWS:
            shown.append(comparison)
    print(f"{previews.statistics(values)} at {args.resolution}x{args.resolution}, {describe(decoder.vae, args)}")
    if args.out and shown:
        save_png(previews.comparison_sheet(shown, max_side=args.resolution), args.out, model=args.model)
        print(args.out)
    return 1 if fail.count else 0


def find_images(paths, fail):
    """Returns the image files: those named, and all under the folders named."""
    found = []
    for path in paths:
        found += [pair.image for pair in scan.scan([path], fail)] if os.path.isdir(path) else [path]
    if not found:
        raise ValueError(f"no images under {', '.join(paths)}")
    return list(dict.fromkeys(found))


def round_trips(decoder, paths, side):
    """Yields a Comparison per image that can be read."""
    for start in range(0, len(paths), decoder.batch_size):
        sources = {}
        for path in paths[start : start + decoder.batch_size]:
            try:
                sources[path] = previews.source_pixels(path, side, side)
            except (OSError, ValueError) as error:
                decoder.fail(path, error)
        if sources:
            latents = map(previews.Latent, sources, decoder.encode(list(sources.values())))
            for latent, pixels in decoder.pictures(latents):
                yield previews.compare(latent.path, sources[latent.path], pixels)


def describe(vae, args):
    """One phrase on what a latent of this VAE is."""
    return f"{type(vae).__name__} of {args.model}, {vae.config.latent_channels} channels"


if __name__ == "__main__":
    cli.run(main)
