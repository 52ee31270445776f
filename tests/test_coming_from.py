"""docs/coming-from.md and the spellings of other trainers: what they name exists, and each gets one line."""

import re

import pytest
from helpers import REPO, load_script

from cachetrain import cli
from cachetrain.caching.arguments import image_parser, text_parser
from cachetrain.training.flags import add_flags
from cachetrain.training.optimizers import OPTIMIZERS
from cachetrain.training.spellings import INSTEAD, OPTIMIZER_SPELLINGS

PAGE = (REPO / "docs" / "coming-from.md").read_text(encoding="utf-8")
OPTION = re.compile(r"--[a-z0-9_]+")
NEEDED = ["--train_data_dir", "/data", "--model", "m", "--output_dir", "out"]


def parse(*argv):
    return load_script("train_from_cached.py").parse_args([*NEEDED, *argv])


def our_options():
    trainer = cli.parser("")
    add_flags(trainer)
    parsers = [trainer, image_parser("", "img_sdxl", "m"), text_parser("", "txt_clipl", "m")]
    return {option for parser in parsers for option in parser._option_string_actions} | {
        "--clip_skip",
        "--max_length",
    }


def rows():
    """(cell of the other trainer, cells of ours) of each row of the page's tables."""
    lines = [
        line
        for line in PAGE.splitlines()
        if line.startswith("|") and not line.startswith(("|---", "| there", "| folder"))
    ]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [(there, " ".join(here)) for there, *here in cells]


def test_each_option_that_the_page_or_a_message_says_to_use_exists():
    options = our_options()
    named = {option for _, here in rows() for option in OPTION.findall(here)} - {"--n"}
    assert named <= options
    assert {option for advice in INSTEAD.values() for option in OPTION.findall(advice)} - {"--help"} <= options
    scripts = set(re.findall(r"(?:cache/)?create_\w+\.py", " ".join(INSTEAD.values()) + PAGE))
    assert all((REPO / "cache" / script.removeprefix("cache/")).exists() for script in scripts)


def test_each_spelling_has_a_row_in_the_page():
    there = {option for cell, _ in rows() for option in OPTION.findall(cell)}
    presets = {
        f"--{name}" for cell, _ in rows() for name in re.findall(r"`(\w+)`", cell)
    }  # OneTrainer has no options
    assert INSTEAD.keys() <= there | presets
    accepted = {"--pretrained_model", "--is_custom", "--fp32", "--min_lr_ratio", "--num_cycles", "--force_toklen"}
    assert accepted <= there and not INSTEAD.keys() & our_trainer_options()
    for name in (*OPTIMIZER_SPELLINGS, "d_lion", "linear_with_min_lr"):
        assert re.search(rf"^\|.*\b{name}`.*\|", PAGE, re.MULTILINE), name


def our_trainer_options():
    trainer = cli.parser("")
    add_flags(trainer)
    return trainer._option_string_actions.keys()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--pretrained_model x", "--model x"),
        ("--fp32", "--precision fp32"),
        ("--scheduler cosine_with_min_lr --min_lr_ratio 0.3", "--scheduler cosine_with_min_lr --min_lr_rate 0.3"),
        ("--scheduler linear_with_min_lr --min_lr_ratio 0.3", "--scheduler linear_with_min_lr --min_lr_rate 0.3"),
        ("--optimizer opt_lion", "--optimizer lion"),
        ("--optimizer py_lion", "--optimizer lion"),
    ],
)
def test_a_spelling_of_another_trainer_means_the_same(theirs, ours):
    assert vars(parse(*theirs.split())) == vars(parse(*ours.split())) != vars(parse())
    assert set(OPTIMIZER_SPELLINGS.values()) <= OPTIMIZERS.keys()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        *(([option, "1"], f"{option} is not an option here: {advice}") for option, advice in INSTEAD.items()),
        (["--bach_size=4"], "unknown option --bach_size; did you mean --batch_size?"),
        (["--zzz"], "unknown option --zzz; --help lists all options"),
        (["--optimizer", "d_lion"], "d_lion is not available; use prodigy"),
    ],
)
def test_an_option_that_is_not_there_gets_one_line_that_says_what_to_use(argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*argv)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and said in error


def test_a_misspelled_option_is_named_before_those_that_are_missing_and_values_are_left_alone(capsys):
    script = load_script("cache/create_clipl.py")
    with pytest.raises(SystemExit):
        script.main(["--data_rot", "x"])
    assert "unknown option --data_rot; did you mean --data_root?" in capsys.readouterr().err
    assert parse("--sample_prompt", "--a cat, --b").sample_prompt == ["--a cat, --b"]  # with a space: no option
    assert parse("--batch", "3").batch_size == 3  # abbreviated
