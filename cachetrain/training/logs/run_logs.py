"""All logging of a run: statistics collected each step, and written at log steps."""

import math
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from cachetrain.atomic import claim
from cachetrain.data.dataset import SampleKey
from cachetrain.log import info
from cachetrain.modeling.lora import is_adapted
from cachetrain.training.logs import describe, wandb_mirror
from cachetrain.training.logs.diagnostics import Diagnostics, FixedLatent
from cachetrain.training.logs.health import Health
from cachetrain.training.logs.machine import forward_flops
from cachetrain.training.logs.metrics import open_metrics
from cachetrain.training.logs.statistics import Statistics

# Name in the console line of a log step: tag.
_LINE_TAGS = {
    "val/loss": "val/loss", "val/loss_ema": "val/loss_ema", "lr": "01_Training/learning_rate",
    "grad_norm": "01_Training/grad_norm", "images/s": "05_Performance/images_per_second",
}  # fmt: skip


class Logs:
    """The log groups of docs/logging.md that --log_groups selects.

    Args:
        run: Run.
        unet: UNet2DConditionModel, not its distributed wrapper; requires_grad must not change afterwards.
        pairs: CachedPairs of the training pairs.
        scaler: of optim.loss_scaler.
        start_step: optimizer steps done, in a resumed run; None: a new run.
        optimizer: of optim.make_optimizer; a GradientRelease tells the norms of its gradients.

    Attributes:
        metrics: Metrics on rank 0, NoMetrics on other ranks.
        statistics: Statistics; the training loop adds every micro-batch and the time it waited for batches.
    """

    def __init__(
        self,
        run,
        unet: torch.nn.Module,
        pairs,
        scaler: torch.amp.GradScaler,
        start_step: int | None = None,
        optimizer=None,
    ):
        args, world = run.args, run.world
        self.run = run
        self.groups = frozenset(args.log_groups)
        self.scaler = scaler
        log_dir = Path(args.logdir) / run.output_dir.name
        if world.main:
            claim(log_dir / ".run", run.output_dir, f"--logdir {args.logdir}")
        self._wandb = wandb_mirror.start(args) if args.wandb and world.main else None
        with wandb_mirror.following(log_dir) if self._wandb else nullcontext():
            self.metrics = open_metrics(run.output_dir, log_dir, start_step, world.main)
        self.statistics = Statistics(
            unet,
            run.objective,
            world,
            run.device,
            self.groups,
            run.output_dir,
            gradient_clip=args.gradient_clip,
            weighted=run.weighted,
            masked=pairs.masked,
            flops_per_image=self._flops_per_image(unet) if 5 in self.groups else None,
            shard_readers=max(1, args.num_workers) if run.index.is_fetched else 0,
        )
        self.diagnostics = Diagnostics(unet, args.diagnostic_steps, self.groups, world, run.device)
        if args.gradient_release:
            optimizer.l1_of = frozenset(self.statistics.measured.qk)
            self.statistics.measured.released = optimizer.norms
        self.diagnostics.released = args.gradient_release
        measured = self.statistics.measured
        self.health = Health(measured.layers, run.plan.warmup_steps, scaler.is_enabled(), measured.qk_tag)
        self.fixed_latent = FixedLatent(run, unet, pairs[SampleKey(0, 0)]) if 13 in self.groups else None
        self._describe(unet, start_step)

    def _flops_per_image(self, unet):
        index = self.run.index
        example = partial(self.run.conditioning.example, index.text_widths, int(index.tokens[0]))
        # The backward pass costs twice as much as the forward pass, beside an adapter once: frozen weights need no
        # gradient.
        return (2 if is_adapted(unet) else 3) * forward_flops(unet, index.shapes[0], example)

    def _describe(self, unet, start_step):
        """Writes what is logged once; in a resumed run, only what was removed from the log with the later steps."""
        run = self.run
        if 4 in self.groups:
            describe.planned_learning_rate(self.metrics, run.learning_rate, run.plan.max_steps, start_step or 0)
        if 15 in self.groups:
            fingerprint = describe.cache_fingerprint(run.index)
            describe.configuration(self.metrics, vars(run.args), fingerprint, run.device, start_step)
        if start_step:
            return
        if 6 in self.groups:
            describe.noise_schedule(self.metrics, run.alphas_cumprod)
        if 8 in self.groups:
            describe.architecture(self.metrics, unet)

    def close(self) -> None:
        """Waits until everything is written, and sent to Weights & Biases with --wandb."""
        self.metrics.close()
        if self._wandb:
            wandb_mirror.finish(self._wandb)

    def due(self, step: int) -> bool:
        """Whether optimizer step `step` is a log step."""
        regular = step % self.run.args.log_step == 0 or step in (1, self.run.plan.max_steps)
        return regular or self.diagnostics.due(step)

    def write(self, step: int, optimizer: torch.optim.Optimizer, extra: dict[str, float]) -> dict[str, float]:
        """Writes the statistics since the last call. Called by all ranks; the host waits for the device here.

        Args:
            step: optimizer steps done.
            optimizer: its learning rates are logged.
            extra: {tag: value} of further scalars.

        Returns:
            {tag: value} of all scalars written.
        """
        tags, histograms = self.statistics.read(step, optimizer, self.scaler)
        more_tags, more_histograms = self.diagnostics.after(step)
        tags |= more_tags | extra
        self.metrics.scalars(step, tags)
        for tag, (counts, edges) in (histograms | more_histograms).items():
            self.metrics.histogram(tag, counts, edges, step)
        measured = self.statistics.measured
        if 11 in self.groups and self.run.world.main:
            self.health.watch(step, measured.qk_rms, measured.v_ratio, self.statistics.grad_norm)
        if self.fixed_latent and self.diagnostics.due(step):
            self.metrics.image("13_Noise_Visualization/fixed_latent", self.fixed_latent.picture(), step)
        return tags

    def show(self, progress: tqdm, step: int, tags: dict[str, float]) -> None:
        """Shows a log step: in the progress bar, or as a line on stdout if the bar is hidden.

        Args:
            progress: the progress bar.
            step: optimizer steps done.
            tags: result of `write`.
        """
        speed = tags.get("05_Performance/images_per_second", math.nan)
        progress.set_postfix(loss=f"{self.statistics.loss_raw:.4f}", img_s=f"{speed:.1f}", refresh=False)
        if progress.disable:  # stderr is not a terminal
            info(self.line(step, tags))

    def line(self, step: int, tags: dict[str, float]) -> str:
        """Describes a log step in one line; values of groups that are off are left out."""
        values = {"loss": self.statistics.loss_raw} | {
            name: tags[tag] for name, tag in _LINE_TAGS.items() if tag in tags
        }
        line = f"step {step:,} of {self.run.plan.max_steps:,}: "
        line += ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if speed := tags.get("05_Performance/steps_per_second"):
            line += f", {timedelta(seconds=round((self.run.plan.max_steps - step) / speed))} left"
        return line
