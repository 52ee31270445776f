"""All logging of a run behind a few calls: what is collected each step, and what is written at a log step."""

from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

from cachetrain.data.dataset import Visit
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
        rate: function of an optimizer step, from 1, that returns its learning rate.
        autocast: function that opens the run's autocast context.
        start_step: of a run that is resumed; None: a new one.

    Attributes:
        metrics: Metrics of rank 0, or what takes its calls and writes nothing.
        statistics: Statistics; the loop hands it every micro-batch, and the seconds it waited for one.
    """

    def __init__(
        self,
        args,
        world,
        unet,
        objective,
        alphas_cumprod,
        pairs,
        plan,
        rate,
        autocast,
        scaler,
        device,
        start_step=None,
    ):
        groups, index, self.main = frozenset(args.log_groups), pairs.index, world.main
        self.groups, self.plan, self.log_step = groups, plan, args.log_step
        self.autocast, self.scaler = autocast, scaler
        output_dir = Path(args.output_dir)
        log_dir = Path(args.logdir) / output_dir.name
        self._wandb = wandb_mirror.start(args) if args.wandb and world.main else None
        with wandb_mirror.following(log_dir) if self._wandb else nullcontext():
            self.metrics = open_metrics(output_dir, log_dir, start_step, world.main)
        shape, tokens = index.shapes[0], int(index.tokens[0])
        flops = forward_flops(unet, shape, tokens) if 5 in groups else None
        self.statistics = Statistics(
            unet, objective, world, device, groups, output_dir, args.gradient_clip, args.use_snr, flops
        )
        self.diagnostics = Diagnostics(unet, args.diagnostic_steps, groups, world, device)
        self.health = Health(self.statistics.measured.layers, plan.warmup_steps, scaler.is_enabled())
        self.fixed_latent = None
        if 13 in groups:
            kind = index.image_header.metadata.get("kind") or "img_sdvae"
            sample = pairs[Visit(0, 0)]
            self.fixed_latent = FixedLatent(unet, objective, alphas_cumprod, sample, index.masked, kind, device)
        if 4 in groups:
            describe.planned_rates(self.metrics, rate, plan.max_steps, start_step or 0)
        if 15 in groups:
            describe.configuration(self.metrics, vars(args), describe.cache_fingerprint(index), device, start_step)
        if start_step:
            return  # the rest has been logged
        if 6 in groups:
            describe.noise_schedule(self.metrics, alphas_cumprod)
        if 8 in groups:
            describe.architecture(self.metrics, unet)

    def close(self):
        """Waits until all is written, and mirrored."""
        self.metrics.close()
        if self._wandb:
            wandb_mirror.finish(self._wandb)

    def due(self, step):
        """Whether scalars are read and written after this step."""
        return step % self.log_step == 0 or step == 1 or step == self.plan.max_steps or self.diagnostics.due(step)

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
        if 11 in self.groups and self.main:
            self.health.watch(step, measured.qk_rms, measured.v_ratio, self.statistics.grad_norm)
        if self.fixed_latent and self.diagnostics.due(step):
            self.metrics.image("13_Noise_Visualization/fixed_latent", self.fixed_latent.picture(self.autocast), step)
        return tags

    def line(self, step, tags):
        """A log step in one line, for where no progress bar is seen; groups that are off are left out.

        Args:
            tags: {tag: float} that `write` has returned.
        """
        values = {"loss": self.statistics.loss_raw} | {
            name: tags[tag] for name, tag in _IN_LINE.items() if tag in tags
        }
        line = f"step {step:,} of {self.plan.max_steps:,}: "
        line += ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if speed := tags.get("05_Performance/steps_per_second"):
            line += f", {timedelta(seconds=round((self.plan.max_steps - step) / speed))} left"
        return line
