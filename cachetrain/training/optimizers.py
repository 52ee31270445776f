"""All that is known of each optimizer: to add one, add a row. Imports no torch."""

from typing import NamedTuple

EPS = 1e-8  # of all Adam-like optimizers, torch's default: diffusion gradients are often below optimi's 1e-6
# bfloat16 has 8 significant bits: an average that loses less than 2^-8 = 0.0039 of itself a step is rounded back.
BF16_MAX_BETA = 0.995


class Implementation(NamedTuple):
    """A class of optimizers, and what the code around it relies on.

    Attributes:
        constructor: dotted name of the class, which takes (groups of parameters, lr, betas, **options).
        options: further arguments.
        state_fields: what it keeps of each parameter once it has stepped; a checkpoint must have it.
        group_fields: what it keeps in its group of parameters; all else there is settings, which are a resumed run's
            own.
        skips_on_device: it leaves everything as it was where its `found_inf` is 1, as torch's fused optimizers do;
            without it the host must wait for the device once a step, to decide whether to step at all.
        releases: its step takes one parameter at a time, for --gradient_release.
        matrix_fields: what it keeps of a matrix, if that is not `state_fields`.
        takes_names: it is given the names of the parameters.
    """

    constructor: str
    options: dict
    state_fields: frozenset[str]
    group_fields: frozenset[str] = frozenset()
    skips_on_device: bool = False
    releases: bool = False
    matrix_fields: frozenset[str] | None = None
    takes_names: bool = False


class Optimizer(NamedTuple):
    """A row of OPTIMIZERS.

    Attributes:
        float32: Implementation for float32 weights.
        bfloat16: Implementation for bfloat16 weights, with a Kahan sum that keeps the low bits of the updates; None:
            there is none, and --precision bf16_pure is refused.
        state_tensors: tensors of state per parameter, in the size and dtype of the weight, without the Kahan sum.
        betas: the default ones.
        package: what to install with pip; None: it is there.
        fsdp: whether it can step sharded weights.
        finds_rate: it finds the learning rate itself and multiplies it by --learning_rate, which should be about 1.
    """

    float32: Implementation
    bfloat16: Implementation | None
    state_tensors: float
    betas: tuple[float, float]
    package: str | None = None
    fsdp: bool = True
    finds_rate: bool = False

    def for_weights(self, bf16_weights: bool) -> Implementation | None:
        return self.bfloat16 if bf16_weights else self.float32

    def state_bytes(self, weight_bytes: int) -> float:
        """Bytes of state per trained parameter, whose weight takes 2 (bfloat16, with the Kahan sum) or 4."""
        return weight_bytes * (self.state_tensors + (weight_bytes == 2))


_MOMENTS = frozenset({"exp_avg", "exp_avg_sq"})
_TORCH_ADAMW = Implementation(
    "torch.optim.AdamW", {"eps": EPS, "fused": True}, _MOMENTS | {"step"}, skips_on_device=True
)
# The advice of Prodigy's authors for diffusion models.
_PRODIGY = Implementation(
    "prodigyopt.Prodigy",
    {"eps": EPS, "safeguard_warmup": True, "use_bias_correction": True},
    _MOMENTS | {"step", "s", "p0"},
    frozenset({"d", "d_max", "d_numerator", "d_denom", "d_hat", "k"}),
)
_ADAMW8 = Implementation("bitsandbytes.optim.AdamW8bit", {"eps": EPS}, frozenset({"step", "state1", "state2"}))


def _optimi(name, options, fields, group_fields, bf16_weights):
    group_fields = group_fields | {"setup"}
    if bf16_weights:
        fields = fields | {"kahan_comp"}
        group_fields |= {"kahan_sum", "pending_decay"}  # the second is ours: training/optim.py
    return Implementation(f"optimi.{name}", options, fields, frozenset(group_fields), releases=True)


def _by_matrix(name, options, fields, matrix_fields, bf16_weights, **more):
    kept, group_fields = ({"kahan_comp"}, {"pending_decay"}) if bf16_weights else (set(), set())
    more |= {"releases": True, "matrix_fields": frozenset(matrix_fields | kept)}
    constructor = f"cachetrain.training.matrix_optimizers.{name}"
    return Implementation(constructor, options, frozenset(fields | kept), frozenset(group_fields), **more)


_ADAMW_BF16 = _optimi("AdamW", {"eps": EPS}, _MOMENTS, {"step"}, True)
_LION = [_optimi("Lion", {}, frozenset({"exp_avg"}), set(), bf16_weights) for bf16_weights in (False, True)]
_STABLE = [_optimi("StableAdamW", {"eps": EPS}, _MOMENTS, {"step"}, bf16_weights) for bf16_weights in (False, True)]
_MUON = [
    _by_matrix("Muon", {"eps": EPS}, _MOMENTS | {"step"}, {"momentum_buffer"}, bf16_weights, takes_names=True)
    for bf16_weights in (False, True)
]
_ADAFACTOR = [
    _by_matrix("Adafactor", {}, {"variance", "step"}, {"row_var", "col_var", "step"}, bf16_weights)
    for bf16_weights in (False, True)
]

OPTIMIZERS = {
    #                        float32       bfloat16     tensors  betas
    "adamw":       Optimizer(_TORCH_ADAMW, _ADAMW_BF16, 2,       (0.9, 0.999)),
    "lion":        Optimizer(*_LION,                    1,       (0.9, 0.99)),
    "stableadamw": Optimizer(*_STABLE,                  2,       (0.9, 0.99)),
    "muon":        Optimizer(*_MUON,                    1,       (0.95, 0.999), fsdp=False),
    "adafactor":   Optimizer(*_ADAFACTOR,               0,       (0.0, 0.0), fsdp=False),
    "adamw8":      Optimizer(_ADAMW8,      None,        0.5,     (0.9, 0.999), "bitsandbytes", fsdp=False),
    "prodigy":     Optimizer(_PRODIGY,     None,        4,       (0.9, 0.999), "prodigyopt", fsdp=False,
                             finds_rate=True),
}  # fmt: skip
KAHAN_OPTIMIZERS = tuple(name for name, optimizer in OPTIMIZERS.items() if optimizer.bfloat16)


def default_betas(name: str, bf16_weights: bool) -> tuple[float, float]:
    """The betas of an optimizer; bfloat16 moments get a second one that they can follow."""
    first, second = OPTIMIZERS[name].betas
    return first, min(second, 0.99) if bf16_weights else second


def check_optimizer(name: str, lr: float, betas: tuple[float, float], bf16_weights: bool) -> None:
    """Refuses settings with which an optimizer would not train.

    Args:
        name: one of OPTIMIZERS.
        lr: peak learning rate.
        betas: (first, second), each from 0 to below 1.
        bf16_weights: whether the weights themselves are bfloat16 (--precision bf16_pure).

    Raises:
        ValueError: too small a rate for an optimizer that scales its own; no Kahan sum or too slow a moment for
            bfloat16 weights.
    """
    if OPTIMIZERS[name].finds_rate and lr < 0.1:
        raise ValueError(
            f"--optimizer {name} finds the rate itself and scales it by --learning_rate: {lr} is far "
            "too small; use --learning_rate 1"
        )
    if not bf16_weights:
        return
    if name not in KAHAN_OPTIMIZERS:
        raise ValueError(
            f"--precision bf16_pure: {name} has no Kahan sum and would lose small updates; use "
            f"--optimizer {', '.join(KAHAN_OPTIMIZERS)}, or --precision bf16"
        )
    if max(betas) > BF16_MAX_BETA:
        raise ValueError(
            f"--betas {betas[0]} {betas[1]}: a bfloat16 average cannot follow betas above "
            f"{BF16_MAX_BETA}; use 0.99, or --precision bf16"
        )
