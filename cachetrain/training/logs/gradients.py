"""Gradient norms: of everything, of each block, and of the queries and keys of each attention layer."""

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from cachetrain.distributed import local_parts


def block_of(name):
    """The block a parameter belongs to: "conv_in", "down_blocks.0", "mid_block", ..."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if second.isdecimal() else first


def trained_parameters(model):
    """[(name, parameter)] of those that are trained."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def positions_of(labels):
    """Returns (the distinct labels in order, the place of each label among them)."""
    distinct = list(dict.fromkeys(labels))
    places = {label: place for place, label in enumerate(distinct)}
    return distinct, [places[label] for label in labels]


class Gradients:
    """Measures the gradients of a model's trained parameters without a host-device wait.

    Gradients of fully_shard are sharded: each rank's norms are then squared and summed over the ranks, one collective
    a step. With DDP they are alike on all ranks.

    Args:
        model: its parameters' requires_grad is final.
        world: World.
        average, detailed: whether log steps need qk_grads_av (group 01), and norms by block and layer (group 11).

    Attributes:
        blocks: names of the blocks.
        layers: names of the attention layers with trained queries or keys.
        total: float32 0-dim, the global norm at the last step.
        qk_rms, v_ratio: float [layers], of the last `tags`: the root mean square of each layer's query and key
            gradients, and its ratio to that of the values (nan where those are not trained).
    """

    def __init__(self, model, world, device, average=True, detailed=True):
        named = trained_parameters(model)
        self.world, self.device, self.average, self.detailed = world, device, average, detailed
        self._parameters = [parameter for _, parameter in named]
        self.sharded = any(isinstance(parameter, DTensor) for parameter in self._parameters)
        self._zero = torch.zeros((), device=device)
        self.total = self._zero
        self.blocks, slots = positions_of([block_of(name) for name, _ in named])
        self._group_attention(named, slots)
        self.qk_rms = self.v_ratio = np.zeros(len(self.layers))

    def _group_attention(self, named, slots):
        """Finds out which norms make up which sum: sources[i] is added to slot slots[i]."""
        parts = [name.removesuffix(".weight").rpartition(".") for name, _ in named]
        qk = [i for i, (_, _, kind) in enumerate(parts) if kind in ("to_q", "to_k")]
        self.layers, layer_ids = positions_of([parts[i][0] for i in qk])
        values = [i for i, (layer, _, kind) in enumerate(parts) if kind == "to_v" and layer in self.layers]
        value_ids = [self.layers.index(parts[i][0]) for i in values]
        num_blocks, num_layers = len(self.blocks), len(self.layers)
        sources = [*range(len(named)), *qk, *values]
        slots = [*slots, *(num_blocks + i for i in layer_ids), *(num_blocks + num_layers + i for i in value_ids)]
        self._sources, self._slots = (torch.tensor(i, device=self.device) for i in (sources, slots))
        self._qk, self._qk_layers = [self._parameters[i] for i in qk], torch.tensor(layer_ids, device=self.device)
        self._qk_numel, self._v_numel = np.zeros(num_layers), np.zeros(num_layers)
        np.add.at(self._qk_numel, layer_ids, [p.numel() for p in self._qk])
        np.add.at(self._v_numel, value_ids, [self._parameters[i].numel() for i in values])

    @torch.no_grad()
    def measure(self, log_now):
        """Takes the norms of this step's gradients; at a log step those of blocks and layers too.

        Returns:
            float32 0-dim, the global norm; a parameter without a gradient counts as zero.
        """
        grads = [parameter.grad for parameter in self._parameters]
        found = iter(_norms([grad for grad in grads if grad is not None], 2))
        norms = torch.stack([self._zero if grad is None else next(found) for grad in grads])
        if self.sharded:
            norms = self.world.sum(norms.square()).sqrt()
        self.total = torch.linalg.vector_norm(norms)
        if log_now:
            self._sums = self._log_step_sums(norms)
        return self.total

    def _log_step_sums(self, norms):
        # What is alike on all ranks is divided by their number, so that the sum over ranks leaves it as it is.
        alike, own = 1 / self.world.ranks, 1 if self.sharded else 1 / self.world.ranks
        sums = {"grad_norm": self.total * alike}
        if self.average:
            grads = [p.grad for p in self._qk if p.grad is not None]
            self._qk_elements = sum(grad.numel() for grad in grads)
            sums["qk_abs"] = torch.stack(_norms(grads, 1)).sum() * own if grads else self._zero
        if self.detailed:
            by_slot = torch.zeros(len(self.blocks) + 2 * len(self.layers), device=self.device)
            by_slot.index_add_(0, self._slots, norms.square()[self._sources])
            sums["squares"] = by_slot * alike
        if self.detailed and self._qk:
            weights = torch.stack(_norms(self._qk, 2)).square()
            by_layer = torch.zeros(len(self.layers), device=self.device)
            sums["qk_weight_squares"] = by_layer.index_add_(0, self._qk_layers, weights) * own
        return sums

    def sums(self):
        """{name: float32 tensor} of the last log step; to be summed over the ranks."""
        return self._sums

    def tags(self, host):
        """Makes scalars of the sums, and sets qk_rms and v_ratio.

        Args:
            host: {name: numpy} of `sums`, summed over the ranks.
        """
        tags = {}
        if self.average:
            tags["01_Training/grad_norm"] = float(host["grad_norm"][0])
            if self._qk:
                tags["01_Training/qk_grads_av"] = float(host["qk_abs"][0]) / max(1, self._qk_elements)
        if self.detailed:
            blocks, qk, v = np.split(host["squares"], [len(self.blocks), len(self.blocks) + len(self.layers)])
            tags |= named_tags("11_Gradient_Stats/norm", self.blocks, np.sqrt(blocks))
            if self._qk:
                tags |= self._attention_tags(qk, v, host["qk_weight_squares"])
        return tags

    def _attention_tags(self, qk_squares, v_squares, weight_squares):
        with np.errstate(divide="ignore", invalid="ignore"):
            self.qk_rms = np.sqrt(qk_squares / self._qk_numel)
            self.v_ratio = self.qk_rms / np.sqrt(v_squares / self._v_numel)
            weight_ratio = np.sqrt(qk_squares / weight_squares)
        trained = self._v_numel > 0
        self.v_ratio[~trained] = np.nan
        tags = named_tags("11_Gradient_Stats/qk_rms", self.layers, self.qk_rms)
        tags |= named_tags("11_Gradient_Stats/qk_over_v", np.array(self.layers)[trained], self.v_ratio[trained])
        tags |= named_tags("11_Gradient_Stats/qk_over_weight", self.layers, weight_ratio)
        for kind in ("attn1", "attn2"):
            rms = [value for name, value in zip(self.layers, self.qk_rms, strict=True) if name.endswith(kind)]
            if rms:
                tags[f"11_Gradient_Stats/qk_rms_min_{kind}"] = float(np.min(rms))
                tags[f"11_Gradient_Stats/qk_rms_median_{kind}"] = float(np.median(rms))
        return tags


def _norms(tensors, order):
    """List of float32 0-dim norms of this rank's parts."""
    return torch._foreach_norm(local_parts(tensors), order, dtype=torch.float32) if tensors else []


def named_tags(prefix, names, values):
    """{"prefix/name": float} for each name."""
    return {f"{prefix}/{name}": float(value) for name, value in zip(names, values, strict=True)}
