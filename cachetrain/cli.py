"""What the scripts' command lines share. Imports no torch, so that `--help` answers at once."""

import argparse
import difflib
import math
import os
import re
import signal
import sys
import traceback
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import ClassVar

from cachetrain.log import first_line, printable

# What asks a script to stop. SIGHUP: the terminal is gone; under nohup it is ignored.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def parser(doc: str) -> argparse.ArgumentParser:
    """An argument parser whose help starts with the script's docstring and shows ranges and defaults."""
    return Parser(description=doc, formatter_class=HelpFormatter)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; of an option that does not exist, what to use instead.

    Attributes:
        instead: {option of another program: what to use}.
    """

    instead: ClassVar = {}

    def parse_known_args(self, args=None, namespace=None):
        options = list(self._option_string_actions)
        for word in sys.argv[1:] if args is None else args:
            name = word.partition("=")[0]
            if name == "--":
                break
            if not name.startswith("--") or " " in name or name in options:
                continue
            if name in self.instead or not any(option.startswith(name) for option in options):  # else an abbreviation
                self.error(self._unknown(name, options))
        return super().parse_known_args(args, namespace)

    def _unknown(self, name, options):
        if name in self.instead:
            return f"{name} is not an option here: {self.instead[name]}"
        near = difflib.get_close_matches(name, options, 1)
        return f"unknown option {name}; " + (f"did you mean {near[0]}?" if near else "--help lists all options")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the docstring, and ends each help text with the range and the default of the flag.

    A help text that ends with "; default: ..." says the default itself.
    """

    def _get_help_string(self, action):
        text, _, default = action.help.partition("; default: ")
        if not default and action.option_strings and not action.required:
            default = _in_words(action.default)
        notes = [action.type.range] if isinstance(action.type, Number) else []
        notes += [f"default: {default}"] if default else []
        return f"{text} ({'; '.join(notes)})" if notes else text


def _in_words(default):
    """A default as one would type it; "" where it says nothing."""
    if any(default is nothing for nothing in (None, False, "", argparse.SUPPRESS)):
        return ""
    return " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default).replace("%", "%%")


def run(main):
    """Runs a script's main(argv); an expected error becomes one line on stderr and exit code 2.

    A signal ends it as an exception, so that what is open is closed; a second one ends it at once. Exit codes of
    interrupted scripts are the shell's: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP. An unexpected error is
    shown as it is, with exit code 70: 1 is what main returns where part of its work failed.
    """
    _guard_imports()
    main_pid, came = os.getpid(), []

    def interrupt(number, _):
        if os.getpid() != main_pid:
            os._exit(128 + number)  # a process that a library forked: it has nothing to say
        came.append(number)
        _set_handlers(signal.SIG_DFL)
        raise KeyboardInterrupt  # of SIGTERM too: what ends cleanly on Ctrl-C does so when a scheduler stops it

    try:
        _set_handlers(interrupt)
        code = main()
        _set_handlers(signal.SIG_DFL)  # all is done: no exception in what the interpreter does last
        sys.exit(code)
    except ModuleNotFoundError as error:
        _stop(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", 2)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if came:  # libraries make their own errors of it
            _stop("interrupted" if came[0] == signal.SIGINT else "terminated", 128 + came[0])
        _stop(error, 2)
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_of_memory(error)):
            _stop(f"out of memory ({first_line(error)}); use a smaller --batch_size or smaller pictures", 2)
        traceback.print_exc()
        sys.exit(70)  # EX_SOFTWARE of sysexits.h


def _is_of_memory(error):
    """Whether an error is torch's, which is not imported here, for too little memory of a device or the host."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _guard_imports():
    """Sees to it that this script runs the code of its checkout, and that no file that lies around takes the place of
    a package: neither beside the script nor, in the processes that it starts, in the current directory."""
    os.environ["PYTHONSAFEPATH"] = "1"
    if not (main_file := getattr(sys.modules["__main__"], "__file__", None)):
        return  # python -c
    script = Path(main_file).resolve()
    checkout = next((folder for folder in script.parents[:2] if (folder / "cachetrain" / "cli.py").exists()), None)
    if checkout and not (checkout / "cachetrain" / "cli.py").samefile(__file__):
        other = Path(__file__).parents[1]
        _stop(f"would run the code in {other}; install that in {checkout}: cd there, then pip install -e .", 2)
    if not sys.flags.safe_path and sys.path[0] == str(script.parent):
        sys.path.append(sys.path.pop(0))


@contextmanager
def deferred_signals():
    """Yields a list that gets the number of the first of STOP_SIGNALS, which does nothing else; a second one ends
    the process at once. Afterwards a signal does again what it did before."""
    came, main_pid = [], os.getpid()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def note(number, _):
        if os.getpid() != main_pid:
            os._exit(128 + number)
        came.append(number)
        _set_handlers(signal.SIG_DFL)

    _set_handlers(note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _set_handlers(handler):
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as in the background of a shell script
            signal.signal(number, handler)


def _stop(message, code):
    with suppress(OSError):  # the terminal is gone, or its disk is full
        print(printable(f"{sys.argv[0]}: {message}"), file=sys.stderr)
    sys.exit(code)


def is_plain(number: str) -> bool:
    """Whether a number is written as everywhere else: Python's int() also takes 1_0, and digits of any script."""
    return number.isascii() and "_" not in number


class Number:
    """An argparse type: a number within a range, which `--help` and the error message both show.

    Args:
        kind: int or float.
        least: smallest number accepted.
        most: largest number accepted.
        step: only multiples of it are accepted.
        exclude: those of the two bounds that are refused themselves.
        range_text: the range in words, where the bounds alone do not read well.
    """

    def __init__(self, kind, least, most, *, step=None, exclude=(), range_text=None):
        self.kind = kind
        self.least = least
        self.most = most
        self.step = step
        self.exclude = exclude
        self.range = range_text or self._range_in_words()
        self.expected = f"a {'whole ' if kind is int else ''}number {self.range}"

    def _range_in_words(self):
        words = f"{'above' if self.least in self.exclude else 'from'} {self.least}"
        words += f" to {'below ' if self.most in self.exclude else ''}{self.most}"
        return words + (f" in steps of {self.step}" if self.step else "")

    def __call__(self, text: str):
        try:
            value = self.kind(text) if is_plain(text) else None
        except ValueError:
            value = None
        if value is None or not self.holds(value):
            raise argparse.ArgumentTypeError(f"expected {self.expected}, got {text if text.strip() else repr(text)}")
        if self.kind is float and 0 < abs(Decimal(text)) < SMALLEST:
            raise argparse.ArgumentTypeError(f"expected {self.expected}, got {text}, which is 0 in float32")
        return value

    def holds(self, value) -> bool:
        """Whether a number is within the range."""
        if not self.least <= value <= self.most or value in self.exclude:  # nan is refused, too
            return False
        return self.step is None or value % self.step == 0


SMALLEST = 2.0**-126  # of float32's numbers above 0 at full precision
# Ranges of flags, and of the same numbers in files. Where they end well above any use, it is because a larger number
# takes all memory, overflows, or makes a run that trains nothing.
positive_int = Number(int, 1, 10**9)
count = Number(int, 0, 10**9)
positive_float = Number(float, 0, 10**6, exclude=(0,))
not_negative = Number(float, 0, 10**6)
share = Number(float, 0, 1)
seed = Number(int, 0, 2**63 - 1, range_text="from 0 to 2^63 - 1")
port = Number(int, 0, 65535)
denoising_steps = Number(int, 1, 999)  # several of diffusers' schedulers fail at 1000, beyond the last timestep
pixels = Number(int, 8, 8192)
batch_size = Number(int, 1, 65536)
workers = Number(int, 0, 1024)
guidance = Number(float, 0, 1000)
scaling_factor = Number(float, 0, 1000, exclude=(0,))
repeats = Number(float, 0.001, 10_000)
MAX_STEPS, MAX_EPOCHS = 10**9, 10**6


class Steps(str):
    """A number of optimizer steps ("500"), or of whole or partial epochs ("2e", "0.1e")."""

    def __new__(cls, text):
        if not re.fullmatch(r"[0-9]+|([0-9]+\.?[0-9]*|\.[0-9]+)e", text):
            raise ValueError(text)
        return super().__new__(cls, text)

    def resolve(self, steps_per_epoch):
        """The number as optimizer steps; epochs round up, so that every sample is visited."""
        return math.ceil(float(self[:-1]) * steps_per_epoch) if self.endswith("e") else int(self)


class StepCount(Number):
    """An argparse type: optimizer steps or epochs, as `Steps`.

    Args:
        least: 0 or 1, the fewest steps; 1 also asks for more than 0 epochs.
    """

    def __init__(self, least):
        epochs = f"epochs {'above' if least else 'from'} 0 to {MAX_EPOCHS}"
        super().__init__(Steps, least, MAX_STEPS, range_text=f"steps from {least} to {MAX_STEPS}, or {epochs}")
        self.expected = f"a whole number of {self.range} with an e after it, like 0.5e"

    def holds(self, value) -> bool:
        return self.least <= value.resolve(1) <= (MAX_EPOCHS if value.endswith("e") else MAX_STEPS)


def add_device_arguments(parser):
    parser.add_argument("--device", help="torch device, like cuda:1 or cpu; default: cuda if there is one, else cpu")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="what the models compute in; default: bf16 on CUDA, fp32 on a CPU",
    )


def add_compose_arguments(parser):
    parser.add_argument("--unet", required=True, help="where the UNet comes from")
    parser.add_argument(
        "--fresh_unet",
        action="store_true",
        help="take only the config of --unet and give it new weights, to train from scratch",
    )
    parser.add_argument("--vae", required=True, help="where the VAE comes from")
    parser.add_argument(
        "--channels",
        choices=("repeat", "zero", "fresh"),
        help="give the UNet the VAE's number of latent channels. repeat: copies of the old channels, divided by "
        "their number; zero: the old channels, and zeros for further ones; fresh: new weights for conv_in and "
        "conv_out; default: refuse a VAE with another number",
    )
    parser.add_argument("--out", required=True, help="pipeline directory to write")
    parser.add_argument(
        "--objective",
        choices=("epsilon", "v_prediction", "flow"),
        default="epsilon",
        help="what the UNet learns to predict; the scheduler saved beside it fits",
    )
    parser.add_argument("--seed", type=seed, default=0, help="random seed of all new weights")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it is a pipeline directory")


def add_t5_compose_arguments(parser):
    """Adds what composing a model with T5 needs besides `add_compose_arguments`."""
    parser.add_argument("--t5", required=True, help="source of the T5 encoder and its tokenizer")
    parser.add_argument(
        "--fit_captions",
        metavar="FILE",
        help="fit the projection by PCA to the captions in this file, one on each line; default: a random orthogonal "
        "projection",
    )
    parser.add_argument(
        "--train_projection",
        action="store_true",
        help="make the projection a layer of the UNet, trained with the UNet; cache captions with --raw",
    )
    add_device_arguments(parser)


def available_cores():
    """CPU cores this process may use, which in a container can be fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_this_rank():
    """This process's share of them, where a launcher has started several on this machine."""
    return available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
