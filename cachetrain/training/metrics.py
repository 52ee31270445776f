"""TensorBoard and metrics.jsonl, and the running sums behind the scalars."""

import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter


class Metrics:
    """Writes each scalar to TensorBoard and, one line per log step, to `<output_dir>/metrics.jsonl`."""

    def __init__(self, output_dir, log_dir):
        self.writer = SummaryWriter(str(log_dir), flush_secs=30)
        self._file = open(Path(output_dir) / "metrics.jsonl", "a", encoding="utf-8")

    def scalars(self, step, values):
        """Writes {tag: float} at an optimizer step."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def text(self, tag, content):
        self.writer.add_text(tag, content, 0)

    def image(self, tag, image, step):
        """Writes a PIL image."""
        self.writer.add_image(tag, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self):
        self.writer.close()
        self._file.close()


class Window:
    """What happened since the last log step. Sums stay on the device until `read` takes them off, all at once."""

    def __init__(self, device):
        self.device = device
        self._reset()

    def _reset(self):
        self._sums = torch.zeros(2, device=self.device)
        self._count = 0
        self.wait_s = 0.0
        self._start_s = time.perf_counter()
        self._images = 0

    def add(self, loss, raw, num_images):
        """Adds one micro-batch: `loss` as optimised, `raw` plain MSE; both 0-dim tensors."""
        self._sums += torch.stack([loss.detach(), raw.detach()])
        self._count += 1
        self._images += num_images

    def read(self, **tensors):
        """Returns the window's means, `tensors` (0-dim) and rates as floats, and starts the next window.

        This is where the host waits for the device: all values leave it as ONE tensor.
        """
        count = max(1, self._count)
        loss, raw, *rest = torch.stack(
            [*(self._sums / count), *(t.to(self.device) for t in tensors.values())]
        ).tolist()
        elapsed_s = time.perf_counter() - self._start_s
        values = {
            "loss": loss,
            "loss_raw": raw,
            **dict(zip(tensors, rest, strict=True)),
            "images_per_second": self._images / elapsed_s,
            "data_wait_fraction": self.wait_s / elapsed_s,
        }
        self._reset()
        return values
