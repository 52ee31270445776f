"""Steps whose loss or gradients are not finite, in whole runs: against runs that leave out the optimizer's step."""

import json
import math
import shutil
from functools import cache, partial
from itertools import count

import numpy as np
import pytest
import torch
from helpers import T5, digest, json_lines, load_script, run_script, train, trainer_argv, weights_of
from safetensors.torch import load_file
from train_ranks import Ranks

from cachetrain.data.batching import BatchSampler
from cachetrain.data.index import PairIndex
from cachetrain.data.sidecar import read_sidecar, write_sidecar
from cachetrain.training import nonfinite
from cachetrain.training import run as opening
from cachetrain.training.nonfinite import QUARANTINE, NonfiniteSteps

trainer = load_script("train_from_cached.py")
STEPS, BAD = 4, 2
COMMON = ["--lr", 1e-3, "--ema_decay", 0.9, "--cond_dropout", 0]
EACH = ["--max_steps", STEPS, "--save_steps", 1, *COMMON]  # a checkpoint of each step
NAN, INF = math.nan, math.inf


def state_after(out, step):
    """A hash of all tensors that a step left: weights, averages, optimizer; and of what else the optimizer counts."""
    folder = out / f"checkpoint-{step:06d}"
    tensors = {
        f"{path}/{name}": tensor
        for path in folder.glob("[ut][nr]*/*.safetensors")
        for name, tensor in load_file(path).items()
    }
    optimizer = json.loads((folder / "training_state/state.json").read_text())["optimizer"]
    tensors = {name.removeprefix(str(folder)): tensor for name, tensor in tensors.items()}
    assert {name.split("/")[1] for name in tensors} == {"unet", "unet_ema", "training_state"}
    return digest(tensors), json.dumps(optimizer, sort_keys=True)


def quarantined(out):
    """Lines of the file, split: (step, reason, image path, text path)."""
    return [tuple(line.split("\t")) for line in (out / QUARANTINE).read_text().splitlines()]


def pairs_of(data, step, accum=1, batch_size=2):
    """(index, numbers of its pairs in each micro-batch of a step)."""
    index = PairIndex([data], *T5)
    batches = list(BatchSampler(index, batch_size, 0, step * accum))[-accum:]
    return index, [[visit.sample for visit in batch] for batch in batches]


def poison(path, name, value):
    """Makes the last number of a sidecar's tensor `value`; its hashes are right."""
    tensors, header = read_sidecar(path)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    tensors[name].view(-1)[-1] = value
    write_sidecar(path, tensors, header.metadata)


def poisoned_copy(data, tmp_path, what, value, sample):
    """A copy of the caches whose pair number `sample` has a bad "latent" or "emb"."""
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    index = PairIndex([copy], *T5)
    poison(index.image_path(sample) if what == "latent" else index.text_path(sample), what, value)
    return copy


def add_to_loss(monkeypatch, values):
    """Adds values[n] to the last sample's loss in forward pass n, from 1: its gradients stay what they were."""
    forward, calls = trainer.forward_pass, count(1)

    def bad(*args, **kwargs):
        result = forward(*args, **kwargs)
        more = torch.tensor([0.0] * (len(result.loss) - 1) + [values.get(next(calls), 0.0)])
        return result._replace(loss=result.loss + more)

    monkeypatch.setattr(trainer, "forward_pass", bad)


def add_to_gradient(monkeypatch, values):
    """Adds values[n] to one element of one parameter's gradient in backward pass n, from 1."""
    open_unet, calls = opening.open_unet, count(1)

    def bad(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[-1] += values.get(next(calls), 0.0)
        return gradient

    def hooked(*args, **kwargs):
        unet, chosen = open_unet(*args, **kwargs)
        unet.mid_block.attentions[0].proj_in.weight.register_hook(bad)
        return unet, chosen

    monkeypatch.setattr(opening, "open_unet", hooked)


@pytest.fixture(scope="module")
def reference(shapes, model_t5, tmp_path_factory):
    """Function of (step that is left out, flags): the state after the last step of a healthy, unguarded run."""

    @cache
    def left_out(bad_step, *flags):
        steps = count(1)

        def step_plainly(optimizer, *_):
            if next(steps) == bad_step:
                return False
            optimizer.step()
            return True

        out = tmp_path_factory.mktemp("reference") / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nonfinite, "step_if_finite", step_plainly)
            train(shapes, model_t5, out, "--max_steps", STEPS, *COMMON, "--log_groups", 1, *flags)
        assert not (out / QUARANTINE).exists()
        return state_after(out, STEPS)

    return left_out


def assert_skipped(out, step, expected):
    """The step left everything as it was, and the run went on as if it had not been."""
    assert state_after(out, step) == state_after(out, step - 1) != state_after(out, step + 1)
    assert state_after(out, STEPS) == expected


KINDS = [(what, value) for what in ("latent", "emb", "loss", "gradient") for value in (NAN, INF)]
MICROS = [("latent", NAN, 3, 0), ("loss", INF, 3, 1), ("loss", INF, 3, 2), ("gradient", INF, 3, 1)]
ALL_MICROS = [(*kind, 3, micro) for kind in KINDS for micro in range(3)]


@pytest.mark.parametrize(
    ("what", "value", "accum", "micro"),
    [
        *((*kind, 1, 0) for kind in KINDS),
        *MICROS,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL_MICROS if case not in MICROS),
    ],
)
def test_a_bad_number_changes_no_weight_moment_or_average_and_is_named(
    what, value, accum, micro, shapes, model_t5, tmp_path, monkeypatch, reference, capsys
):
    flags = ["--batch_size", 2, "--gradient_accum", accum]
    index, parts = pairs_of(shapes, BAD, accum)
    named, reason, data, call = [parts[micro][-1]], f"loss {value}", shapes, (BAD - 1) * accum + micro + 1
    if what in ("latent", "emb"):
        data = poisoned_copy(shapes, tmp_path, what, value, *named)
        index, reason = PairIndex([data], *T5), "loss nan"
    elif what == "loss":
        add_to_loss(monkeypatch, {call: value})
    else:
        add_to_gradient(monkeypatch, {call: value})
        named, reason = [sample for part in parts for sample in part], "gradients of its step"
    train(data, model_t5, tmp_path / "run", *EACH, *flags, "--log_groups", 1)
    assert_skipped(tmp_path / "run", BAD, reference(BAD, *flags))
    lines = [(str(BAD), reason, index.image_path(i), index.text_path(i)) for i in named]
    assert quarantined(tmp_path / "run") == lines
    assert f"not finite at step {BAD}: skipped" in capsys.readouterr().err


OPTIMIZERS = [("adamw", "bf16"), ("adamw", "bf16_pure"), ("lion", "fp32"), ("stableadamw", "bf16_pure"),
              ("prodigy", "fp32"), ("adamw", "fp32", "--cpu_offload")]  # fmt: skip
MORE = [
    ("lion", "bf16_pure"),
    ("stableadamw", "fp32"),
    ("muon", "bf16_pure"),
    ("adamw", "bf16_pure", "--cpu_offload"),
    ("adamw", "fp32", "--gradient_clip", 0),
]


@pytest.mark.parametrize(
    ("optimizer", "precision", "more"),
    [
        *((o, p, more) for o, p, *more in OPTIMIZERS),
        *(pytest.param(o, p, more, marks=pytest.mark.slow) for o, p, *more in MORE),
    ],
)
def test_no_optimizer_sees_a_bad_step(optimizer, precision, more, shapes, model_t5, tmp_path, reference):
    flags = ["--batch_size", 2, "--optimizer", optimizer, "--precision", precision, *more]
    flags += ["--lr", 1.0] if optimizer == "prodigy" else []
    data = poisoned_copy(shapes, tmp_path, "latent", NAN, pairs_of(shapes, BAD)[1][0][0])
    train(data, model_t5, tmp_path / "run", *EACH, *flags, "--log_groups", 1)
    assert_skipped(tmp_path / "run", BAD, reference(BAD, *flags))


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_the_first_step_may_be_bad(optimizer, shapes, model_t5, tmp_path, reference):
    flags = ["--batch_size", 2, "--optimizer", optimizer]
    data = poisoned_copy(shapes, tmp_path, "latent", NAN, pairs_of(shapes, 1)[1][0][0])
    train(data, model_t5, tmp_path / "run", *EACH, *flags, "--log_groups", 1)
    assert digest(weights_of(tmp_path / "run/checkpoint-000001/unet")) == digest(weights_of(model_t5 / "unet"))
    assert state_after(tmp_path / "run", STEPS) == reference(1, *flags)


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_float16_overflow_is_skipped_as_a_matter_of_course(
    optimizer, shapes, model_t5, tmp_path, monkeypatch, capsys
):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-50)
    monkeypatch.setattr(opening, "loss_scaler", lambda *_: scaler)
    flags = ["--precision", "fp16", "--optimizer", optimizer, "--batch_size", 1, "--max_nonfinite", 1]
    train(shapes, model_t5, tmp_path / "run", "--max_steps", 2, "--save_steps", 1, *COMMON, *flags)
    for name in ("unet", "unet_ema"):
        first, second = (digest(weights_of(tmp_path / f"run/checkpoint-{step:06d}" / name)) for step in (1, 2))
        assert first == digest(weights_of(model_t5 / "unet")) != second
    assert scaler.get_scale() == 2.0**10
    assert not (tmp_path / "run" / QUARANTINE).exists() and "skipped" not in capsys.readouterr().err


def test_a_bad_sample_in_float16_is_skipped_and_named(shapes, model_t5, tmp_path):
    sample = pairs_of(shapes, BAD, batch_size=1)[1][0][0]
    data = poisoned_copy(shapes, tmp_path, "latent", NAN, sample)
    flags = ["--precision", "fp16", "--batch_size", 1]
    train(data, model_t5, tmp_path / "run", "--max_steps", 3, "--save_steps", 1, *COMMON, *flags)
    assert state_after(tmp_path / "run", BAD) == state_after(tmp_path / "run", BAD - 1)
    assert state_after(tmp_path / "run", BAD) != state_after(tmp_path / "run", BAD + 1)
    index = PairIndex([data], *T5)
    assert quarantined(tmp_path / "run") == [
        (str(BAD), "loss nan", index.image_path(sample), index.text_path(sample))
    ]


@pytest.mark.parametrize("flags", [[], ["--fsdp", "--optimizer", "lion"], ["--log_groups", 3]])
def test_a_bad_sample_of_one_rank_is_skipped_by_all(flags, shapes, model_t5, tmp_path):
    own = pairs_of(shapes, BAD, batch_size=4)[1][0]
    data = poisoned_copy(shapes, tmp_path, "latent", NAN, own[1])  # every second one is rank 1's
    argv = ["--train_data_dir", data, "--model", model_t5, "--output_dir", tmp_path / "run", *EACH, *flags]
    argv += ["--logdir", tmp_path / "tb", "--num_workers", 0, "--device", "cpu", "--precision", "fp32"]
    ranks = Ranks([*argv, "--batch_size", 2], 2, tmp_path / "ranks").finish()
    assert [rank.code for rank in ranks] == [0, 0], [rank.output for rank in ranks]
    assert ranks[1].seen["samples"][BAD - 1] == own[1::2] and own[1] not in np.ravel(ranks[0].seen["samples"])
    weights = [rank.seen["weights"] for rank in ranks]
    assert weights[0] == weights[1] and len(set(weights[0])) == STEPS - 1  # saved after every step
    assert state_after(tmp_path / "run", BAD) == state_after(tmp_path / "run", BAD - 1)
    assert [line[:3] for line in quarantined(tmp_path / "run")] == [
        (str(BAD), "loss nan", PairIndex([data], *T5).image_path(own[1]))
    ]


def test_metrics_are_of_the_finite_samples(shapes, model_t5, tmp_path, monkeypatch):
    """One window that is an epoch of 24 samples, of which one is bad."""
    data = poisoned_copy(shapes, tmp_path, "emb", INF, pairs_of(shapes, BAD, batch_size=6)[1][0][3])
    seen, forward = [], trainer.forward_pass

    def kept(*args, **kwargs):
        seen.append(forward(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(trainer, "forward_pass", kept)
    flags = [
        "--max_steps",
        STEPS,
        *COMMON,
        "--batch_size",
        6,
        "--log_step",
        STEPS,
        "--use_snr",
        "--diagnostic_steps",
        STEPS,
    ]
    first, last = train(data, model_t5, tmp_path / "run", *flags)[0]
    assert first["step"] == 1 and None not in {*first.values(), *last.values()}
    loss, raw = (torch.cat([parts[i].detach() for parts in seen]) for i in (0, 1))
    assert loss.isfinite().sum() == 23
    for tag, values in (("loss", loss), ("loss_raw", raw)):
        assert last[f"01_Training/{tag}"] == pytest.approx(values[6:][values[6:].isfinite()].mean().item(), rel=1e-5)
    assert last["03_Epoch_Summary/loss"] == pytest.approx(loss[loss.isfinite()].mean().item(), rel=1e-5)
    assert last["03_Epoch_Summary/images"] == 23
    assert last["03_Epoch_Summary/optimizer_steps"] == STEPS and last["03_Epoch_Summary/not_finite_steps"] == 1


def test_a_loss_of_nothing_is_unknown_not_zero(shapes, model_t5, tmp_path, monkeypatch, capsys):
    add_to_loss(monkeypatch, {2: NAN, 3: NAN})
    flags = ["--overfit", 1, "--batch_size", 1, "--max_steps", 3]
    argv = trainer_argv(shapes, model_t5, tmp_path / "run", *flags)
    assert run_script("train_from_cached.py", *argv) == 1
    assert "not below a tenth" in capsys.readouterr().out
    lines = json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["01_Training/loss"] is None for line in lines] == [False, True, True]


@pytest.mark.parametrize(
    ("bad_steps", "log_step", "ends_at", "last_bad"),
    [([2, 3, 4], 1, 4, 4), ([2, 3, 4], 25, 4, 4), ([3, 4, 5], 4, 8, 5), ([1, 2, 4, 5, 7, 8], 1, None, None),
     ([3, 4, 6, 7], 4, None, None), ([3, 4, 6, 7, 8], 4, 8, 8)],
)  # fmt: skip
def test_three_bad_steps_in_a_row_end_the_run(
    bad_steps, log_step, ends_at, last_bad, shapes, model_t5, tmp_path, monkeypatch
):
    out, save_steps = tmp_path / "run", 4 if log_step == 25 else 100
    flags = ["--max_steps", 9, "--batch_size", 1, "--log_step", log_step, "--save_steps", save_steps]
    start = partial(train, shapes, model_t5, out, *COMMON, *flags, "--max_nonfinite", 3, "--log_groups", 1)
    with monkeypatch.context() as patch:
        add_to_loss(patch, dict.fromkeys(bad_steps, NAN))
        if ends_at is None:
            start()
            return
        with pytest.raises(ValueError) as error:
            start()
    said, kept = str(error.value), out / f"checkpoint-{ends_at:06d}"
    assert (
        f"3 steps in a row, up to step {last_bad}: check the files listed in {out / QUARANTINE}, lower --lr" in said
    )
    assert said.endswith(f"the last good weights are in {kept}") and "\n" not in said
    assert [int(step) for step, *_ in quarantined(out)] == bad_steps[-3:] or ends_at == 8
    assert all(tensor.isfinite().all() for path in kept.rglob("*.safetensors") for tensor in load_file(path).values())
    start("--resume", "latest")


def test_a_run_that_ends_with_bad_steps_keeps_the_last_good_state(shapes, model_t5, tmp_path, monkeypatch):
    add_to_loss(monkeypatch, {3: INF, 4: NAN})
    with pytest.raises(ValueError, match="2 steps in a row, up to step 4"):
        train(
            shapes,
            model_t5,
            tmp_path / "run",
            "--max_steps",
            9,
            "--save_steps",
            1,
            *COMMON,
            "--batch_size",
            1,
            "--max_nonfinite",
            2,
        )
    assert state_after(tmp_path / "run", 4) == state_after(tmp_path / "run", 2) != state_after(tmp_path / "run", 1)


def test_two_ranks_end_together_after_bad_steps(shapes, model_t5, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    index = PairIndex([data], *T5)
    for step in (2, 3):
        poison(
            index.image_path(pairs_of(data, step)[1][0][step % 2]), "latent", NAN
        )  # of one rank, then of the other
    argv = trainer_argv(data, model_t5, tmp_path / "run", *EACH, "--batch_size", 1, "--max_nonfinite", 2)
    ranks = Ranks(argv, 2, tmp_path / "ranks").finish()
    assert [rank.code for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "Traceback" not in rank.output
        assert rank.output.splitlines()[-1].startswith("train_from_cached.py: loss or gradients were not finite in 2")
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint*"))[-1] == "checkpoint-000003"


def test_what_is_remembered_of_a_step_does_not_keep_its_batch(shapes, tmp_path):
    batch = torch.zeros(1000, dtype=torch.int64)  # as data.unpack gives them, all tensors of a batch are one memory
    remembered = NonfiniteSteps([], tmp_path, None, 10, False)
    remembered.add({"samples": batch[:2], "faults": []}, torch.zeros(2))
    assert all(
        tensor.untyped_storage().nbytes() < 100 for micro_batch in remembered._micro_batches for tensor in micro_batch
    )


def test_a_list_that_cannot_be_written_is_said_instead_and_training_goes_on(
    shapes, model_t5, tmp_path, monkeypatch, capsys
):
    (tmp_path / "run" / QUARANTINE).mkdir(parents=True)  # in its place, so that opening it fails
    add_to_loss(monkeypatch, {BAD: NAN})
    train(shapes, model_t5, tmp_path / "run", "--max_steps", 3, *COMMON)
    said = capsys.readouterr().err
    assert f"step {BAD}: skipped" in said and "Is a directory" in said and ".img_sdxl" in said
