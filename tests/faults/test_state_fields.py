"""Every field of a checkpoint's state matters: with one freshened the resumed run is another one, with one missing it
is refused in one line."""

import json
import shutil

import pytest
import torch
from helpers import WEIGHTS
from runs import BRIEF, RESUME, Runs, content, metrics
from safetensors.torch import load_file, save_file

from cachetrain.checkpoints.manifest import write_manifest
from cachetrain.checkpoints.save import checkpoint_path
from cachetrain.checkpoints.state import read_state, split_tensors, write_state


@pytest.fixture(scope="module")
def runs(shapes, model_t5, tmp_path_factory):
    return Runs(shapes, model_t5, tmp_path_factory.mktemp("runs"))


class Whole:
    """Undisturbed runs of 4 steps with checkpoints at 2 and 4, each made once."""

    def __init__(self, runs):
        self.runs, self.made = runs, {}

    def __call__(self, flags):
        if flags not in self.made:
            self.runs.train(out := self.runs.new(), *BRIEF, *flags.split())
            self.made[flags] = out
        return self.made[flags]

    def interrupted(self, flags, change=None):
        """A copy that resumes from step 2, after `change` (a function that alters the dict) of its state."""
        run = self.runs.interrupted(self(flags), 2)
        if change:
            alter_state(checkpoint_path(run, 2), change)
        return run

    def resume(self, run, flags):
        self.runs.train(run, *BRIEF, *RESUME, *flags.split())
        return run


@pytest.fixture(scope="module")
def whole(runs):
    return Whole(runs)


def alter_state(checkpoint, change):
    state = read_state(checkpoint)
    change(state)
    shutil.rmtree(checkpoint / "training_state")
    write_state(checkpoint, *split_tensors(state))
    write_manifest(checkpoint)


def alter_weights(checkpoint, part, change):
    """Puts change(tensors) in place of the tensors of unet/ or unet_ema/."""
    path = checkpoint / part / WEIGHTS
    tensors = change(load_file(path))
    path.unlink()  # a hard link
    save_file(tensors, path, {"format": "pt"})
    write_manifest(checkpoint)


def part_of(run, part):
    return {name: value for name, value in content(run, 4).items() if name.startswith(f"{part}/")}


def freshened(key, value=0):
    """A change that makes `key` of each parameter's state, or of the group, what it is at the start, or `value`."""

    def change(state):
        optimizer, found = state["optimizer"], 0
        for holder in [*optimizer["state"].values(), *optimizer["param_groups"]]:
            if key in holder:
                before = holder[key]
                holder[key] = (
                    torch.full_like(before, value) if isinstance(before, torch.Tensor) else type(before)(value)
                )
                found += 1
        assert found

    return change


def nothing(state):
    pass


def anew(state):
    state["optimizer"]["state"] = {}


# With these betas its rate grows from the third step on.
PRODIGY, BF16 = "--optimizer prodigy --lr 1 --betas 0.9 0.5", "--precision bf16_pure"
MUON, ADAFACTOR = f"{BF16} --optimizer muon", "--optimizer adafactor --lr 1e-2"
FIELDS = [
    ("", "visits", lambda state: state.update(visits=0)),
    ("", "optimizer", anew),
    *(("", key, freshened(key)) for key in ("exp_avg", "exp_avg_sq", "step")),
    *((BF16, key, freshened(key)) for key in ("exp_avg", "exp_avg_sq", "step", "kahan_comp", "pending_decay")),
    *((f"{BF16} --optimizer lion", key, freshened(key)) for key in ("exp_avg", "kahan_comp", "pending_decay")),
    *(("--optimizer stableadamw", key, freshened(key)) for key in ("exp_avg", "exp_avg_sq", "step")),
    *((MUON, key, freshened(key)) for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", "step", "kahan_comp")),
    *((ADAFACTOR, key, freshened(key)) for key in ("row_var", "col_var", "variance", "step")),
    *((PRODIGY, key, freshened(key)) for key in ("exp_avg", "exp_avg_sq", "s", "p0", "k", "d_numerator")),
    (PRODIGY, "d", freshened("d", 2e-6)),
    ("--precision fp16", "scaler", lambda state: state["scaler"].update(scale=2**-9)),
]


@pytest.mark.parametrize("flags", dict.fromkeys(flags for flags, *_ in FIELDS))
def test_state_read_and_written_again_changes_nothing(whole, flags):
    run = whole.resume(whole.interrupted(flags, nothing), flags)
    assert content(run, 4) == content(whole(flags), 4)


@pytest.mark.parametrize(("flags", "field", "change"), FIELDS, ids=lambda value: value if type(value) is str else "")
def test_training_differs_with_a_field_freshened(whole, flags, field, change):
    run = whole.resume(whole.interrupted(flags, change), flags)
    assert part_of(run, "unet") != part_of(whole(flags), "unet")


def test_training_differs_with_fresh_weights(whole, model_t5):
    run = whole.interrupted("")
    alter_weights(checkpoint_path(run, 2), "unet", lambda _: load_file(model_t5 / "unet" / WEIGHTS))
    assert part_of(whole.resume(run, ""), "unet") != part_of(whole(""), "unet")


def test_averages_differ_with_fresh_averages(whole):
    run = whole.interrupted("")
    alter_weights(
        checkpoint_path(run, 2), "unet_ema", lambda _: load_file(checkpoint_path(run, 2) / "unet" / WEIGHTS)
    )
    whole.resume(run, "")
    assert part_of(run, "unet") == part_of(whole(""), "unet")
    assert part_of(run, "unet_ema") != part_of(whole(""), "unet_ema")


def test_epoch_summary_differs_with_fresh_statistics(whole):
    run = whole.resume(whole.interrupted("", lambda state: state["statistics"].update(epoch=[0.0] * 6)), "")
    (expected,) = [line for line in metrics(whole("")) if "03_Epoch_Summary/images" in line]
    (fresh,) = [line for line in metrics(run) if "03_Epoch_Summary/images" in line]
    assert fresh["03_Epoch_Summary/images"] == expected["03_Epoch_Summary/images"] - 14
    assert part_of(run, "unet") == part_of(whole(""), "unet")


@pytest.mark.parametrize(("validation", "told"), [({"best": 0.0, "stale": 4}, 1), ({"best": 9e9, "stale": 0}, 0)])
def test_notice_of_a_plateau_counts_what_was_measured_before(whole, capsys, validation, told):
    flags = "--val_split 0.3 --val_steps 1"
    run = whole.interrupted(flags, lambda state: state.update(validation=validation | {"told": False}))
    capsys.readouterr()
    whole.resume(run, flags)
    assert capsys.readouterr().err.count("has not improved in 5 validations") == told


# Missing or made up

ALL = ("step", "visits", "settings", "trained", "optimizer", "scaler", "statistics", "validation")


def error_of(whole, run, flags=""):
    with pytest.raises(ValueError) as error:
        whole.resume(run, flags)
    assert "\n" not in str(error.value) and str(checkpoint_path(run, 2)) in str(error.value)
    return str(error.value)


def test_state_has_the_fields_that_are_tested_here(whole):
    state = json.loads((checkpoint_path(whole(""), 4) / "training_state" / "state.json").read_text())
    assert sorted(state) == sorted([*ALL, "shards"])  # checkpoints of earlier versions have no shards


@pytest.mark.parametrize("field", ALL)
def test_missing_field_is_refused(whole, field):
    error = error_of(whole, whole.interrupted("", lambda state: state.pop(field)))
    assert f"its training_state lacks {field}; " in error


@pytest.mark.parametrize(
    ("flags", "key"),
    dict.fromkeys(
        (flags, key)
        for flags, key, change in FIELDS
        if key not in ("visits", "optimizer", "scaler", "k", "d_numerator")
    ),
)
def test_missing_part_of_an_optimizer_is_refused(whole, flags, key):
    def change(state):
        for holder in [*state["optimizer"]["state"].values(), *state["optimizer"]["param_groups"]]:
            holder.pop(key, None)

    assert f"its optimizer lacks {key}; " in error_of(whole, whole.interrupted(flags, change), flags)


NO_OPTIMIZERS = [[], {"state": {}}, {"state": [], "param_groups": [{"params": []}]},
                 {"state": {}, "param_groups": [3]},
                 {"state": {"9": {}}, "param_groups": [{"params": [0]}]},
                 {"state": {"0": 1}, "param_groups": [{"params": [0]}]}]  # fmt: skip
MADE_UP = [
    ("step", True), ("step", "2"), ("visits", 10**15), ("visits", -1), ("visits", 1.5), ("settings", []),
    ("settings", {"batch_size": "7"}), ("trained", None), *(("optimizer", value) for value in NO_OPTIMIZERS),
    ("scaler", 1), ("scaler", {"scale": "x"}), ("scaler", {"scale": float("inf")}), ("statistics", {}),
    ("statistics", {"epoch": [1], "seconds": 0}), ("validation", 3), ("validation", {"best": "x"}),
    ("shards", {}), ("shards", ["x"]), ("shards", [["x", 1]]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), MADE_UP)
def test_a_value_that_no_run_writes_is_refused(field, value, whole, tmp_path):
    saved = checkpoint_path(whole(""), 2)
    folder = shutil.copytree(saved / "training_state", tmp_path / "checkpoint-000002" / "training_state")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {field: value}))
    with pytest.raises(ValueError, match=f"has a {field} that no run writes: ") as error:
        read_state(folder.parent)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"a": {"__tensor__": []}}', "\xff"])
def test_a_state_that_is_none_is_refused(content, whole, tmp_path):
    saved = checkpoint_path(whole(""), 2)
    folder = shutil.copytree(saved / "training_state", tmp_path / "checkpoint-000002" / "training_state")
    (folder / "state.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="its training_state"):
        read_state(folder.parent)
    (folder / "tensors.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match="its training_state cannot be read"):
        read_state(folder.parent)


def test_moments_of_another_shape_are_refused(whole):
    def change(state):
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)

    assert "does not fit the model: exp_avg of parameter 0" in error_of(whole, whole.interrupted("", change))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", float("nan")),
        ("step", -1),
        ("exp_avg", float("inf")),
        ("exp_avg_sq", -1),
        ("exp_avg_sq", float("nan")),
    ],
)
def test_moments_that_no_training_makes_are_refused(key, value, whole):
    assert f"does not fit the model: {key} of parameter" in error_of(
        whole, whole.interrupted("", freshened(key, value))
    )


def test_settings_of_an_optimizer_are_those_of_the_run(whole):
    def change(state):
        state["optimizer"]["param_groups"][0].update(maximize=True, amsgrad=True, capturable="x", eps=1e30)

    run = whole.resume(whole.interrupted("", change), "")
    assert content(run, 4) == content(whole(""), 4)


def test_tensors_without_state_are_said(whole, capsys):
    run = whole.interrupted("", lambda state: state["optimizer"]["state"].pop(0))
    whole.resume(run, "")
    assert "its optimizer has no state of 1 of 286 trained tensors" in capsys.readouterr().err


def test_averages_that_are_not_finite_are_refused(whole):
    run = whole.interrupted("")
    alter_weights(checkpoint_path(run, 2), "unet_ema", lambda tensors: {n: t / 0 for n, t in tensors.items()})
    assert "finite numbers in unet_ema" in error_of(whole, run)


def test_missing_tensor_is_refused(whole):
    run = whole.interrupted("")
    path = checkpoint_path(run, 2) / "training_state" / "tensors.safetensors"
    tensors = load_file(path)
    del tensors["optimizer.state.3.exp_avg"]
    path.unlink()
    save_file(tensors, path)
    write_manifest(checkpoint_path(run, 2))
    assert "its training_state lacks the tensor 'optimizer.state.3.exp_avg'" in error_of(whole, run)


def test_missing_averages_are_refused(whole):
    run = whole.interrupted("")
    alter_weights(checkpoint_path(run, 2), "unet_ema", lambda tensors: {"conv_in.bias": tensors["conv_in.bias"]})
    assert "unet_ema lacks conv_in.weight, " in error_of(whole, run)
    shutil.rmtree(checkpoint_path(run, 2) / "unet_ema")
    write_manifest(checkpoint_path(run, 2))
    assert "it lacks unet_ema; " in error_of(whole, run)


def test_missing_state_is_refused(whole):
    run = whole.interrupted("")
    shutil.rmtree(checkpoint_path(run, 2) / "training_state")
    write_manifest(checkpoint_path(run, 2))
    assert "has no training_state; to start a new run from it, pass it as --model" in error_of(whole, run)


def test_state_of_another_step_is_refused(whole):
    run = whole.interrupted("", lambda state: state.update(step=3))
    assert "that of step 3; rename it to checkpoint-000003" in error_of(whole, run)


def test_settings_of_another_run_are_refused(whole):
    run = whole.interrupted("", lambda state: state["settings"].update(seed=5))
    assert "seed: 5 then, 0 now" in error_of(whole, run)


def test_state_of_other_parameters_is_not_put_into_these(whole, capsys):
    run = whole.interrupted("", lambda state: state.update(trained=state["trained"] + 1))
    whole.resume(run, "")
    assert "trained other parameters: the optimizer starts from scratch" in capsys.readouterr().err
