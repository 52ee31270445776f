#!/usr/bin/env python3
"""Trains a Stable-Diffusion-class UNet from cached latents and text embeddings.

    ./train_from_cached.py --model models/t5_sd15 --train_data_dir /data --output_dir output/run1 \\
        --imgcache_suffix .img_sdxl --txtcache_suffix .txt_t5cache --batch_size 64 --lr 1e-5 --max_steps 10000

Reads only sidecars: no VAE, no text encoder and no pixels in the loop. train_sd.sh and train_t5.sh are its front
ends. `step` is one optimizer update; the loss is the mean over batch_size x gradient_accum samples.
"""

import json
import math
import shutil
import time
from pathlib import Path

try:
    from cachetrain import cli
    from cachetrain.training import options
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None


def parse_args(argv=None):
    return options.parse_args(__doc__, argv)


def main(argv=None):
    args = parse_args(argv)
    output_dir = open_output_dir(args)

    import torch
    from tqdm import tqdm

    from cachetrain.modeling import load
    from cachetrain.modeling.schedulers import objective_of
    from cachetrain.training import objective as obj
    from cachetrain.training import setup
    from cachetrain.training.checkpoint import save_checkpoint
    from cachetrain.training.metrics import Metrics, Window
    from cachetrain.training.optim import Ema, lr_factor, make_optimizer, mean_abs_grad, qk_weights
    from cachetrain.training.samples import text_info

    device = load.pick_device(args.device)
    autocast = setup.autocast_for(device, args.precision)
    index = setup.open_index(args)
    model_dir = load.resolve_model(args.model, args.revision)
    unet = load.load_unet(load.component_dir(model_dir, "unet"), seed=args.seed)
    setup.check_fit(index, unet, args)
    setup.check_vae(index, model_dir)
    scheduler = setup.open_scheduler(model_dir, args.objective, args.zero_terminal_snr)
    objective = objective_of(scheduler)
    alphas_cumprod = obj.noise_schedule(scheduler, device)

    plan = setup.make_plan(args, len(index))
    samples = setup.open_samples(args, model_dir, scheduler, index, device)
    loader = setup.open_loader(args, index, device, objective, plan.max_steps)
    unet.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)
    ema = Ema(unet, args.ema_decay) if args.ema_decay else None
    optimizer = make_optimizer(args.optimizer, unet.parameters(), args.learning_rate, args.betas, args.weight_decay)
    qk = qk_weights(unet)
    metrics = Metrics(output_dir, Path(args.logdir) / output_dir.name)
    archive_settings(args, output_dir, metrics)
    print(
        f"{len(index):,} pairs of latents {index.shapes}; {objective}; {sum(p.numel() for p in unet.parameters()):,} "
        f"parameters; {plan.max_steps} steps of {args.batch_size} x {args.gradient_accum} = "
        f"{plan.max_steps / plan.steps_per_epoch:.2f} epochs; {args.precision} on {device}"
    )

    started = time.perf_counter()
    window = Window(device)
    batches = iter(loader)
    progress = tqdm(range(1, plan.max_steps + 1), desc="train", unit="step", disable=None)
    for step in progress:
        rate = args.learning_rate * lr_factor(args.scheduler, step - 1, plan.warmup_steps, plan.decay_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate

        for _ in range(args.gradient_accum):
            waiting = time.perf_counter()
            batch = next(batches)
            window.wait_s += time.perf_counter() - waiting
            batch = {k: v if v is None else v.to(device, non_blocking=True) for k, v in batch.items()}

            loss, raw = losses(unet, batch, objective, alphas_cumprod, autocast, args)
            (loss.mean() / args.gradient_accum).backward()
            window.add(loss.mean(), raw.mean(), args.batch_size)

        save_now = step % plan.save_steps == 0 or step == plan.max_steps
        log_now = step % args.log_step == 0 or step == 1 or save_now  # what is saved was seen to be finite
        qk_grads = mean_abs_grad(qk) if log_now else None
        grad_norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), args.gradient_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update(step)

        if log_now:
            values = window.read(grad_norm=grad_norm, qk_grads_av=qk_grads)
            log_step(metrics, step, values, rate, step * args.batch_size * args.gradient_accum, args.use_snr)
            progress.set_postfix(loss=f"{values['loss_raw']:.4f}", img_s=f"{values['images_per_second']:.1f}")
        if samples and (step % args.sample_steps == 0 or step == plan.max_steps):
            directory = output_dir / "samples" / f"step-{step:06d}"
            samples.draw(ema.model if ema else unet, directory, metrics, step, autocast)
        if save_now:
            info = {"step": step, "objective": objective, "text": text_info(index)}
            saved = save_checkpoint(output_dir, step, unet, ema, scheduler, model_dir, info)

    metrics.close()
    print(f"{plan.max_steps} steps in {time.perf_counter() - started:.0f} s; last checkpoint: {saved}")
    return 0


def losses(unet, batch, objective, alphas_cumprod, autocast, args):
    """One forward pass. Returns (loss to optimise, plain squared error), float32 [B] each."""
    from cachetrain.training import objective as obj

    latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
    alpha, sigma = obj.alpha_sigma(objective, timesteps, alphas_cumprod)
    with autocast():
        prediction = unet(
            alpha * latents + sigma * noise,
            timesteps,
            encoder_hidden_states=batch["encoder_hidden_states"],
            encoder_attention_mask=batch["encoder_attention_mask"],
        ).sample
    raw = obj.squared_error(prediction, obj.target_of(objective, latents, noise, alpha, sigma))
    if not args.use_snr:
        return raw, raw
    return raw * obj.min_snr_weights(objective, alpha, sigma, args.noise_gamma), raw


def open_output_dir(args):
    """Makes the run's directory; one that already holds a run is refused."""
    output_dir = Path(args.output_dir)
    if (output_dir / "args.json").exists():
        raise ValueError(f"{output_dir}: already holds a run; choose another --output_dir, or remove it")
    output_dir.mkdir(parents=True, exist_ok=True)
    return output_dir


def archive_settings(args, output_dir, metrics):
    """Keeps the settings with the run: args.json, the wrapper script, TensorBoard."""
    resolved = json.dumps(vars(args), indent=2)
    (output_dir / "args.json").write_text(resolved + "\n")
    metrics.text("15_Configuration/args", f"```\n{resolved}\n```")
    if args.copy_config:
        shutil.copy(args.copy_config, output_dir)


def log_step(metrics, step, values, rate, images_seen, use_snr):
    """Names the scalars of a log step and writes them.

    Raises:
        ValueError: loss or gradients are not finite; nothing that follows would be worth its time.
    """
    groups = {"images_per_second": "05_Performance", "data_wait_fraction": "05_Performance"}
    scalars = {f"{groups.get(key, '01_Training')}/{key}": value for key, value in values.items()}
    if use_snr:
        scalars["01_Training/loss_snr"] = values["loss"]
    scalars |= {"01_Training/learning_rate": rate, "01_Training/images_seen": images_seen}
    metrics.scalars(step, scalars)
    if not math.isfinite(values["loss"] + values["grad_norm"]):
        raise ValueError(
            f"the loss is {values['loss']}, the gradient norm {values['grad_norm']} at step {step}: lower --lr, "
            "or use --precision fp32; earlier checkpoints are as they were"
        )


if __name__ == "__main__":
    cli.run(main)
