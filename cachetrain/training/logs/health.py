"""Warns of attention layers whose queries and keys have stopped learning, which a mean over all layers hides."""

from collections import deque

import numpy as np

from cachetrain.log import counted, warn

WINDOW = 20  # log steps; gradients must be low in most of the last ones; also those of the early median
LOWEST_RMS = 1e-7  # of query and key gradients
LOWEST_SHARE = 0.01  # of the early median
LOWEST_RATIO = 1e-3  # of query and key gradients to value gradients
_MAX_NAMES = 6


class Health:
    """Warns of each layer by name, once per condition.

    Args:
        layers: names of the attention layers.
        warmup_steps: of the learning rate; small gradients are ignored until then.
        loss_scaling: float16 training, where overflowing gradients are normal and their steps are skipped.
        qk_tag: of Gradients.
    """

    def __init__(self, layers: list[str], warmup_steps: int, loss_scaling: bool = False, qk_tag: str = "qk"):
        self.layers = np.array(layers)
        self.warmup_steps = warmup_steps
        self.loss_scaling = loss_scaling
        self.qk_tag = qk_tag
        # Zero-initialized outputs block gradients at the first step, and at the second if the first update changed
        # nothing, as with a warm-up from 0.
        self._first_steps = 2 if warmup_steps else 1
        self._early_rms = []
        self._early_norms = []
        self._early_median_rms = None
        self._early_median_norm = None
        self._low = deque(maxlen=WINDOW)  # bool [layers] of each log step
        self._low_ratio = deque(maxlen=WINDOW)
        self._warned = {}

    def watch(self, step: int, qk_rms: np.ndarray, v_ratio: np.ndarray, grad_norm: float) -> None:
        """Checks the gradients of a log step.

        Args:
            step: optimizer step.
            qk_rms, v_ratio: float [layers], attributes of Gradients; v_ratio is nan where unknown.
            grad_norm: global norm of all gradients.
        """
        finite = np.isfinite(qk_rms)
        if not self.loss_scaling:
            self._warn_once("not finite", ~finite, f"query and key gradients are not finite at step {step}")
        if step > self._first_steps:
            self._warn_once("zero", qk_rms == 0, f"query and key gradients are exactly zero at step {step}")
        if step <= self.warmup_steps or not (finite.all() and np.isfinite(grad_norm)):
            return
        self._count(qk_rms, v_ratio, grad_norm)
        self._warn_once(
            "low",
            _mostly(self._low) & (qk_rms > 0),
            f"query and key gradients have vanished, and other gradients have not (step {step}; RMS below "
            f"{LOWEST_RMS:g}, or below {LOWEST_SHARE:.0%} of its early median)",
        )
        self._warn_once(
            "ratio",
            _mostly(self._low_ratio) & (qk_rms > 0),
            f"query and key gradients stay below {LOWEST_RATIO:g} of the value gradients (step {step})",
        )

    def _count(self, qk_rms, v_ratio, grad_norm):
        """Notes at which of the last log steps the gradients of each layer were low."""
        low = qk_rms < LOWEST_RMS
        if self._early_median_rms is not None:
            # If all gradients have fallen together, the model has learned, or the scale of the loss has changed.
            others_high = grad_norm >= LOWEST_SHARE * self._early_median_norm
            low = (low | (qk_rms < LOWEST_SHARE * self._early_median_rms)) & others_high
        else:
            self._early_rms.append(qk_rms)
            self._early_norms.append(grad_norm)
            if len(self._early_norms) == WINDOW:
                self._early_median_rms = np.median(self._early_rms, axis=0)
                self._early_median_norm = np.median(self._early_norms)
        self._low.append(low)
        self._low_ratio.append(np.nan_to_num(v_ratio, nan=1.0) < LOWEST_RATIO)

    def _warn_once(self, condition, holds, message):
        """Warns of the layers for which the condition holds (bool [layers]) and of which no warning was given yet."""
        warned = self._warned.setdefault(condition, np.zeros(len(self.layers), bool))
        names = self.layers[holds & ~warned].tolist()
        warned |= holds
        if names:
            more = f" and {counted(len(names) - _MAX_NAMES, 'more layer')}" if len(names) > _MAX_NAMES else ""
            warn(f"{', '.join(names[:_MAX_NAMES])}{more}: {message}; see 11_Gradient_Stats/{self.qk_tag}_rms")


def _mostly(steps):
    """Whether each layer was low in at least three quarters of the last WINDOW log steps, bool [layers].

    A saturated layer passes a large gradient now and then, whenever two of its keys match a query almost equally.
    """
    return np.mean(steps, axis=0) >= 0.75 if len(steps) == WINDOW else np.zeros(len(steps[0]), bool)
