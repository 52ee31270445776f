"""What the scripts' command lines share. Imports no torch, so that `--help` answers at once."""

import argparse
import math
import os
import signal
import sys
from contextlib import contextmanager


def parser(doc):
    """An argument parser whose help starts with the script's docstring and shows defaults."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            if action.default in (None, False) or action.required:
                return action.help
            return super()._get_help_string(action)

    return argparse.ArgumentParser(description=doc, formatter_class=Formatter)


def run(main):
    """Runs a script's main(argv); an expected error becomes one line on stderr and exit code 2.

    A signal ends it as an exception, so that what is open is closed; a second one ends it at once. Exit codes of
    interrupted scripts are the shell's: 130 after Ctrl-C, 143 after SIGTERM.
    """
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
        _stop(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`", 2)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if came:  # libraries make their own errors of it
            _stop("terminated" if came[0] == signal.SIGTERM else "interrupted", 128 + came[0])
        _stop(error, 2)


@contextmanager
def deferred_signals():
    """Yields a list that gets the number of the first SIGINT or SIGTERM, which does nothing else; a second one ends
    the process at once. Afterwards a signal does again what it did before."""
    came, main_pid = [], os.getpid()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

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
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as in the background of a shell script
            signal.signal(number, handler)


def _stop(message, code):
    print(f"{sys.argv[0]}: {message}", file=sys.stderr)
    sys.exit(code)


def add_device_arguments(parser):
    parser.add_argument("--device", help="torch device; default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: bf16 on cuda, fp32 on cpu")


def add_compose_arguments(parser):
    parser.add_argument("--unet", required=True, help="UNet; a config without weights gives a fresh one")
    parser.add_argument("--fresh_unet", action="store_true", help="only the UNet's config; new weights from --seed")
    parser.add_argument("--vae", required=True, help="VAE")
    parser.add_argument("--out", required=True, help="pipeline directory to write")
    parser.add_argument("--objective", choices=("epsilon", "v_prediction", "flow"), default="epsilon",
                        help="what the UNet is to predict; decides the scheduler saved with it")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of all random weights")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")


class Steps(str):
    """A number of optimizer steps ("500"), or of whole or partial epochs ("2e", "0.1e")."""

    def __new__(cls, text):
        number = text.removesuffix("e")
        if float(number) < 0 or (number == text and not number.isdecimal()):
            raise ValueError(text)
        return super().__new__(cls, text)

    def resolve(self, steps_per_epoch):
        """The number as optimizer steps; epochs round up, so that every sample is visited."""
        return math.ceil(float(self[:-1]) * steps_per_epoch) if self.endswith("e") else int(self)


def available_cores():
    """CPU cores this process may use, which in a container can be fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_this_rank():
    """This process's share of them, where a launcher has started several on this machine."""
    return available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
