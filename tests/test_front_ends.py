"""The shell scripts with a stand-in for Python: what the front ends call, and how .venv is made."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import REPO, SD15, load_script, memory_model
from sdxl_fixtures import SDXL_UNET

FRONT_ENDS = ["train_sd.sh", "train_t5.sh", "train_sdxl.sh"]


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def started(script, tmp_path, *argv, **settings):
    """Runs a front end in `tmp_path`; returns (exit code, stderr, the words that it calls Python with)."""
    executable(tmp_path / "bin" / "python3", 'printf "%s\\0" "SAFE=${PYTHONSAFEPATH:-}" "$@" >"$RECORD"')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | settings | {"PATH": path, "VIRTUAL_ENV": "x", "RECORD": str(tmp_path / "record")}
    command = [script if os.path.isabs(script) else REPO / script, *argv]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    called = tmp_path / "record"
    return done.returncode, done.stderr, called.read_text().split("\0")[:-1] if called.exists() else []


def trainer_flags(words):
    """The trainer's flags, as it would resolve them."""
    script = load_script("train_from_cached.py")
    return script.parse_args(words[words.index(str(REPO / "train_from_cached.py")) + 1 :])


@pytest.mark.parametrize("script", FRONT_ENDS)
@pytest.mark.parametrize(
    ("gamma", "use_snr", "value"),
    [("", "auto", 5.0), ("0", False, 5.0), ("0.0", False, 5.0), ("00.", False, 5.0), ("3", True, 3.0)],
)
def test_gamma_is_left_to_the_objective_unless_it_is_given(script, gamma, use_snr, value, tmp_path):
    code, errors, words = started(script, tmp_path, GAMMA=gamma)
    assert code == 0, errors
    args = trainer_flags(words)
    assert (args.use_snr, args.noise_gamma) == (use_snr, value)
    assert args.output_dir.endswith(f"_g{gamma or 5}_s10000")  # as before, so that runs are found again


@pytest.mark.parametrize("gamma", ["-5", "nan", "inf", "1e-9", "many"])
def test_gamma_that_makes_no_sense_is_refused(gamma, tmp_path, capsys):
    _, _, words = started("train_sd.sh", tmp_path, GAMMA=gamma)
    with pytest.raises(SystemExit):
        trainer_flags(words)
    assert "--noise_gamma: expected a number from 0.01 to 1000" in capsys.readouterr().err


@pytest.mark.parametrize("gpus", ["0", "-1", "two", "1.5"])
def test_number_of_gpus_is_checked(gpus, tmp_path):
    code, errors, words = started("train_sd.sh", tmp_path, GPUS=gpus)
    assert (code, words) == (2, []) and f"GPUS: expected a whole number from 1, got {gpus}" in errors


@pytest.mark.parametrize(
    ("datadir", "directories", "weights"),
    [
        ("my set", ["my set"], [1]),
        ("my set:2", ["my set"], [2]),
        ("a b:2", ["a b:2"], [1]),
        ("my set\na b:2:3", ["my set", "a b:2"], [1, 3]),
        ("set[1]", ["set[1]"], [1]),
        ("set1 set[1]:2.5", ["set1", "set[1]"], [1, 2.5]),
        ("*", ["*"], [1]),
        ("set1\nset[1]", ["set1", "set[1]"], [1, 1]),
    ],
)
def test_datadir_names_the_directories_it_says(datadir, directories, weights, tmp_path, monkeypatch):
    for name in ("my set", "set[1]", "set1", "a b:2"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    args = trainer_flags(started("train_sd.sh", tmp_path, DATADIR=datadir)[2])
    assert (args.train_data_dir, args.dir_weights) == (directories, weights)


def test_datadir_may_be_an_array_in_a_copy_of_the_script(tmp_path):
    text = (REPO / "train_sd.sh").read_text().replace("DATADIR=${DATADIR:-/data} ", 'DATADIR=("my set" b:2) ')
    (tmp_path / "train_from_cached.py").touch()
    _, errors, words = started(str(executable(tmp_path / "copy.sh", text)), tmp_path)
    assert words[words.index("--train_data_dir") + 1 :][:3] == ["my set", "b:2", "--model"], errors


def test_a_trial_run_does_not_take_the_place_of_the_real_one(tmp_path):
    real, trial, named, elsewhere = (
        trainer_flags(started("train_sd.sh", tmp_path, *argv, "--max_steps", "9", **settings)[2]).output_dir
        for argv, settings in (
            ([], {}),
            (["--overfit", "8"], {}),
            (["--overfit=8"], {"NAME": "a"}),
            (["--overfit", "8"], {"OUTPUT": "b"}),
        )
    )
    assert trial == real + "_overfit" and (named, elsewhere) == ("output/a_overfit", "b")


def test_resume_with_other_steps_says_which_run_there_is(tmp_path):
    run = tmp_path / "output" / "a b_s2"
    run.mkdir(parents=True)
    (run / "args.json").touch()
    code, errors, words = started("train_sd.sh", tmp_path, "resume", NAME="a b_s4")
    assert code == 2 and "--resume" not in words and r"OUTPUT=output/a\ b_s2" in errors
    code, errors, words = started("train_sd.sh", tmp_path, "resume", NAME="a b_s2")
    assert code == 0 and "--resume" in words, errors


@pytest.mark.parametrize(("is_installed", "used"), [(True, "active"), (False, "own")])
def test_the_environment_of_another_project_is_not_used(is_installed, used, tmp_path):
    copy = tmp_path / "checkout" / shutil.copy(REPO / "train_sd.sh", tmp_path)
    (tmp_path / "train_from_cached.py").touch()
    executable(tmp_path / "bin" / "python3", f'[ "$1" != -c ] || exit {int(not is_installed)}; echo active')
    executable(tmp_path / ".venv" / "bin" / "python", "echo own")
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": "x"}
    done = subprocess.run([copy], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{used}\n", done.stderr


@pytest.mark.parametrize("script", FRONT_ENDS)
def test_a_batch_that_is_given_takes_the_place_of_the_preset(script, tmp_path):
    code, errors, words = started(script, tmp_path, CARD="16")
    assert (code, words) == (2, []) and "24, 48 or 80, got 16" in errors
    args = trainer_flags(started(script, tmp_path, BATCH="3", CARD="12")[2])
    assert (args.batch_size, args.gradient_accum, args.gradient_checkpointing, args.precision) == (3, 1, False, None)


@pytest.mark.slow
def test_presets_fit_their_cards_and_take_the_same_samples_a_step(tmp_path):
    from cachetrain.training.memory import Setup

    # T5's texts take more memory than CLIP's.
    sd15 = memory_model(SD15, "txt_t5cache", {"emb": 768}, tokens=256, side=64)
    sdxl = memory_model(SDXL_UNET, "txt_sdxl", {"emb": 2048, "pooled": 1280}, tokens=77, side=128)
    front_ends = {
        "train_sd.sh": (sd15, {}),
        "train_t5.sh": (sd15, {"OPTIMIZER": "adamw"}),
        "train_sdxl.sh": (sdxl, {}),
    }
    # Of a card's memory, what is left for a process: the driver and CUDA's context take the rest.
    for card, usable_gib in ((12, 11.5), (24, 23.5), (48, 44.5), (80, 79)):
        for script, (model, settings) in front_ends.items():
            code, errors, words = started(script, tmp_path, CARD=str(card), **settings)
            if (script, card) == ("train_sdxl.sh", 12):
                assert code == 2 and "CARD: expected 24, 48 or 80, got 12" in errors
                continue
            args = trainer_flags(words)
            assert args.batch_size * args.gradient_accum == 64
            args.precision = args.precision or "bf16"  # the default on a GPU
            assert usable_gib / 2 < model.estimate(Setup.of(args, ranks=1)).total / 2**30 < usable_gib


def test_default_model_is_beside_the_script_wherever_it_is_started(tmp_path):
    assert trainer_flags(started("train_t5.sh", tmp_path)[2]).model == str(REPO / "models" / "t5_sd15")


def test_a_copy_elsewhere_and_an_environment_without_cachetrain_say_what_to_do(tmp_path):
    copy = shutil.copy(REPO / "train_sd.sh", tmp_path)
    code, errors, words = started(copy, tmp_path)
    assert (code, words) == (2, []) and "copy it to cachetrain's directory" in errors
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").touch()
    code, errors, _ = started("train_sd.sh", tmp_path, "checkpoint", OUTPUT=str(tmp_path / "run"))
    assert code == 2 and "python3 cannot run cachetrain" in errors
    assert not (tmp_path / "run" / "trigger.checkpoint").exists()


# Whose code runs


@pytest.fixture
def hostile(tmp_path):
    """A folder with modules that must not be imported."""
    for name in ("cachetrain", "torch", "PIL", "numpy", "tqdm", "signal"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('imported {name} of the current directory')")
    for name in ("tensorboard", "torch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('imported {name}/')")
    return tmp_path


@pytest.mark.parametrize("gpus", ["1", "2"])
def test_front_ends_and_all_that_they_start_search_no_current_directory(gpus, tmp_path):
    _, _, words = started("train_sd.sh", tmp_path, GPUS=gpus)
    assert words[0] == "SAFE=1"


def test_tensorboard_of_the_current_directory_is_not_run(hostile):
    (hostile / "logs").mkdir()
    command = load_script("launch_tensorboard.py").command
    script = load_script("launch_tensorboard.py")
    words = [*command(script.parse_args(["--logdir", "logs"])), "--version"]
    done = subprocess.run(words, cwd=hostile, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout[:1].isdigit(), done.stderr


def test_scripts_and_their_children_import_nothing_from_the_folders_they_lie_and_run_in(hostile):
    (hostile / "script.py").write_text(
        "import subprocess, sys\n"
        f"sys.path.insert(1, {str(REPO)!r})\n"
        "from cachetrain import cli\n"
        "def main():\n"
        "    import tqdm\n"
        "    return subprocess.call([sys.executable, '-c', 'import numpy, signal'])\n"
        "cli.run(main)\n"
    )
    for name in ("cachetrain", "signal"):  # imported before anything can be done, without -P
        (hostile / f"{name}.py").unlink()
    done = subprocess.run([sys.executable, "script.py"], cwd=hostile, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_script_of_another_checkout_is_refused_not_run_with_this_ones_code(tmp_path):
    (tmp_path / "cachetrain").mkdir()
    shutil.copy(REPO / "cachetrain" / "cli.py", tmp_path / "cachetrain")
    (tmp_path / "cache").mkdir()
    script = shutil.copy(REPO / "cache" / "create_clipl.py", tmp_path / "cache")
    done = subprocess.run([sys.executable, "-P", script, "--help"], cwd="/", capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"would run the code in {REPO}; install that in {tmp_path}" in done.stderr


def test_a_crash_has_an_exit_code_of_its_own(capsys):
    from cachetrain import cli

    too_little_memory = (MemoryError("vae: x"), RuntimeError("DefaultCPUAllocator: can't allocate memory\nframe 0"))
    for error, code in (
        (KeyError("x"), 70),
        (RuntimeError("x"), 70),
        *((error, 2) for error in (ValueError("a\x1b\nb"), OSError("x"), *too_little_memory)),
    ):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit) as ended:
            cli.run(main)
        assert ended.value.code == code
        errors = capsys.readouterr().err
        assert ("Traceback" in errors, errors.count("\n") == 1) == (code == 70, code == 2)
        assert error not in too_little_memory or "out of memory" in errors


# The virtual environment

PYTHON = """
case "$*" in
*sys.version_info*) exit ${OLD:-0} ;;
--version) echo Python 3.10.2 ;;
"-m venv .venv")
    mkdir -p .venv/bin && echo made >>made
    cp "$0" .venv/bin/python
    [ -z "${INTERRUPTED:-}" ] || exit 130
    printf '#!/bin/bash\\necho "pip 25 from %s/.venv/lib/pip (python)"\\n' "$PWD" >.venv/bin/pip
    chmod +x .venv/bin/pip && touch .venv/bin/activate ;;
"-m pip install"*) echo "${@: -1}" >installed ;;
esac
"""


def make_venv(checkout, *extra, **settings):
    """Runs .ci/make_venv of a checkout with a stand-in for Python; returns (exit code, stderr, times it was made)."""
    (checkout / ".ci").mkdir(exist_ok=True)
    script = shutil.copy(REPO / ".ci" / "make_venv", checkout / ".ci")
    environment = os.environ | {"PYTHON": str(executable(checkout / "python", PYTHON))} | settings
    done = subprocess.run([script, *extra], env=environment, cwd="/", capture_output=True, text=True)
    made = checkout / "made"
    return done.returncode, done.stderr, made.read_text().count("made") if made.exists() else 0


def test_a_working_environment_is_kept_and_an_interrupted_one_made_again(tmp_path):
    assert make_venv(tmp_path, INTERRUPTED="1")[::2] == (130, 1)
    assert not (tmp_path / ".venv" / "bin" / "pip").exists()
    assert make_venv(tmp_path, "test")[::2] == (0, 2)
    assert (tmp_path / "installed").read_text() == ".[test]\n"
    assert make_venv(tmp_path)[::2] == (0, 2)
    assert (tmp_path / "installed").read_text() == ".\n"


def test_environment_of_a_moved_or_copied_checkout_is_made_again(tmp_path):
    assert make_venv((tmp_path / "a b").mkdir() or tmp_path / "a b")[::2] == (0, 1)
    shutil.copytree(tmp_path / "a b", tmp_path / "copy")
    assert make_venv(tmp_path / "copy")[::2] == (0, 2)
    (tmp_path / "a b").rename(tmp_path / "moved")
    assert make_venv(tmp_path / "moved")[::2] == (0, 2)
    assert make_venv(tmp_path / "moved")[::2] == (0, 2)


def test_old_python_is_told_what_is_needed(tmp_path):
    code, errors, made = make_venv(tmp_path, OLD="1")
    assert (code, made) == (2, 0)
    assert "needs Python 3.11 or newer; found: Python 3.10.2" in errors and "PYTHON=" in errors


def test_quickstart_takes_only_failed_images_for_success(tmp_path):
    encode = next(part for part in (REPO / "quickstart.sh").read_text().split("\n\n") if part.startswith("encode()"))
    for code, passes in ((0, True), (1, True), (2, False), (70, False), (137, False), (143, False)):
        done = subprocess.run(["bash", "-c", f"set -e\n{encode}\nencode bash -c 'exit {code}'"])
        assert (done.returncode == 0) == passes, code


def test_quickstart_trains_each_folder_apart_and_never_takes_one_for_another(tmp_path):
    work = tmp_path / "checkout"
    (work / "dataset_scripts").mkdir(parents=True)
    shutil.copy(REPO / "quickstart.sh", work)
    programs = ".ci/make_venv .venv/bin/python models/compose_t5_sd.py cache/create_img_sdxl.py"
    for name in (*programs.split(), "cache/create_t5cache_768.py", "sample.py", "report.py"):
        executable(work / name, "true")
    (work / ".venv/bin/activate").write_text("PATH=$PWD/.venv/bin:$PATH")
    executable(work / "train_t5.sh", 'mkdir -p "$OUTPUT/checkpoint-000600" && echo "$DATADIR" >>trained')

    def run(folder):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        command = [work / "quickstart.sh", "--data_root", tmp_path / folder]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True)
        return done.returncode, done.stderr

    assert [run(folder)[0] for folder in ("a/my pets", "a/birds", "a/my pets")] == [0, 0, 0]
    code, errors = run("b/my pets")
    assert code == 2 and errors.count("\n") == 1 and "quickstart/output/t5_my_pets is not of" in errors
    assert (work / "trained").read_text().splitlines() == [
        str(tmp_path / "a" / name) for name in ("my pets", "birds")
    ]
    shutil.rmtree(work / "quickstart/output/t5_my_pets")
    assert run("b/my pets")[0] == 0
    assert (work / "trained").read_text().splitlines()[2:] == [str(tmp_path / "b/my pets")]
