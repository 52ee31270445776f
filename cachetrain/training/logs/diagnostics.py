"""Costlier looks at a run, every --diagnostic_steps: weights and their updates, histograms, one latent denoised."""

import numpy as np
import torch
from PIL import Image

from cachetrain.diffusion.objective import alpha_sigma
from cachetrain.distributed import local_parts
from cachetrain.log import warn
from cachetrain.modeling.conditioning import moved, predict
from cachetrain.sampling.render import grid
from cachetrain.training.logs.gradients import block_of, named_tags, positions_of, trained_parameters

TIMESTEPS = (100, 300, 500, 700, 900)
_HISTOGRAM_BINS = 50
_HISTOGRAM_NAMES = (".to_q.", ".to_k.", ".to_v.", ".to_out.", ".conv_in.", ".conv_out.")

# Linear approximations of VAE decoders: latents (scaled) [C] to RGB in [-1, 1], as ComfyUI's latent_formats.
_LATENT_RGB = {
    "img_sdvae": [[0.3512, 0.2297, 0.3227], [0.3250, 0.4974, 0.2350], [-0.2829, 0.1762, 0.2721],
                  [-0.2120, -0.2616, -0.7177]],
    "img_sdxl": [[0.3651, 0.4232, 0.4341], [-0.2533, -0.0042, 0.1068], [0.1076, 0.1111, -0.0362],
                 [-0.3165, -0.2492, -0.2188]],
}  # fmt: skip


class Diagnostics:
    """Groups 09, 10 and 13. Draws from no generator of training and changes nothing of it.

    Args:
        unet: the module itself, not its distributed wrapper.
        every: optimizer steps between two looks.
        groups: numbers of the groups to log.
        world: World; all ranks take part.
    """

    def __init__(self, unet, every, groups, world, device):
        self.unet, self.every, self.groups, self.world, self.device = unet, every, frozenset(groups), world, device
        named = trained_parameters(unet)
        self._names, self._parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self._blocks, slots = positions_of([block_of(name) for name in self._names])
        self._slots = torch.tensor(slots, device=device)
        self._before = None

    def due(self, step):
        """Whether this step is looked at; it should be a log step too."""
        return step % self.every == 0 and not self.groups.isdisjoint({9, 10, 13})

    @torch.no_grad()
    def before(self, step):
        """Keeps the weights, right before the optimizer's step. That takes their memory once more until `after`;
        activations have been freed by then.
        """
        if not self.due(step) or 9 not in self.groups:
            return
        try:
            self._before = [p.clone() for p in local_parts(self._parameters)]
        except torch.OutOfMemoryError:
            warn(f"step {step}: no memory for a copy of the weights, so 09_Parameter_Stats has no update ratios")

    @torch.no_grad()
    def after(self, step):
        """Returns ({tag: float}, {tag: (counts, edges)}), right after the optimizer's step; empty unless due."""
        if not self.due(step):
            return {}, {}
        tags = self._parameter_tags() if 9 in self.groups else {}
        return tags, self._parameter_histograms() if 10 in self.groups else {}

    def _parameter_tags(self):
        weights = local_parts(self._parameters)
        sums = [torch.stack(torch._foreach_norm(weights, 2, dtype=torch.float32)).square()]
        if self._before is not None:
            pairs = list(zip(weights, self._before, strict=True))
            updates = [torch.linalg.vector_norm(new - old, dtype=torch.float32).square() for new, old in pairs]
            same = [(new.bfloat16() == old.bfloat16()).sum().float() for new, old in pairs]
            sums += [torch.stack(updates), torch.stack(same)]
        else:  # a rank had no memory for it: what all ranks sum has one shape
            sums += 2 * [torch.full_like(sums[0], torch.nan)]
        self._before = None
        by_block = torch.zeros(len(sums), len(self._blocks), device=self.device)
        by_block.index_add_(1, self._slots, torch.stack(sums))
        if not _sharded(self._parameters):
            by_block /= self.world.ranks  # alike on all ranks
        squares, updates, same = self.world.sum(by_block).cpu().numpy().astype(np.float64)  # host waits
        norms = np.sqrt(squares)
        tags = named_tags("09_Parameter_Stats/weight_norm", self._blocks, norms)
        if not np.isnan(same).any():
            ratios = np.sqrt(updates) / np.maximum(norms, 1e-30)
            tags |= named_tags("09_Parameter_Stats/update_ratio", self._blocks, ratios)
            numel = sum(parameter.numel() for parameter in self._parameters)
            tags["09_Parameter_Stats/bf16_lost_fraction"] = float(same.sum()) / numel
        return tags

    def _parameter_histograms(self):
        """Histograms of attention weights and of the first and last convolution; sharded ones of this rank's part."""
        wanted = [
            (name, weight)
            for name, weight in zip(self._names, local_parts(self._parameters), strict=True)
            if any(part in f".{name}" for part in _HISTOGRAM_NAMES) and weight.numel()
        ]
        if not wanted:
            return {}
        limits = torch.stack([torch.stack(weight.float().aminmax()) for _, weight in wanted]).tolist()  # host waits
        histograms = {}
        for (name, weight), (low, high) in zip(wanted, limits, strict=True):
            if np.isfinite([low, high]).all():
                high = max(high, low + 1e-12)
                counts = torch.histc(weight.float(), _HISTOGRAM_BINS, low, high)
                histograms[f"10_Parameter_Histograms/{name}"] = (counts, np.linspace(low, high, _HISTOGRAM_BINS + 1))
        counts = torch.stack([counts for counts, _ in histograms.values()]).cpu().numpy()  # host waits
        return {tag: (own, edges) for own, (tag, (_, edges)) in zip(counts, histograms.items(), strict=True)}


class FixedLatent:
    """Group 13: one latent of the data at TIMESTEPS, always with the same noise.

    Args:
        run: Run.
        unet: the module itself.
        sample: dict as CachedPairs gives it.
    """

    def __init__(self, run, unet, sample):
        self.run = run
        self.unet = unet
        self._dtype = next(unet.parameters()).dtype
        latents = sample["latents"]
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        kind = run.index.image_header.metadata.get("kind") or "img_sdvae"
        self._factors = rgb_factors(kind, len(latents))
        self._latents, self._noise = latents[None].to(run.device), noise[None].to(run.device)
        arguments = run.conditioning.collate([sample["condition"]], multiple=1)
        self._arguments = moved(arguments, run.device, self._dtype)

    @torch.no_grad()
    def picture(self):
        """Returns a PIL image: per timestep a column of the noisy latent, the predicted x_0 and its error.

        All ranks of a sharded model take part. This is a place where the host waits for the device.
        """
        objective = self.run.objective
        rows = [[], [], []]
        with torch.compiler.set_stance("force_eager"):  # a batch of one would be compiled on its own
            for number in TIMESTEPS:
                timestep = torch.tensor([number], device=self._latents.device)
                alpha, sigma = alpha_sigma(objective, timestep, self.run.alphas_cumprod)
                noisy = alpha * self._latents + sigma * self._noise
                with self.run.autocast():
                    prediction = predict(self.unet, noisy.to(self._dtype), timestep, self._arguments)
                predicted = predicted_x0(objective, noisy, prediction.float(), alpha, sigma)
                for row, latents in zip(rows, (noisy, predicted, predicted - self._latents), strict=True):
                    row.append(latents[0])
        images = latents_to_images(torch.stack([latents for row in rows for latents in row]).cpu(), self._factors)
        labels = [f"{name} t={number}" for name in ("noisy", "predicted x0", "error") for number in TIMESTEPS]
        return grid(images, labels, len(TIMESTEPS))


def predicted_x0(objective, noisy, prediction, alpha, sigma):
    """The x_0 that a prediction stands for; inverse of objective.target_of, for all [B, C, h, w]."""
    if objective == "epsilon":
        return (noisy - sigma * prediction) / alpha
    if objective == "v_prediction":
        return alpha * noisy - sigma * prediction
    return noisy - sigma * prediction


def rgb_factors(kind, channels):
    """Float32 [C, 3]: what each latent channel adds to red, green and blue; unknown VAEs show their first three."""
    factors = torch.tensor(_LATENT_RGB.get(kind, _LATENT_RGB["img_sdvae"]))
    return factors if channels == len(factors) else 0.5 * torch.eye(channels, 3)


def latents_to_images(latents, factors):
    """Approximates a decoder linearly.

    Args:
        latents: float32 [N, C, h, w], scaled, on the CPU.
        factors: [C, 3], of `rgb_factors`.

    Returns:
        list of N PIL images of (h, w); zero is mid-grey.
    """
    colours = torch.einsum("nchw,cd->nhwd", latents, factors).nan_to_num()
    pixels = colours.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    return [Image.fromarray(image) for image in pixels]


def _sharded(parameters):
    return local_parts(parameters[:1])[0] is not parameters[0]
