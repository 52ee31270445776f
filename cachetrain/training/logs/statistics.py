"""Statistics of the steps since the last log step.

Each step only adds to small tensors on the device; a log step sums them over the ranks and copies them to the host.
"""

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cachetrain.modeling.conditioning import token_norms
from cachetrain.training.logs.gradients import Gradients
from cachetrain.training.logs.machine import peak_tflops, speed_tags, system_tags

BINS = 8  # ranges of timesteps with a loss tag each; must divide CELLS and 1000
CELLS = 40  # bins of the timestep histogram; must divide 1000
BIN_NAMES = tuple(f"t{first:03d}-{first + 1000 // BINS - 1:03d}" for first in range(0, 1000, 1000 // BINS))
_MAX_LOG_SNR = 20.0  # the log SNR of pure noise and pure signal is infinite


class Statistics:
    """Collects the scalars and histograms of groups 01 to 07, 11 and 14.

    Args:
        unet: UNet2DConditionModel, not its distributed wrapper; requires_grad must not change afterwards.
        objective: "epsilon", "v_prediction" or "flow".
        world: World.
        device: of the UNet.
        groups: numbers of the groups to log; the others cost nothing.
        output_dir: of the run; the free space of its disk is logged.
        gradient_clip: largest global gradient norm; 0: off.
        weighted: whether the loss is another than the plain squared error; it is then logged beside that one.
        masked: whether batches have masks; their mean is then logged.
        flops_per_image: of a forward and backward pass, or None.
        shard_readers: number of processes that read shards from object storage.

    Attributes:
        wait_s: seconds that the training loop waited for batches since the last `read`; the loop adds to it.
        loss, loss_raw: mean losses at the last `read`, of samples that were read and have a finite loss; set whatever
            the groups.
        grad_norm: global gradient norm at the last `read`.
        num_not_finite: steps whose gradients were not finite, between the last two calls of `read`.
        measured: Gradients, with qk_rms and v_ratio of the last `read` if group 11 is on.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        objective: str,
        world,
        device: torch.device,
        groups: Iterable[int],
        output_dir: Path,
        *,
        gradient_clip: float = 0.0,
        weighted: bool = False,
        masked: bool = False,
        flops_per_image: int | None = None,
        shard_readers: int = 0,
    ):
        self.objective = objective
        self.world = world
        self.device = device
        self.groups = frozenset(groups)
        self.output_dir = output_dir
        self.gradient_clip = gradient_clip
        self.weighted = weighted
        self.flops_per_image = flops_per_image
        self._shard_readers = shard_readers
        peak = peak_tflops(device)
        self._peak = peak and peak * world.ranks
        self.measured = Gradients(unet, world, device, 1 in self.groups, 11 in self.groups)
        self._rows = ["count", "raw", "loss"]
        self._rows += ["x0_mse", "log_snr"] if 6 in self.groups else []
        self._rows += ["std_ratio", "cosine"] if 7 in self.groups else []
        self._rows += ["mask"] if masked else []
        self._epoch = np.zeros(6)  # sums of the current epoch, up to the last `read`; see `epoch_end`
        self._epoch_start_s = time.perf_counter()
        self._reset()

    def _reset(self):
        # Columns: each cell of timesteps for captioned samples, then each cell for dropped captions.
        self._table = torch.zeros(len(self._rows), 2 * CELLS, device=self.device)
        self._steps = torch.zeros(3, device=self.device)  # all, clipped, not finite
        self._epoch_ends = []
        self._last_batch = None
        self._images = 0
        self._num_steps = 0
        self.wait_s = 0.0
        self._shard_wait_s = 0.0
        self._start_s = time.perf_counter()

    @torch.no_grad()
    def add(self, batch: dict, result) -> None:
        """Adds a micro-batch.

        Args:
            batch: dict of data.batching.collate, on the device.
            result: of the forward pass, with loss (weighted) and squared_error, float32 [B]; prediction and target,
                [B, C, h, w]; alpha and sigma, float32 [B, 1, 1, 1].
        """
        loss, squared_error = result.loss.detach(), result.squared_error.detach()
        counted = loss.isfinite() & (batch["weights"] > 0)
        rows = [counted.float(), squared_error, loss]
        if 6 in self.groups:
            rows += self._diffusion(squared_error, result.alpha.flatten(), result.sigma.flatten())
        if 7 in self.groups:
            prediction, target = result.prediction.float().flatten(1), result.target.float().flatten(1)
            both = torch.stack([prediction, target])
            # Standard deviations up to a common factor; std(2) takes five times as long.
            deviations = torch.linalg.vector_norm(both - both.mean(2, keepdim=True), dim=2)
            rows += [deviations[0] / deviations[1], F.cosine_similarity(prediction, target)]
            self._last_batch = batch  # a log step measures the latents and text of the last micro-batch
        if "mask" in self._rows:
            rows.append(batch["mask"].flatten(1).mean(1))
        cells = (batch["timesteps"] * (CELLS / 1000)).long().clamp_(max=CELLS - 1) + CELLS * batch["dropped"]
        rows = torch.where(counted, torch.stack(rows), 0.0)  # one NaN would spoil the sums
        self._table.index_add_(1, cells, rows)
        self._images += len(loss) * self.world.ranks
        self._shard_wait_s += batch["waited_s"]

    def _diffusion(self, squared_error, alpha, sigma):
        """Returns the squared error of the predicted x_0, from that of the prediction, and log(alpha^2 / sigma^2).

        epsilon: x_0 = (x_t - sigma epsilon) / alpha; v: x_0 = alpha x_t - sigma v; flow: x_0 = x_t - sigma v.
        """
        scale = sigma / alpha if self.objective == "epsilon" else sigma
        log_snr = 2 * (alpha / sigma).log()
        return [squared_error * scale.square(), log_snr.clamp_(-_MAX_LOG_SNR, _MAX_LOG_SNR)]

    @torch.no_grad()
    def gradients(self, log_now: bool) -> torch.Tensor:
        """Measures the gradients of a step, unscaled and before clipping.

        Args:
            log_now: whether this is a log step.

        Returns:
            float32 0-dim, the global norm.
        """
        norm = self.measured.measure(log_now)
        flags = [torch.ones_like(norm), norm > (self.gradient_clip or torch.inf), ~norm.isfinite()]
        self._steps += torch.stack([flag.float() for flag in flags]) / self.world.ranks
        self._num_steps += 1
        return norm

    def state_dict(self) -> dict:
        """Returns the sums of the current epoch, JSON-able. To be called right after `read`."""
        return {"epoch": self._epoch.tolist(), "seconds": time.perf_counter() - self._epoch_start_s}

    def load_state_dict(self, state: dict) -> None:
        self._epoch = np.array(state["epoch"])
        self._epoch_start_s = time.perf_counter() - state["seconds"]

    def epoch_end(self) -> None:
        """Marks the end of an epoch, whose summary the next `read` returns. Does not wait for the device."""
        sums = torch.cat([self._table[:3].sum(1), self._steps])
        self._epoch_ends.append((sums, time.perf_counter()))
        del self._epoch_ends[:-2]  # if several epochs end before a log step, the last one is logged

    @torch.no_grad()
    def read(
        self, step: int, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
    ) -> tuple[dict[str, float], dict[str, tuple]]:
        """Returns the statistics of the steps since the last call, and resets them.

        Called by all ranks. The host waits for the device here, once: all sums are copied as one tensor.

        Args:
            step: optimizer steps done.
            optimizer: its learning rates are logged.
            scaler: its scale is logged.

        Returns:
            ({tag: value} of scalars, {tag: (counts, edges)} of histograms).
        """
        parts = {"table": self._table, "steps": self._steps, **self.measured.sums(), **self._batch_sums()}
        parts |= {f"epoch_{i}": sums for i, (sums, _) in enumerate(self._epoch_ends)}
        if 14 in self.groups and scaler is not None and scaler.is_enabled():
            parts["grad_scale"] = scaler.scale(torch.ones((), device=self.device)) / self.world.ranks
        flat = self.world.sum(torch.cat([part.reshape(-1).float() for part in parts.values()]))
        host = np.split(flat.cpu().numpy(), np.cumsum([part.numel() for part in parts.values()])[:-1])
        tags, histograms = self._tags(dict(zip(parts, host, strict=True)))
        tags |= self._learning_rates(step, optimizer)
        self._reset()
        return tags, histograms

    def _batch_sums(self):
        """Returns {name: float32 tensor}, sums over the latents and text of the last micro-batch."""
        if self._last_batch is None:
            return {}
        latents = self._last_batch["latents"]
        count = torch.full((1,), latents[:, 0].numel(), device=self.device)
        text = token_norms(self._last_batch["conditioning"])
        return {"latents": torch.cat([count, latents.sum((0, 2, 3)), latents.square().sum((0, 2, 3))]), "text": text}

    def _tags(self, host):
        table = host["table"].reshape(len(self._rows), 2, CELLS).astype(np.float64)
        totals = dict(zip(self._rows, table.sum((1, 2)), strict=True))
        self.loss, self.loss_raw = (_mean(totals[row], totals["count"]) for row in ("loss", "raw"))
        self.grad_norm = float(host["grad_norm"][0])
        self.num_not_finite = round(float(host["steps"][2]))
        tags, histograms = self.measured.tags(host), {}
        by_bin = table.reshape(len(self._rows), 2, BINS, -1).sum((1, 3))
        if 1 in self.groups:
            tags |= self._training(host["steps"])
            tags |= {"01_Training/mask_share": _mean(totals["mask"], totals["count"])} if "mask" in totals else {}
        if 2 in self.groups:
            tags |= self._components(by_bin, table.sum(2))
        tags |= self._epoch_summary(host, np.concatenate([table[:3].sum((1, 2)), host["steps"]]))
        if 5 in self.groups:
            elapsed_s = time.perf_counter() - self._start_s
            tags |= speed_tags(
                self._images,
                self._num_steps,
                elapsed_s,
                self.wait_s,
                flops_per_image=self.flops_per_image,
                peak=self._peak,
            )
            if self._shard_readers:
                tags["05_Performance/shard_wait_fraction"] = self._shard_wait_s / elapsed_s / self._shard_readers
        if 6 in self.groups and totals["count"]:
            tags |= {f"06_Diffusion/{row}": totals[row] / totals["count"] for row in ("x0_mse", "log_snr")}
            histograms["06_Diffusion/timesteps"] = (table[0].sum(0), np.linspace(0, 1000, CELLS + 1))
        if 7 in self.groups:
            tags |= self._noise(by_bin, host)
        if 11 in self.groups and self.measured.layers:
            logarithms = np.log10(np.clip(np.nan_to_num(self.measured.qk_rms, posinf=1e9), 1e-15, 1e9))
            histograms[f"11_Gradient_Stats/{self.measured.qk_tag}_rms_log10"] = np.histogram(logarithms, bins=20)
        if 14 in self.groups:
            tags |= system_tags(self.device, self.output_dir)
            tags |= {"14_System/grad_scale": float(host["grad_scale"][0])} if "grad_scale" in host else {}
        return tags, histograms

    def _training(self, steps):
        tags = {"01_Training/loss": self.loss, "01_Training/loss_raw": self.loss_raw}
        if self.gradient_clip:
            tags["01_Training/clipped_fraction"] = float(steps[1] / max(1, steps[0]))
        return tags

    def _components(self, by_bin, by_caption):
        tags = _means("02_Loss_Components/loss_raw_", BIN_NAMES, by_bin[1], by_bin[0])
        if self.weighted:
            tags |= _means("02_Loss_Components/loss_", BIN_NAMES, by_bin[2], by_bin[0])
        return tags | _means("02_Loss_Components/loss_raw_", ("captioned", "dropped"), by_caption[1], by_caption[0])

    def _epoch_summary(self, host, window):
        """Returns the scalars of group 03 if an epoch has ended since the last log step, else {}.

        Args:
            host: sums since the last log step, by name; those of `epoch_end` reach up to the end of the epoch.
            window: float64 [6], all sums since the last log step, in the order of `epoch_end`.
        """
        if not self._epoch_ends:
            self._epoch += window
            return {}
        ends = [host[f"epoch_{i}"].astype(np.float64) for i in range(len(self._epoch_ends))]
        times = [self._epoch_start_s, *(end_s for _, end_s in self._epoch_ends)]
        count, _, loss, steps, _, not_finite = ends[-1] - (ends[-2] if len(ends) > 1 else -self._epoch)
        self._epoch = window - ends[-1]
        self._epoch_start_s = times[-1]
        if 3 not in self.groups:
            return {}
        return {
            "03_Epoch_Summary/loss": _mean(loss, count),
            "03_Epoch_Summary/images": count,
            "03_Epoch_Summary/minutes_per_epoch": (times[-1] - times[-2]) / 60,
            "03_Epoch_Summary/optimizer_steps": round(steps),
            "03_Epoch_Summary/not_finite_steps": round(not_finite),
        }

    def _noise(self, by_bin, host):
        sums = dict(zip(self._rows, by_bin, strict=True))
        tags = _means("07_Noise_Analysis/std_ratio_", BIN_NAMES, sums["std_ratio"], sums["count"])
        tags |= _means("07_Noise_Analysis/cosine_", BIN_NAMES, sums["cosine"], sums["count"])
        if "latents" in host:
            count, first, second = host["latents"][0], *np.split(host["latents"][1:].astype(np.float64), 2)
            deviation = np.sqrt(np.maximum(0, second / count - (first / count) ** 2))
            for channel, (mean, std) in enumerate(zip(first / count, deviation, strict=True)):
                tags[f"07_Noise_Analysis/latent_mean_c{channel}"] = float(mean)
                tags[f"07_Noise_Analysis/latent_std_c{channel}"] = float(std)
            norm, num_tokens, num_positions = host["text"]
            tags["07_Noise_Analysis/embedding_norm"] = float(norm / num_tokens)
            tags["07_Noise_Analysis/padded_fraction"] = float(1 - num_tokens / num_positions)
        return tags

    def _learning_rates(self, step, optimizer):
        tags = {}
        if 1 in self.groups:
            tags["01_Training/images_seen"] = step * self._images // max(1, self._num_steps)
            tags["01_Training/learning_rate"] = optimizer.param_groups[0]["lr"]
        if 4 in self.groups:
            for number, group in enumerate(optimizer.param_groups):
                tags[f"04_Learning_Rate/group_{number}"] = group["lr"]
                if "d" in group:  # Prodigy's estimate, by which the learning rate is multiplied
                    tags[f"04_Learning_Rate/prodigy_d_{number}"] = float(group["d"])
        return tags


def _mean(total, count):
    """Returns total / count; nan for a count of 0, since 0 would look like a perfect loss."""
    return float(total / count) if count else float("nan")


def _means(prefix, names, sums, counts):
    """Returns {prefix + name: mean}; names without samples are left out."""
    return {
        f"{prefix}{name}": float(total / count)
        for name, total, count in zip(names, sums, counts, strict=True)
        if count
    }
