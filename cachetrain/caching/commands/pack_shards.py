"""Packs the sidecars of a folder into a shard set: a few large files instead of two for each image.

    cache/pack_shards.py --data_root ~/photos --out /data/photos_set --txtcache_suffix .txt_t5cache
    ./train_from_cached.py --train_data_dir /data/photos_set ...

Each shard is a tar with the sidecars of some pairs, byte for byte, and an index in front; `tar xf` gives them back.
Training from the set is bit-for-bit the training from the folder. The numbers in multiply.txt are packed, too. Shards
that are in the set already are not packed again, so the same command continues an interrupted run. With RANK and
WORLD_SIZE set, as torchrun does, each process packs its share. Needs obstore: pip install -e '.[cloud]'.

The exit code is 0 if the set is complete, 1 if a shard that was in it is cut off or has a damaged index, 2 on any
other error. cache/cache_status.py --verify looks for other damage.
"""

from argparse import Namespace
from functools import partial

from cachetrain import cli
from cachetrain.caching import arguments
from cachetrain.data.sidecar import SUFFIXES


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--data_root", required=True, metavar="DIR", help="folder whose pairs of sidecars are packed")
    parser.add_argument(
        "--out",
        type=arguments.set_address,
        required=True,
        metavar="DIR|URL",
        help="the shard set: a directory, or s3://, gs:// or az:// with a bucket and a path",
    )
    parser.add_argument(
        "--imgcache_suffix",
        type=arguments.cache_suffix,
        nargs="+",
        default=[SUFFIXES["img_sdxl"]],
        metavar="SUFFIX",
        help="of the image sidecars; several: of several sizes of each image",
    )
    parser.add_argument(
        "--txtcache_suffix",
        type=arguments.cache_suffix,
        default=SUFFIXES["txt_t5cache"],
        metavar="SUFFIX",
        help="of the text sidecars",
    )
    parser.add_argument(
        "--rows",
        type=cli.Number(int, 1, 65536),
        default=2048,
        help="pairs in a shard; a process holds the sidecars of one shard in memory twice",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from cachetrain.caching.packing import pack

    return pack(args)


run = partial(cli.run, main)  # the console script
