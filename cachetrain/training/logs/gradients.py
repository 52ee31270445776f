"""Gradient norms: global, of each block, and of the queries and keys of each attention layer."""

import re
from collections.abc import Iterable

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from cachetrain.distributed import local_shards


def block_of(name: str) -> str:
    """Returns the block of a parameter, by its name: "conv_in", "down_blocks.0", "mid_block", ..."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if second.isdecimal() else first


def projection_of(name: str) -> tuple[str, str]:
    """Returns (attention layer, "to_q", "to_k" or "to_v") of the weight of a projection or of its adapter; ("", ""):
    it is of something else."""
    match = re.fullmatch(r"(.+)\.(to_[qkv])(\.lora_\w+\.\w+)?\.weight", name)
    return (match[1], match[2]) if match else ("", "")


def trained_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Returns (name, parameter) of the trained parameters."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def number_labels(labels: list[str]) -> tuple[list[str], list[int]]:
    """Returns (the distinct labels in order of appearance, the position of each label among these)."""
    distinct = list(dict.fromkeys(labels))
    positions = {label: position for position, label in enumerate(distinct)}
    return distinct, [positions[label] for label in labels]


class Gradients:
    """Measures the gradients of a model's trained parameters without waiting for the device.

    With fully_shard, gradients are sharded: the squared norms are summed over the ranks, in one collective a step.
    With DDP, gradients are the same on all ranks.

    Args:
        model: its parameters' requires_grad must not change afterwards.
        world: World.
        device: of the parameters.
        average: whether log steps need grad_norm and (lora_)qk_grads_av (group 01).
        detailed: whether log steps need norms of blocks and layers (group 11).

    Attributes:
        blocks: names of the blocks.
        layers: names of the attention layers with trained queries or keys, or adapters of these.
        qk: the trained weights of queries and keys.
        sharded: whether the parameters are sharded.
        qk_tag: how tags of queries and keys begin: "qk", or "lora_qk" of an adapter.
        released: GradientRelease.norms, of gradients that are freed in the backward pass; None: all are there.
        total: float32 0-dim, the global norm of the last step.
        qk_rms: float [layers], root mean square of each layer's query and key gradients, at the last `tags`.
        v_ratio: float [layers], qk_rms divided by that of the value gradients; nan if values are not trained.
    """

    def __init__(
        self, model: torch.nn.Module, world, device: torch.device, average: bool = True, detailed: bool = True
    ):
        named = trained_parameters(model)
        self.world = world
        self.device = device
        self.average = average
        self.detailed = detailed
        self._parameters = [parameter for _, parameter in named]
        self.sharded = any(isinstance(parameter, DTensor) for parameter in self._parameters)
        self.released = None
        self._zero = torch.zeros((), device=device)
        self.total = self._zero
        self.blocks, block_ids = number_labels([block_of(name) for name, _ in named])
        self._assign_slots(named, block_ids)
        # The gradients of an adapter are not those of the weights that it stands beside.
        self.qk_tag = "lora_qk" if any(".lora_" in name for name, _ in named) else "qk"
        self.qk_rms = np.zeros(len(self.layers))
        self.v_ratio = np.zeros(len(self.layers))

    def _assign_slots(self, named, block_ids):
        """Decides which squared norms are added to which sum: that of parameter _sources[i] to sum _slots[i].

        Sums are: one per block, one per layer for queries and keys, one per layer for values.
        """
        parts = [projection_of(name) for name, _ in named]
        qk = [i for i, (_, kind) in enumerate(parts) if kind in ("to_q", "to_k")]
        self.layers, layer_ids = number_labels([parts[i][0] for i in qk])
        values = [i for i, (layer, kind) in enumerate(parts) if kind == "to_v" and layer in self.layers]
        value_ids = [self.layers.index(parts[i][0]) for i in values]
        num_blocks, num_layers = len(self.blocks), len(self.layers)
        sources = [*range(len(named)), *qk, *values]
        slots = [*block_ids, *(num_blocks + i for i in layer_ids), *(num_blocks + num_layers + i for i in value_ids)]
        self._sources = torch.tensor(sources, device=self.device)
        self._slots = torch.tensor(slots, device=self.device)
        self.qk = [self._parameters[i] for i in qk]
        self._qk_layers = torch.tensor(layer_ids, device=self.device)
        self._qk_numel = np.zeros(num_layers)
        self._v_numel = np.zeros(num_layers)
        np.add.at(self._qk_numel, layer_ids, [p.numel() for p in self.qk])
        np.add.at(self._v_numel, value_ids, [self._parameters[i].numel() for i in values])

    @torch.no_grad()
    def measure(self, log_now: bool) -> torch.Tensor:
        """Measures the gradients of a step; at a log step also the norms of blocks and layers.

        Returns:
            float32 0-dim, the global norm; a parameter without a gradient counts as zero.
        """
        measured = self._gradient_norms(self._parameters, 2)
        norms = torch.stack([measured.get(parameter, self._zero) for parameter in self._parameters])
        if self.sharded:
            norms = self.world.sum(norms.square()).sqrt()
        self.total = torch.linalg.vector_norm(norms)
        if log_now:
            self._sums = self._log_step_sums(norms)
        return self.total

    def _gradient_norms(self, parameters, order):
        """Returns {parameter: float32 0-dim L1 or L2 norm} of this rank's gradients, where there are any."""
        if self.released is not None:
            return {p: self.released[p][int(order == 1)] for p in parameters if p in self.released}
        with_gradient = [p for p in parameters if p.grad is not None]
        return dict(zip(with_gradient, _norms([p.grad for p in with_gradient], order), strict=True))

    def _log_step_sums(self, norms):
        # The caller sums these over the ranks: a value that is the same on all ranks is divided by their number.
        replicated = 1 / self.world.ranks
        local = 1 if self.sharded else replicated
        sums = {"grad_norm": self.total * replicated}
        if self.average:
            norms_of_qk = self._gradient_norms(self.qk, 1)
            self._qk_elements = sum(parameter.numel() for parameter in norms_of_qk)
            sums["qk_abs"] = torch.stack(list(norms_of_qk.values())).sum() * local if norms_of_qk else self._zero
        if self.detailed:
            by_slot = torch.zeros(len(self.blocks) + 2 * len(self.layers), device=self.device)
            by_slot.index_add_(0, self._slots, norms.square()[self._sources])
            sums["squares"] = by_slot * replicated
        if self.detailed and self.qk:
            weights = torch.stack(_norms(self.qk, 2)).square()
            by_layer = torch.zeros(len(self.layers), device=self.device)
            sums["qk_weight_squares"] = by_layer.index_add_(0, self._qk_layers, weights) * local
        return sums

    def sums(self) -> dict[str, torch.Tensor]:
        """Returns {name: float32 tensor} of the last log step, to be summed over the ranks."""
        return self._sums

    def tags(self, host: dict[str, np.ndarray]) -> dict[str, float]:
        """Returns {tag: value}, and sets `qk_rms` and `v_ratio`.

        Args:
            host: the values of `sums`, summed over the ranks.
        """
        tags = {}
        if self.average:
            tags["01_Training/grad_norm"] = float(host["grad_norm"][0])
            if self.qk:
                tags[f"01_Training/{self.qk_tag}_grads_av"] = float(host["qk_abs"][0]) / max(1, self._qk_elements)
        if self.detailed:
            blocks, qk, v = np.split(host["squares"], [len(self.blocks), len(self.blocks) + len(self.layers)])
            tags |= named_tags("11_Gradient_Stats/norm", self.blocks, np.sqrt(blocks))
            if self.qk:
                tags |= self._attention_tags(qk, v, host["qk_weight_squares"])
        return tags

    def _attention_tags(self, qk_squares, v_squares, weight_squares):
        with np.errstate(divide="ignore", invalid="ignore"):
            self.qk_rms = np.sqrt(qk_squares / self._qk_numel)
            self.v_ratio = self.qk_rms / np.sqrt(v_squares / self._v_numel)
            weight_ratio = np.sqrt(qk_squares / weight_squares)
        trained = self._v_numel > 0
        self.v_ratio[~trained] = np.nan
        tags = named_tags(f"11_Gradient_Stats/{self.qk_tag}_rms", self.layers, self.qk_rms)
        layers = np.array(self.layers)[trained]
        tags |= named_tags(f"11_Gradient_Stats/{self.qk_tag}_over_v", layers, self.v_ratio[trained])
        tags |= named_tags(f"11_Gradient_Stats/{self.qk_tag}_over_weight", self.layers, weight_ratio)
        for kind in ("attn1", "attn2"):
            rms = [value for name, value in zip(self.layers, self.qk_rms, strict=True) if name.endswith(kind)]
            if rms:
                tags[f"11_Gradient_Stats/{self.qk_tag}_rms_min_{kind}"] = float(np.min(rms))
                tags[f"11_Gradient_Stats/{self.qk_tag}_rms_median_{kind}"] = float(np.median(rms))
        return tags


def _norms(tensors, order):
    """Returns float32 0-dim norms of this rank's shards, a list."""
    return torch._foreach_norm(local_shards(tensors), order, dtype=torch.float32) if tensors else []


def named_tags(prefix: str, names: Iterable[str], values: Iterable[float]) -> dict[str, float]:
    """Returns {"prefix/name": value}."""
    return {f"{prefix}/{name}": float(value) for name, value in zip(names, values, strict=True)}
