#!/usr/bin/env python3
"""Measures the scaling factor 1/std of cached latents, and its standard error, beside what the VAE's config says.

    cache/calculate_vae_scaling.py photos/ --cache_suffix .img_sdxl --num_images 2000

The factor gives the latents (posterior means, as stored) unit variance over all values of all images: Rombach et al.
2022, "High-Resolution Image Synthesis with Latent Diffusion Models". A random subset is often enough: the standard
error, which comes from the differences between images, tells. Latents may be of several sizes. Sidecars that are
damaged or hold values that are not finite are named and left out; the exit code is then 1, and 2 on any other error.
"""

try:
    from cachetrain import cli
    from cachetrain.caching.inspect import statistics
    from cachetrain.data import many_files
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None


def parse_args(argv=None):
    return statistics.parser(__doc__, ("img_sdvae", "img_sdxl")).parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    paths = many_files.random_subset(statistics.find_paths(args), args.num_images, args.seed)
    overall, channels, sizes, failures = statistics.Moments(), statistics.Moments(), set(), []
    for _, latent, header in statistics.read_tensors(paths, "latent", 3, same_vae, failures):
        overall.add(latent.reshape(1, -1))
        channels.add(latent.reshape(len(latent), -1))
        sizes.add(latent.shape)
        fields = header.metadata
    statistics.check_measured(overall.num_groups, args, failures)
    report(overall, channels.statistics(), sizes, fields)
    if failures:
        print(f"{len(failures)} sidecars were left out, named above")
    return 1 if failures else 0


def same_vae(header):
    """What all latents of one measurement have in common."""
    vae = {key: header.metadata.get(key) for key in ("encoder", "scaling_factor", "shift_factor")}
    return {**vae, "channels": header.shapes["latent"][0]}


def report(overall, channels, sizes, fields):
    """Prints the table of channels, and the two factors beside the header's."""
    statistics_of_all = overall.statistics()[0]
    scaling_factor = statistics_of_all.inverse_std
    shapes = f"latents of shape {min(sizes)}" if len(sizes) == 1 else f"latents of {len(sizes)} sizes"
    print(f"{overall.num_groups} images, {shapes}; standard errors from the variance between images\n")
    print(f"{'':12}{'mean':24}std")
    for name, row in [("all", statistics_of_all), *((f"channel {i}", row) for i, row in enumerate(channels))]:
        print(f"{name:12}{row.mean!s:24}{row.std}")
    print()
    for key, what, measured in (
        ("scaling_factor", "1/std", scaling_factor),
        ("shift_factor", "mean", statistics_of_all.mean),
    ):
        expected = fields.get(key)
        beside = f"header {expected}, {measured.distance(float(expected))}" if expected else "not in the header"
        print(f"{key:14}  {what:5} = {measured}; {beside}")


if __name__ == "__main__":
    cli.run(main)
