"""Writes TensorBoard events and metrics.jsonl."""

import io
import json
import math
import os
import queue
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from cachetrain.log import append_whole, warn

_FRAME_MS, _LAST_FRAME_MS = 250, 1500
_RGB = 3  # the summary's number for the colour space


def open_metrics(output_dir, log_dir, start_step=None, main=True):
    """Metrics of the first rank; for the others, something that takes the same calls and writes nothing."""
    return Metrics(output_dir, log_dir, start_step) if main else NoMetrics()


class NoMetrics:
    """Takes every call of Metrics and does nothing."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class Metrics:
    """Writes each scalar to TensorBoard and, one line per log step, to `<output_dir>/metrics.jsonl`.

    Pictures are encoded by a thread of their own. One that fails is a warning, and the others are written. A full
    disk is a warning too: what it refuses is lost, and training goes on.

    Args:
        output_dir: of the run.
        log_dir: of the run's event files.
        start_step: the last step that counts of a run that is resumed; what was logged after it disappears. None:
            a new run.
    """

    def __init__(self, output_dir, log_dir, start_step=None):
        path = Path(output_dir) / "metrics.jsonl"
        if start_step is not None:
            _cut(path, start_step)
        self.log_dir, self._refused = str(log_dir), set()
        purge_step = start_step + 1 if start_step else start_step  # from 0 on all is logged again
        self.writer = SummaryWriter(self.log_dir, flush_secs=30, purge_step=purge_step)
        self._file = open(path, "ab", buffering=0)
        self._jobs = queue.Queue(maxsize=16)  # beyond it training waits, so that memory stays bounded
        self._encoder = threading.Thread(target=self._encode, name="metrics", daemon=True)
        self._encoder.start()

    def scalars(self, step, values):
        """Writes {tag: float} at an optimizer step. JSON has no nan and inf: they become null there."""
        values = dict(sorted(values.items()))
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._event(lambda writer: writer.file_writer.add_summary(summary, step))
        line = {"step": step} | {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._line(json.dumps(line, allow_nan=False).encode() + b"\n")

    def curve(self, tag, points):
        """Writes [(step, value)] to TensorBoard only."""
        for step, value in points:
            self._event(lambda writer, step=step, value=value: writer.add_scalar(tag, value, step))

    def text(self, tag, content, step=0):
        """Writes Markdown."""
        self._event(lambda writer: writer.add_text(tag, content, step))

    def hparams(self, settings, metric_tags):
        """Writes the run's settings for TensorBoard's HPARAMS tab.

        Args:
            settings: {name: bool, int, float, str or anything else, which is written as text}.
            metric_tags: tags of the scalars to show beside them.
        """
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        for summary in hparams(plain, dict.fromkeys(metric_tags, 0.0)):
            # add_hparams would make another run of it
            self._event(lambda writer, summary=summary: writer.file_writer.add_summary(summary, 0))

    def histogram(self, tag, counts, edges, step):
        """Writes a histogram as numpy.histogram returns it: counts [N], edges [N + 1]."""
        counts, edges = np.asarray(counts, np.float64), np.asarray(edges, np.float64)
        centres = (edges[1:] + edges[:-1]) / 2
        self._event(
            lambda writer: writer.add_histogram_raw(
                tag,
                edges[0],
                edges[-1],
                counts.sum(),
                (counts * centres).sum(),
                (counts * centres**2).sum(),
                edges[1:].tolist(),
                counts.tolist(),
                step,
            )
        )

    def image(self, tag, image, step):
        """Writes a PIL image, which must not be changed afterwards."""
        self._jobs.put((tag, [image], step))

    def animation(self, tag, images, step):
        """Writes PIL images of one size as a GIF, which TensorBoard plays among the images.

        Args:
            images: iterable, which the encoding thread goes through.
        """
        self._jobs.put((tag, images, step))

    def flush(self):
        """Waits until all so far is written; from any thread."""
        self._jobs.join()
        self._event(lambda writer: writer.flush())

    def close(self):
        """Waits until all is written."""
        self._jobs.put(None)
        self._encoder.join()
        self._event(lambda writer: writer.close())
        self._file.close()

    def _event(self, write):
        """Calls write(SummaryWriter). TensorBoard's has a thread that ends with an error: then there is a new one."""
        try:
            write(self.writer)
        except OSError as error:
            self._refuse("events", error)
            with suppress(OSError):
                self.writer = SummaryWriter(self.log_dir, flush_secs=30)
                write(self.writer)

    def _line(self, line):
        """Appends a whole line to metrics.jsonl, or nothing."""
        try:
            append_whole(self._file, line)
            self._refused.discard("lines")
        except OSError as error:
            self._refuse("lines", error)

    def _refuse(self, what, error):
        if what not in self._refused:
            self._refused.add(what)
            where = self._file.name if what == "lines" else self.log_dir
            warn(f"{where}: {error.strerror}: what is logged now is lost; training goes on")

    def _encode(self):
        while (job := self._jobs.get()) is not None:
            tag, images, step = job
            try:
                value = Summary.Value(tag=tag, image=_encoded(images))
                summary = Summary(value=[value])
                self._event(lambda writer, step=step, summary=summary: writer.file_writer.add_summary(summary, step))
            except Exception as error:  # whatever it is, the thread must live to take the next
                warn(f"{tag}, step {step}: the picture was not logged: {type(error).__name__}: {error}")
            self._jobs.task_done()


def _encoded(images):
    """Image summary of one picture as PNG, of several as GIF. (add_video needs moviepy and fails silently.)"""
    first, *rest = (image.convert("RGB") for image in images)
    data = io.BytesIO()
    if rest:
        durations = [_FRAME_MS] * len(rest) + [_LAST_FRAME_MS]
        first.save(data, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    else:
        first.save(data, "PNG", compress_level=1)
    width, height = first.size
    return Summary.Image(width=width, height=height, colorspace=_RGB, encoded_image_string=data.getvalue())


def _cut(path, last_step):
    """Drops the lines after `last_step`, and a line that was not finished."""
    if not path.exists():
        return
    part = path.with_name(path.name + ".part")
    with open(path, encoding="utf-8") as lines, open(part, "w", encoding="utf-8") as kept:
        for line in lines:
            if line.endswith("\n") and json.loads(line)["step"] <= last_step:
                kept.write(line)
    os.replace(part, path)
