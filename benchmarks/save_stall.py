#!/usr/bin/env -S python3 -P
"""Measures how long saving a checkpoint of SD1.5's UNet (random weights, fp32, Lion) blocks training.

    ./benchmarks/save_stall.py --work /tmp/save_stall

"Held up" is the duration of the call in the training loop; "bare copy" is the time to copy the same tensors to host
memory, the lower bound. Needs 15 GB of memory and 15 GB of disk. --unet tiny saves the quickstart's model instead.
"""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

from cachetrain import cli

TINY = Path(__file__).resolve().parent.parent / "models" / "tiny" / "unet"


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--work", required=True, type=Path, help="directory for the checkpoints; removed afterwards")
    parser.add_argument("--unet", choices=("tiny", "sd15"), default="sd15", help="UNet to save, see above")
    parser.add_argument("--device", help="torch device; default: cuda if there is one, else cpu")
    parser.add_argument("--saves", type=cli.positive_int, default=2, help="checkpoints to write, one after the other")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    import torch
    from diffusers import UNet2DConditionModel

    from cachetrain.checkpoints.manifest import damages
    from cachetrain.checkpoints.save import Saving, checkpoint_path
    from cachetrain.diffusion.noise_schedulers import make_scheduler
    from cachetrain.distributed import World
    from cachetrain.modeling import load

    device = load.pick_device(args.device)
    config = {"sample_size": 64, "cross_attention_dim": 768}
    config = UNet2DConditionModel.load_config(TINY) if args.unet == "tiny" else config
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(config)
    moments = {number: {"exp_avg": p.detach().clone()} for number, p in enumerate(unet.parameters())}
    settings = SimpleNamespace(
        save_on_epoch=False, keep_last=1, save_every_minutes=None, ckpt_dir=None, lora_rank=None
    )
    run = SimpleNamespace(
        args=settings,
        output_dir=args.work,
        plan=None,
        world=World(),
        model_dir=args.work / "bare",
        noise_scheduler=make_scheduler("epsilon"),
    )
    saving = Saving(run, {"objective": "epsilon"})
    args.work.mkdir(parents=True, exist_ok=True)
    print("| what | figure | against | ratio | wanted |\n|---|---|---|---|---|", flush=True)
    for step in range(1, args.saves + 1):
        copies, start = [], time.perf_counter()
        for parameter in unet.parameters():
            copies += [parameter.detach().to("cpu", copy=True) for _ in range(2)]
        bare_s = time.perf_counter() - start
        del copies
        start = time.perf_counter()
        saving.save(step, unet, None, {"optimizer": moments})
        blocked_s = time.perf_counter() - start
        checkpoint = saving.finish()
        on_disk_s = time.perf_counter() - start
        assert checkpoint == checkpoint_path(args.work, step)
        start = time.perf_counter()
        assert not damages(checkpoint)
        checked_s = time.perf_counter() - start
        rows = f"| {args.unet}, save {step}: training held up | {blocked_s:.3g} s | bare copy {bare_s:.3g} s "
        rows += f"| {blocked_s / bare_s:.2f} | |\n"
        rows += f"| {args.unet}, save {step}: on disk after | {on_disk_s:.3g} s | checked in {checked_s:.3g} s | | |"
        print(rows, flush=True)
    shutil.rmtree(args.work)
    return 0


if __name__ == "__main__":
    cli.run(main)
