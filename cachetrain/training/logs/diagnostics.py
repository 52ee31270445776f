"""Costlier logs, every --diagnostic_steps: weights and their updates, histograms, a denoised latent."""

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image

from cachetrain.diffusion.objective import alpha_sigma
from cachetrain.distributed import local_shards
from cachetrain.log import warn
from cachetrain.modeling.conditioning import moved, predict
from cachetrain.sampling.render import grid
from cachetrain.training.logs.gradients import block_of, named_tags, number_labels, trained_parameters

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
    """Groups 09 and 10, and when group 13 is due. Changes nothing about the training.

    Args:
        unet: UNet2DConditionModel, not its distributed wrapper.
        every: optimizer steps between two diagnostics.
        groups: numbers of the groups to log.
        world: World.
        device: of the UNet.
    """

    def __init__(self, unet: torch.nn.Module, every: int, groups: Iterable[int], world, device: torch.device):
        self.unet = unet
        self.every = every
        self.groups = frozenset(groups)
        self.world = world
        self.device = device
        named = trained_parameters(unet)
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self._blocks, block_ids = number_labels([block_of(name) for name in self._names])
        self._block_ids = torch.tensor(block_ids, device=device)
        self._weights_before = None
        self.released = False  # whether the backward pass updates the weights, so that no copy comes before it

    def due(self, step: int) -> bool:
        """Whether diagnostics are logged after optimizer step `step`; the step must be a log step, too."""
        return step % self.every == 0 and not self.groups.isdisjoint({9, 10, 13})

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Copies the weights right before the optimizer's step, if diagnostics are due.

        The copy is freed in `after`. Its memory is that of the activations, which have been freed by now.
        """
        if not self.due(step) or 9 not in self.groups or self.released:
            return
        try:
            self._weights_before = [p.clone() for p in local_shards(self._parameters)]
        except torch.OutOfMemoryError:
            warn(
                f"step {step}: no memory for a copy of the weights, so 09_Parameter_Stats has no update ratios; "
                "lower --batch_size, or leave 9 out of --log_groups"
            )

    @torch.no_grad()
    def after(self, step: int) -> tuple[dict[str, float], dict[str, tuple]]:
        """Returns the diagnostics after the optimizer's step; empty unless due. Called by all ranks.

        Returns:
            ({tag: value} of scalars, {tag: (counts, edges)} of histograms).
        """
        if not self.due(step):
            return {}, {}
        tags = self._parameter_tags() if 9 in self.groups else {}
        return tags, self._parameter_histograms() if 10 in self.groups else {}

    def _parameter_tags(self):
        weights = local_shards(self._parameters)
        sums = [torch.stack(torch._foreach_norm(weights, 2, dtype=torch.float32)).square()]
        if self._weights_before is not None:
            pairs = list(zip(weights, self._weights_before, strict=True))
            updates = [torch.linalg.vector_norm(new - old, dtype=torch.float32).square() for new, old in pairs]
            unchanged = [(new.bfloat16() == old.bfloat16()).sum().float() for new, old in pairs]
            sums += [torch.stack(updates), torch.stack(unchanged)]
        else:  # out of memory on this rank: the sums must have the same shape on all ranks
            sums += 2 * [torch.full_like(sums[0], torch.nan)]
        self._weights_before = None
        by_block = torch.zeros(len(sums), len(self._blocks), device=self.device)
        by_block.index_add_(1, self._block_ids, torch.stack(sums))
        if not _is_sharded(self._parameters):
            by_block /= self.world.ranks  # every rank has the same values
        # The host waits for the device here.
        squares, updates, unchanged = self.world.sum(by_block).cpu().numpy().astype(np.float64)
        norms = np.sqrt(squares)
        tags = named_tags("09_Parameter_Stats/weight_norm", self._blocks, norms)
        if not np.isnan(unchanged).any():
            ratios = np.sqrt(updates) / np.maximum(norms, 1e-30)
            tags |= named_tags("09_Parameter_Stats/update_ratio", self._blocks, ratios)
            numel = sum(parameter.numel() for parameter in self._parameters)
            tags["09_Parameter_Stats/bf16_lost_fraction"] = float(unchanged.sum()) / numel
        return tags

    def _parameter_histograms(self):
        """Returns histograms of attention weights and of the first and last convolution, of this rank's shards."""
        selected = [
            (name, weight)
            for name, weight in zip(self._names, local_shards(self._parameters), strict=True)
            if any(part in f".{name}" for part in _HISTOGRAM_NAMES) and weight.numel()
        ]
        if not selected:
            return {}
        # The host waits for the device here, and again below.
        limits = torch.stack([torch.stack(weight.float().aminmax()) for _, weight in selected]).tolist()
        histograms = {}
        for (name, weight), (low, high) in zip(selected, limits, strict=True):
            if np.isfinite([low, high]).all():
                high = max(high, low + 1e-12)
                counts = torch.histc(weight.float(), _HISTOGRAM_BINS, low, high)
                histograms[f"10_Parameter_Histograms/{name}"] = (counts, np.linspace(low, high, _HISTOGRAM_BINS + 1))
        all_counts = torch.stack([counts for counts, _ in histograms.values()]).cpu().numpy()
        edges = (edges for _, edges in histograms.values())
        return dict(zip(histograms, zip(all_counts, edges, strict=True), strict=True))


class FixedLatent:
    """Group 13: one latent of the training data, denoised at TIMESTEPS, always with the same noise.

    Args:
        run: Run.
        unet: UNet2DConditionModel, not its distributed wrapper.
        sample: an item of CachedPairs.
    """

    def __init__(self, run, unet: torch.nn.Module, sample: dict):
        self.run = run
        self.unet = unet
        self._dtype = next(unet.parameters()).dtype
        latents = sample["latents"]
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        kind = run.index.image_header.metadata.get("kind") or "img_sdvae"
        self._factors = rgb_factors(kind, len(latents))
        self._latents = latents[None].to(run.device)
        self._noise = noise[None].to(run.device)
        arguments = run.conditioning.collate([sample["condition"]], multiple=1)
        self._arguments = moved(arguments, run.device, self._dtype)

    @torch.no_grad()
    def picture(self) -> Image.Image:
        """Draws one column per timestep: the noisy latent, the predicted x_0 and its error.

        Called by all ranks; the host waits for the device here.
        """
        objective = self.run.objective
        rows = [[], [], []]
        with torch.compiler.set_stance("force_eager"):  # a batch of one would compile another graph
            for t in TIMESTEPS:
                timestep = torch.tensor([t], device=self._latents.device)
                alpha, sigma = alpha_sigma(objective, timestep, self.run.alphas_cumprod)
                noisy = alpha * self._latents + sigma * self._noise
                with self.run.autocast():
                    prediction = predict(self.unet, noisy.to(self._dtype), timestep, self._arguments)
                predicted = predicted_x0(objective, noisy, prediction.float(), alpha, sigma)
                for row, latents in zip(rows, (noisy, predicted, predicted - self._latents), strict=True):
                    row.append(latents[0])
        images = latents_to_images(torch.stack([latents for row in rows for latents in row]).cpu(), self._factors)
        labels = [f"{name} t={t}" for name in ("noisy", "predicted x0", "error") for t in TIMESTEPS]
        return grid(images, labels, len(TIMESTEPS))


def predicted_x0(
    objective: str, noisy: torch.Tensor, prediction: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """Computes x_0 from a prediction, the inverse of objective.target_of; tensors broadcast to [B, C, h, w]."""
    if objective == "epsilon":
        return (noisy - sigma * prediction) / alpha
    if objective == "v_prediction":
        return alpha * noisy - sigma * prediction
    return noisy - sigma * prediction


def rgb_factors(kind: str, channels: int) -> torch.Tensor:
    """Returns the weight of each latent channel in red, green and blue, float32 [C, 3].

    Args:
        kind: kind of the image caches; the factors of an unknown kind with 4 channels are those of "img_sdvae".
        channels: latent channels; if there are not 4, the first three are shown as red, green and blue.
    """
    factors = torch.tensor(_LATENT_RGB.get(kind, _LATENT_RGB["img_sdvae"]))
    return factors if channels == len(factors) else 0.5 * torch.eye(channels, 3)


def latents_to_images(latents: torch.Tensor, factors: torch.Tensor) -> list[Image.Image]:
    """Decodes latents approximately, by a linear map.

    Args:
        latents: float32 [N, C, h, w], scaled, on the CPU.
        factors: [C, 3], of `rgb_factors`.

    Returns:
        list of N PIL images of (h, w); zero is mid-gray.
    """
    colors = torch.einsum("nchw,cd->nhwd", latents, factors).nan_to_num()
    pixels = colors.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    return [Image.fromarray(image) for image in pixels]


def _is_sharded(parameters):
    return local_shards(parameters[:1])[0] is not parameters[0]
