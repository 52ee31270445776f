"""Findings on a run, each with advice; docs/logging.md has the explanations."""

from collections.abc import Mapping

import numpy as np

from cachetrain.log import counted

_PATIENCE = 5  # validations without improvement before a note
_HARDLY_FALLEN = 0.98  # lowest validation loss, as a fraction of the first
_RISEN_VALIDATION = 1.1  # last validation loss, as a multiple of the lowest
_RISEN_TRAINING = 1.25  # training loss of the last tenth of the run, as a multiple of the lowest tenth
_WAITING = 0.05  # fraction of the time
_CLIPPED = 0.9  # fraction of the steps
_LATENT_STD = (0.6, 1.6)  # lowest and highest that are normal


def findings(scalars: Mapping[str, tuple], num_skipped: int) -> list[dict[str, str]]:
    """Assesses a run by its scalars.

    Args:
        scalars: {tag: (steps, values)}.
        num_skipped: number of steps skipped because the loss or gradients were not finite.

    Returns:
        [{level, text}]: level "good", "note" or "bad".
    """
    found = [
        _validation(scalars) or _training_loss(scalars),
        _risen(scalars),
        _scale(scalars),
        _clipped(scalars),
        _waiting(scalars),
    ]
    if num_skipped:
        found.append(
            (
                "bad",
                f"skipped because the loss or gradients were not finite: {counted(num_skipped, 'step')}; look at "
                "quarantine.tsv, lower --lr, or use --precision fp32",
            )
        )
    return [{"level": level, "text": text} for level, text in filter(None, found)]


def _validation(scalars):
    tag = "val/loss_ema" if "val/loss_ema" in scalars else "val/loss"
    steps, values = _finite(scalars, tag)
    if len(values) < 2:
        return None
    best = int(np.argmin(values))
    first = f"{tag} fell from {values[0]:.4g} (step {steps[0]:,})"
    if best == 0:
        return "bad", f"{tag} has not fallen below its first value, {values[0]:.4g} at step {steps[0]:,}"
    if len(values) - 1 - best >= _PATIENCE:
        return "note", (
            f"{first} to {values[best]:.4g} at step {steps[best]:,} and has not improved in the "
            f"{len(values) - 1 - best} validations since: the model may be memorizing the training data"
        )
    if values[best] > _HARDLY_FALLEN * values[0]:
        return "note", (
            f"{tag} has hardly fallen: {values[0]:.4g} at step {steps[0]:,}, at best {values[best]:.4g} "
            f"at step {steps[best]:,}. This is usual in fine-tuning; when training from scratch, look at the "
            "gradients and try another --lr"
        )
    if values[-1] > _RISEN_VALIDATION * values[best]:
        return "bad", (
            f"{tag} is rising: {values[best]:.4g} at step {steps[best]:,}, {values[-1]:.4g} at step "
            f"{steps[-1]:,}. If the training loss falls, the model is memorizing; if not, lower --lr"
        )
    last = "the lowest so far" if best == len(values) - 1 else f"lowest {values[best]:.4g} at step {steps[best]:,}"
    return "good", f"{first} to {values[-1]:.4g} (step {steps[-1]:,}), {last}"


def _training_loss(scalars):
    _, values = _finite(scalars, "01_Training/loss_raw")
    tenth = len(values) // 10
    if tenth < 2:
        return None
    early, late = np.median(values[:tenth]), np.median(values[-tenth:])
    summary = f"loss_raw: {early:.4g} in the first tenth of the run, {late:.4g} in the last"
    if late < 0.95 * early:
        return "good", f"{summary}; use --val_split to see whether the model learns or memorizes"
    return "note", f"{summary}. A loss that hardly falls is usual in fine-tuning; judge by samples and --val_split"


def _risen(scalars):
    steps, values = _finite(scalars, "01_Training/loss_raw")
    if len(values) < 30:
        return None
    tenths = [(steps[part[0]], np.median(values[part])) for part in np.array_split(np.arange(len(values)), 10)]
    step, lowest = min(tenths, key=lambda tenth: tenth[1])
    if tenths[-1][1] < _RISEN_TRAINING * lowest:
        return None
    return "bad", (
        f"loss_raw has risen again, from about {lowest:.4g} after step {step:,} to {tenths[-1][1]:.4g}: lower --lr"
    )


def _scale(scalars):
    channels = [tag for tag in scalars if tag.startswith("07_Noise_Analysis/latent_std_c")]
    stds = [np.median(_finite(scalars, tag)[1]) for tag in channels if len(_finite(scalars, tag)[1])]
    if not stds or _LATENT_STD[0] <= np.mean(stds) <= _LATENT_STD[1]:
        return None
    return "bad", (
        f"the latents have a standard deviation of {np.mean(stds):.3g}, expected about 1: the VAE's scaling factor "
        "is wrong; check --vae_scaling_factor, and whether the caches were made with this model's VAE"
    )


def _clipped(scalars):
    share = _recent(scalars, "01_Training/clipped_fraction")
    if share is None or share < _CLIPPED:
        return None
    return "note", (
        f"{share:.0%} of the recent steps were clipped, so their gradients all have the same norm; lower --lr if "
        "the loss is unsteady, else raise --gradient_clip"
    )


def _waiting(scalars):
    share = _recent(scalars, "05_Performance/data_wait_fraction")
    if share is None or share < _WAITING:
        return None
    return "bad", (
        f"{share:.0%} of the recent time was spent waiting for data: use more --num_workers, --cache_in_ram, or a "
        "faster disk"
    )


def _recent(scalars, tag):
    """Returns the median of the last quarter of the values; None if there are none."""
    values = _finite(scalars, tag)[1]
    return float(np.median(values[-max(1, len(values) // 4) :])) if len(values) else None


def _finite(scalars, tag):
    """Returns (steps, values) as arrays, without values that are not finite."""
    steps, values = (np.asarray(part) for part in scalars.get(tag, ([], [])))
    finite = np.isfinite(values.astype(np.float64))
    return steps[finite], values[finite]
