"""Notices attention layers whose queries and keys have stopped learning, which a mean over all layers hides."""

import numpy as np

from cachetrain.log import warn

PATIENCE = 20  # log steps running; also how many make the early median
LOWEST_RMS, LOWEST_SHARE, LOWEST_RATIO = 1e-7, 0.01, 1e-3
_MAX_NAMES = 6


class Health:
    """Warns on stderr, by name, once for each layer and condition.

    Args:
        layers: names of the attention layers.
        warmup_steps: of the learning rate; small gradients count only after them.
        loss_scaling: float16 training, where the scaler skips the steps whose gradients are not finite.
    """

    def __init__(self, layers, warmup_steps, loss_scaling=False):
        self.layers, self.warmup_steps, self.loss_scaling = np.array(layers), warmup_steps, loss_scaling
        # With a warm-up from zero the first update changes nothing: zero-initialised outputs still block the second.
        self._first_steps = 2 if warmup_steps else 1
        self._early, self._early_norm = None, None
        self._early_rms, self._early_norms = [], []
        self._low, self._low_ratio = np.zeros(len(layers), int), np.zeros(len(layers), int)
        self._told = {}

    def watch(self, step, qk_rms, v_ratio, grad_norm):
        """Looks at one log step.

        Args:
            qk_rms, v_ratio: float [layers], Gradients' attributes; v_ratio is nan where it is not known.
            grad_norm: global norm of all gradients.
        """
        finite = np.isfinite(qk_rms)
        if not self.loss_scaling:
            self._tell("not finite", ~finite, f"query and key gradients are not finite at step {step}")
        if step > self._first_steps:
            self._tell("zero", qk_rms == 0, f"query and key gradients are exactly zero at step {step}")
        if step <= self.warmup_steps or not (finite.all() and np.isfinite(grad_norm)):
            return
        self._count(qk_rms, v_ratio, grad_norm)
        self._tell(
            "low",
            (self._low >= PATIENCE) & (qk_rms > 0),
            f"query and key gradients have faded, and the others have not (step {step}; RMS below "
            f"{LOWEST_RMS:g}, or below {LOWEST_SHARE:.0%} of what it was early on)",
        )
        self._tell(
            "ratio",
            (self._low_ratio >= PATIENCE) & (qk_rms > 0),
            f"query and key gradients stay below {LOWEST_RATIO:g} of the value gradients (step {step})",
        )

    def _count(self, qk_rms, v_ratio, grad_norm):
        """Counts how many log steps running each layer has been low."""
        low = qk_rms < LOWEST_RMS
        if self._early is not None:
            # Where all gradients have fallen alike, the model has learned, or the loss is scaled otherwise.
            low = (low | (qk_rms < LOWEST_SHARE * self._early)) & (grad_norm >= LOWEST_SHARE * self._early_norm)
        else:
            self._early_rms.append(qk_rms)
            self._early_norms.append(grad_norm)
            if len(self._early_norms) == PATIENCE:
                self._early, self._early_norm = np.median(self._early_rms, axis=0), np.median(self._early_norms)
        self._low = np.where(low, self._low + 1, 0)
        self._low_ratio = np.where(np.nan_to_num(v_ratio, nan=1.0) < LOWEST_RATIO, self._low_ratio + 1, 0)

    def _tell(self, condition, affected, message):
        told = self._told.setdefault(condition, np.zeros(len(self.layers), bool))
        names = self.layers[affected & ~told].tolist()
        told |= affected
        if names:
            more = f" and {len(names) - _MAX_NAMES} more layers" if len(names) > _MAX_NAMES else ""
            warn(f"{', '.join(names[:_MAX_NAMES])}{more}: {message}; see 11_Gradient_Stats/qk_rms")
