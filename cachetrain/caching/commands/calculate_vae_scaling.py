"""Measures the scaling factor 1/std of cached latents and its standard error, beside the factor in the VAE's config.

    cache/calculate_vae_scaling.py photos/ --cache_suffix .img_sdxl --num_images 2000
    cache/calculate_vae_scaling.py photos/ --per_channel --out norm.json

The factor gives the latents (posterior means, as stored) unit variance over all values of all images: Rombach et al.
2022, "High-Resolution Image Synthesis with Latent Diffusion Models". A random subset is often enough; the standard
error, which comes from the differences between images, shows whether it is. With --per_channel, each channel gets a
factor and a shift of its own. --out writes the numbers for --norm of the image cache scripts, which train with
(latent - shift_factor) * scaling_factor. Latents may have several sizes. Sidecars that are damaged or hold values
that are not finite are named and left out; the exit code is then 1, and 2 on any other error.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

from cachetrain import cli, outputs
from cachetrain.atomic import atomic_write
from cachetrain.caching.inspect import statistics
from cachetrain.caching.inspect.statistics import Moments, Statistics
from cachetrain.caching.messages import say
from cachetrain.data import many_files
from cachetrain.data.sidecar import Header
from cachetrain.log import counted
from cachetrain.modeling import normalisation


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = statistics.parser(__doc__, ("img_sdvae", "img_sdxl"))
    parser.add_argument("--per_channel", action="store_true", help="measure the factors of each channel on its own")
    parser.add_argument("--out", type=outputs.norm, metavar="FILE", help="JSON file to write, for --norm")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    paths = many_files.random_subset(statistics.find_paths(args), args.num_images, args.seed)
    overall, channels, sizes, skipped = Moments(), Moments(), set(), []
    for _, latent, header in statistics.read_tensors(paths, "latent", 3, vae_identity, skipped):
        overall.add(latent.reshape(1, -1))
        channels.add(latent.reshape(len(latent), -1))
        sizes.add(latent.shape)
        fields = header.metadata
    statistics.check_measured(overall.num_groups, args, skipped)
    shapes = f"latents of shape {min(sizes)}" if len(sizes) == 1 else f"latents of {len(sizes)} sizes"
    say(f"{counted(overall.num_groups, 'image')}, {shapes}; standard errors from the spread between images", "")
    print_table(overall.statistics()[0], channels.statistics())
    measured = (channels if args.per_channel else overall).statistics()
    for number, row in enumerate(measured):
        print_factors(row, fields, number if args.per_channel else None)
    if args.out:
        write_norm(args.out, measured, overall.num_groups, fields)
    if skipped:
        say(f"left out, named above: {counted(len(skipped), 'sidecar')}")
    return 1 if skipped else 0


def vae_identity(header: Header) -> dict:
    """What all latents of one measurement must have in common."""
    vae = {key: header.metadata.get(key) for key in ("encoder", "scaling_factor", "shift_factor")}
    return {**vae, "channels": header.shapes["latent"][0]}


def print_table(overall: Statistics, channels: list[Statistics]) -> None:
    say(f"{'':12}{'mean':24}std")
    for name, row in [("all", overall), *((f"channel {i}", row) for i, row in enumerate(channels))]:
        say(f"{name:12}{row.mean!s:24}{row.std}")


def print_factors(row: Statistics, fields: dict[str, str], channel: int | None = None) -> None:
    """Prints the two measured factors, of all latents or of one channel, beside those in the header."""
    say("", *([] if channel is None else [f"channel {channel}"]))
    for key, what, measured in (
        ("scaling_factor", "1/std", row.inverse_std),
        ("shift_factor", "mean", row.mean),
    ):
        expected = fields.get(key)
        if expected and "," in expected:
            numbers = expected.split(",")
            expected = None if channel is None or channel >= len(numbers) else numbers[channel]
        beside = f"header {expected}, {measured.distance(float(expected))}" if expected else "not in the header"
        say(f"{key:14}  {what:5} = {measured}; {beside}")


def write_norm(out: Path, rows: list[Statistics], num_images: int, fields: dict[str, str]) -> None:
    """Writes the file of --norm; `rows`: of all latents, or one of each channel."""
    numbers = {
        "scaling_factor": [row.inverse_std.value for row in rows],
        "shift_factor": [row.mean.value for row in rows],
    }
    values = {name: row if len(row) > 1 else row[0] for name, row in numbers.items()}
    known = {"encoder": fields["encoder"]} if "encoder" in fields else {}
    scaling = normalisation.of_values(values, "the measured factors")
    atomic_write(out, normalisation.to_file_text(scaling, **known, num_images=num_images).encode())
    say(f"wrote {out}, for --norm of the image cache scripts")


run = partial(cli.run, main)  # the console script
