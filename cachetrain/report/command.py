"""Writes a report on a run as one HTML page: samples over time, curves, health, warnings, settings.

    ./report.py output/run1                  # writes output/run1/report.html
    ./report.py output/run1 output/run2      # compares two runs: output/run1/report_run2.html

The page opens from disk and needs no network. A report can be written while the run is still training.
"""

from functools import partial
from pathlib import Path

from cachetrain import cli, outputs
from cachetrain.log import info


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "output_dir",
        nargs="+",
        metavar="OUTPUT_DIR",
        help="directory of a run; a second run is compared with the first",
    )
    parser.add_argument(
        "--out",
        type=outputs.page,
        metavar="FILE",
        help="page to write; default: report.html, or report_RUN2.html, in the first OUTPUT_DIR",
    )
    args = parser.parse_args(argv)
    if len(args.output_dir) > 2:
        parser.error(f"expected one or two OUTPUT_DIR, got {len(args.output_dir)}")
    return args


def main(argv=None):
    args = parse_args(argv)

    from cachetrain.report.page import write_page
    from cachetrain.report.run import read_run

    runs = [read_run(output_dir) for output_dir in args.output_dir]
    other = f"_{runs[1]['name']}" if len(runs) > 1 else ""
    if len({run["name"] for run in runs}) < len(runs):
        for run in runs:
            run["name"] = run["path"]
    path = Path(args.out or Path(args.output_dir[0]) / f"report{other}.html")
    size = write_page(path, runs)
    info(f"{path} ({size / 2**20:.1f} MiB)")
    return 0


run = partial(cli.run, main)  # the console script
