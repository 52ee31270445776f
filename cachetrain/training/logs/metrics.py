"""Writes TensorBoard events and metrics.jsonl."""

import io
import json
import math
import os
import queue
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from cachetrain.log import append_line, describe, warn
from cachetrain.reading import json_lines, open_regular

_FRAME_MS = 250
_LAST_FRAME_MS = 1500
_RGB = 3  # color space number of TensorBoard's image summaries


def open_metrics(
    output_dir: Path, log_dir: Path, start_step: int | None = None, main: bool = True
) -> "Metrics | NoMetrics":
    """Opens Metrics on rank 0 (`main`), NoMetrics on other ranks."""
    return Metrics(output_dir, log_dir, start_step) if main else NoMetrics()


class NoMetrics:
    """Has the methods of Metrics, which do nothing here."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class Metrics:
    """Writes scalars to TensorBoard and, one line per log step, to `<output_dir>/metrics.jsonl`.

    Images are encoded by a background thread. An image that cannot be encoded and whatever fails in writing cause a
    warning: training continues without what could not be written.

    Args:
        output_dir: of the run.
        log_dir: directory for the event files of the run.
        start_step: optimizer steps done, in a resumed run; what was logged after this step is removed. None: a new
            run.
    """

    def __init__(self, output_dir: Path, log_dir: Path, start_step: int | None = None):
        path = Path(output_dir) / "metrics.jsonl"
        if start_step is not None:
            _remove_lines_after(path, start_step)
        self.log_dir = str(log_dir)
        self._failing = set()  # of "events" and "lines": a warning was given
        # A run resumed from step 0 logs step 0 again; a new run hides what a removed run of its name has left.
        purge_step = start_step + 1 if start_step else 0 if any(Path(log_dir).glob("events.*")) else None
        self.writer = SummaryWriter(self.log_dir, flush_secs=30, purge_step=purge_step)
        self._file = open_regular(path, "ab")
        self._jobs = queue.Queue(maxsize=16)  # training waits when it is full, to bound memory
        self._encoder = threading.Thread(target=self._encode, name="metrics", daemon=True)
        self._encoder.start()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes {tag: value} at an optimizer step. nan and inf become null in metrics.jsonl, as JSON has neither."""
        values = dict(sorted(values.items()))
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._event(lambda writer: writer.file_writer.add_summary(summary, step))
        line = {"step": step} | {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._line(json.dumps(line, allow_nan=False).encode() + b"\n")

    def curve(self, tag: str, points: list[tuple[int, float]]) -> None:
        """Writes (step, value) points, to TensorBoard only."""
        for step, value in points:
            self._event(lambda writer, step=step, value=value: writer.add_scalar(tag, value, step))

    def text(self, tag: str, content: str, step: int = 0) -> None:
        """Writes Markdown text, to TensorBoard only."""
        self._event(lambda writer: writer.add_text(tag, content, step))

    def hparams(self, settings: dict, metric_tags: list[str]) -> None:
        """Writes the run's settings for TensorBoard's HPARAMS tab.

        Args:
            settings: {name: value}; values other than bool, int, float and str are written as text.
            metric_tags: tags of the scalars to show beside the settings.
        """
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        for summary in hparams(plain, dict.fromkeys(metric_tags, 0.0)):
            # Not SummaryWriter.add_hparams, which creates another run.
            self._event(lambda writer, summary=summary: writer.file_writer.add_summary(summary, 0))

    def histogram(self, tag: str, counts: np.ndarray, edges: np.ndarray, step: int) -> None:
        """Writes a histogram as numpy.histogram returns it: counts [N], edges [N + 1]."""
        counts, edges = np.asarray(counts, np.float64), np.asarray(edges, np.float64)
        centers = (edges[1:] + edges[:-1]) / 2
        self._event(
            lambda writer: writer.add_histogram_raw(
                tag,
                min=edges[0],
                max=edges[-1],
                num=counts.sum(),
                sum=(counts * centers).sum(),
                sum_squares=(counts * centers**2).sum(),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=step,
            )
        )

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        """Writes an image, which must not be changed afterwards."""
        self._jobs.put((tag, [image], step))

    def animation(self, tag: str, images: Iterable[Image.Image], step: int) -> None:
        """Writes images of one size as an animated GIF, which TensorBoard shows among the images.

        Args:
            tag: of the animation.
            images: iterated over by the background thread.
            step: optimizer step.
        """
        self._jobs.put((tag, images, step))

    def flush(self) -> None:
        """Waits until everything logged so far is written; from any thread."""
        self._jobs.join()
        self._event(lambda writer: writer.flush())

    def close(self) -> None:
        """Waits until everything is written, and closes the files."""
        self._jobs.put(None)
        self._encoder.join()
        self._event(lambda writer: writer.close())
        self._file.close()

    def _event(self, write):
        """Calls write(SummaryWriter). After an error, once with a new writer: the thread of the old one has ended."""
        try:
            write(self.writer)
        except Exception as error:  # any: of the disk, of TensorBoard, of wandb, which hooks itself into the writer
            self._warn_once("events", error)
            with suppress(Exception):
                self.writer = SummaryWriter(self.log_dir, flush_secs=30)
                write(self.writer)

    def _line(self, line):
        """Appends a line to metrics.jsonl, either all of it or nothing."""
        try:
            append_line(self._file, line)
            self._failing.discard("lines")
        except OSError as error:
            self._warn_once("lines", error)

    def _warn_once(self, what, error):
        if what not in self._failing:
            self._failing.add(what)
            path = self._file.name if what == "lines" else self.log_dir
            warn(f"{path}: {describe(error)}: log entries are lost until writing works again; training continues")

    def _encode(self):
        while (job := self._jobs.get()) is not None:
            tag, images, step = job
            try:
                value = Summary.Value(tag=tag, image=_encoded(images))
                summary = Summary(value=[value])
                self._event(lambda writer, step=step, summary=summary: writer.file_writer.add_summary(summary, step))
            except Exception as error:  # any: the thread must survive for the next image
                warn(f"{tag}, step {step}: the image was not logged: {type(error).__name__}: {error}")
            self._jobs.task_done()


def _encoded(images):
    """Returns a Summary.Image: one image as PNG, several as GIF (add_video needs moviepy and fails silently)."""
    first, *rest = (image.convert("RGB") for image in images)
    data = io.BytesIO()
    if rest:
        durations = [_FRAME_MS] * len(rest) + [_LAST_FRAME_MS]
        first.save(data, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    else:
        first.save(data, "PNG", compress_level=1)
    width, height = first.size
    return Summary.Image(width=width, height=height, colorspace=_RGB, encoded_image_string=data.getvalue())


def _remove_lines_after(path, last_step):
    """Removes the lines of later steps from metrics.jsonl, and an incomplete last line."""
    if not path.exists():
        return
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as shortened:
        for number, line in json_lines(path):
            if type(line.get("step")) is not int:
                raise ValueError(f"{path}, line {number}: has no step; remove the line")
            if line["step"] <= last_step:
                shortened.write(json.dumps(line) + "\n")
    os.replace(part, path)
