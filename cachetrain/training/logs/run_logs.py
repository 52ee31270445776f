"""All logging of a run behind a few calls: what is collected each step, and what is written at a log step."""

import math
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

from cachetrain.data.dataset import SampleKey
from cachetrain.training.logs import describe, wandb_mirror
from cachetrain.training.logs.diagnostics import Diagnostics, FixedLatent
from cachetrain.training.logs.health import Health
from cachetrain.training.logs.machine import forward_flops
from cachetrain.training.logs.metrics import open_metrics
from cachetrain.training.logs.statistics import Statistics

_IN_LINE = {
    "val/loss": "val/loss", "val/loss_ema": "val/loss_ema", "lr": "01_Training/learning_rate",
    "grad_norm": "01_Training/grad_norm", "images/s": "05_Performance/images_per_second",
}  # fmt: skip


class Logs:
    """The 15 groups of docs/logging.md, those that `--log_groups` names.

    Args:
        unet: the module itself; what is trained is final.
        pairs: CachedPairs that are trained on.
        scaler: torch.amp.GradScaler.
        start_step: of a run that is resumed; None: a new one.

    Attributes:
        metrics: Metrics of rank 0, or what takes its calls and writes nothing.
        statistics: Statistics; the loop hands it every micro-batch, and the seconds it waited for one.
    """

    def __init__(self, run, unet, pairs, scaler, start_step=None):
        args, world = run.args, run.world
        self.run = run
        self.groups = frozenset(args.log_groups)
        self.scaler = scaler
        log_dir = Path(args.logdir) / run.output_dir.name
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
            weighted=args.use_snr,
            flops_per_image=self._flops_per_image(unet) if 5 in self.groups else None,
        )
        self.diagnostics = Diagnostics(unet, args.diagnostic_steps, self.groups, world, run.device)
        self.health = Health(self.statistics.measured.layers, run.plan.warmup_steps, scaler.is_enabled())
        self.fixed_latent = FixedLatent(run, unet, pairs[SampleKey(0, 0)]) if 13 in self.groups else None
        self._describe(unet, start_step)

    def _flops_per_image(self, unet):
        index = self.run.index
        example = partial(self.run.conditioning.example, index.text_widths, int(index.tokens[0]))
        return forward_flops(unet, index.shapes[0], example)

    def _describe(self, unet, start_step):
        """Writes what is logged once; after a resume only what the purged steps have taken with them."""
        run = self.run
        if 4 in self.groups:
            describe.planned_rates(self.metrics, run.learning_rate, run.plan.max_steps, start_step or 0)
        if 15 in self.groups:
            fingerprint = describe.cache_fingerprint(run.index)
            describe.configuration(self.metrics, vars(run.args), fingerprint, run.device, start_step)
        if start_step:
            return
        if 6 in self.groups:
            describe.noise_schedule(self.metrics, run.alphas_cumprod)
        if 8 in self.groups:
            describe.architecture(self.metrics, unet)

    def close(self):
        """Waits until all is written, and mirrored."""
        self.metrics.close()
        if self._wandb:
            wandb_mirror.finish(self._wandb)

    def due(self, step):
        """Whether scalars are read and written after this step."""
        regular = step % self.run.args.log_step == 0 or step in (1, self.run.plan.max_steps)
        return regular or self.diagnostics.due(step)

    def write(self, step, optimizer, extra):
        """Reads what has been collected since the last call and writes it. The host waits for the device here.

        Args:
            extra: {tag: float} to write with it.

        Returns:
            {tag: float}, all that was written.
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

    def show(self, progress, say, step, tags):
        """Shows a log step: beside the progress bar, or as a line where there is none.

        Args:
            progress: tqdm; say: prints a line.
            tags: {tag: float} that `write` has returned.
        """
        speed = tags.get("05_Performance/images_per_second", math.nan)
        progress.set_postfix(loss=f"{self.statistics.loss_raw:.4f}", img_s=f"{speed:.1f}", refresh=False)
        if progress.disable:  # not a terminal
            say(self.line(step, tags))

    def line(self, step, tags):
        """A log step in one line; groups that are off are left out."""
        values = {"loss": self.statistics.loss_raw} | {
            name: tags[tag] for name, tag in _IN_LINE.items() if tag in tags
        }
        line = f"step {step:,} of {self.run.plan.max_steps:,}: "
        line += ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if speed := tags.get("05_Performance/steps_per_second"):
            line += f", {timedelta(seconds=round((self.run.plan.max_steps - step) / speed))} left"
        return line
