"""Runs that are interrupted and resumed, and all that their checkpoints and logs hold, to be compared."""

import json
import os
import shutil
from itertools import count
from unittest import mock

from helpers import digest, json_lines, load_script, read_events, trainer_argv
from safetensors.torch import load_file
from train_ranks import Ranks, seen_by, watched_rank

from cachetrain.checkpoints.save import checkpoint_path

COMMON = ["--lr", 1e-3, "--weight_decay", 0.025, "--cond_dropout", 0.2, "--ema_decay", 0.9]
BRIEF = ["--batch_size", 7, "--max_steps", 4, "--save_steps", 2]  # the epoch of 24 pairs ends within step 4
RESUME = ["--resume", "latest"]
PARTS = ("unet", "unet_ema", "training_state")
# What depends on the machine's speed, and what it has room for.
MEASURED = ("05_Performance/", "14_System/", "03_Epoch_Summary/minutes_per_epoch")


class Runs:
    """Runs on `data`, each in a folder of its own below `root`."""

    def __init__(self, data, model, root):
        self.data, self.model, self.root, self._numbers = data, model, root, count()

    def new(self):
        """A folder that does not exist yet."""
        return self.root / f"run{next(self._numbers)}"

    def argv(self, out, *flags):
        return trainer_argv(self.data, self.model, out, "--logdir", self.root / "tb", *COMMON, *flags)

    def train(self, out, *flags):
        """Trains in this process; returns the sample ids of each micro-batch."""
        trainer, samples = load_script("train_from_cached.py"), []
        forward = trainer.forward_pass

        def watched(model, batch, **settings):
            if model.training:
                samples.append(batch["samples"].tolist())
            return forward(model, batch, **settings)

        with mock.patch.object(trainer, "forward_pass", watched):
            assert trainer.main(self.argv(out, *flags)) == 0
        return samples

    def launch(self, out, ranks, *flags, kill=None):
        """Trains on ranks; returns a list of Rank, whose `seen` are the sample ids of each micro-batch.

        Args:
            kill: (rank, moment of `watch_samples`).
        """
        folder = self.new()
        results = Ranks(self.argv(out, *flags), ranks, folder, kill, target=watched_rank).finish()
        return [result._replace(seen=seen_by(folder, rank)) for rank, result in enumerate(results)]

    def interrupted(self, run, step):
        """A copy of a finished run as a kill after `step` leaves it: its logs go further than its checkpoint."""
        copy = self.new()
        copy.mkdir()
        for name in ("args.json", "metrics.jsonl"):
            shutil.copy(run / name, copy)
        shutil.copytree(checkpoint_path(run, step), checkpoint_path(copy, step), copy_function=os.link)
        shutil.copytree(self.root / "tb" / run.name, self.root / "tb" / copy.name)
        return copy


def content(run, step):
    """All that a checkpoint holds of the training: {name: hash of the tensor} and the JSON of the state."""
    path, found = checkpoint_path(run, step), {}
    # unet, unet_ema, training_state, an adapter; not the frozen parts
    for file in sorted([*path.glob("[ut]*/*.safetensors"), *path.glob("*.safetensors")]):
        for name, tensor in load_file(file).items() if file.parent.name in (*PARTS, path.name) else ():
            found[f"{file.parent.name}/{name}"] = digest({name: tensor})
    state = json.loads((path / "training_state" / "state.json").read_text())
    del state["settings"], state["statistics"]["seconds"]
    return found | state


def metrics(run):
    """The lines of metrics.jsonl without what was measured of the machine."""
    lines = json_lines(run / "metrics.jsonl")
    return [{tag: value for tag, value in line.items() if not tag.startswith(MEASURED)} for line in lines]


def events(runs, run):
    """{tag: [(step, value)]} of TensorBoard's scalars, without what was measured of the machine."""
    found = read_events(runs.root / "tb" / run.name)
    tags = [tag for tag in found.Tags()["scalars"] if not tag.startswith(MEASURED)]
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in tags}
