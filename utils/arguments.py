"""Command-line arguments, which are parsed before PyTorch is loaded: that takes seconds."""

import argparse
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from utils.choices import FORWARD_PRECISIONS, FP32


def parse_early(name: str, parse_args: Callable[[], argparse.Namespace]) -> None:
    """Answer --help and refuse wrong options now, if the module is the script that was started.

    The scripts call it before they import what takes seconds. During these seconds Ctrl-C ends them without a
    traceback, and a library that is not installed is named in one line.

    Args:
        name: the module's __name__.
        parse_args: parses sys.argv.
    """
    if name != "__main__":
        return
    sys.excepthook = _explain
    parse_args()


def _explain(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Exit code and message of what ends a script before its main is run."""
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    if issubclass(kind, ModuleNotFoundError) and not os.environ.get("REALNET_DEBUG"):
        print(
            f"error: the Python library {error.name} is not installed in {sys.executable}; `bash run.sh setup` makes "
            "an environment, then use .venv/bin/python, or: pip install -r requirements.txt",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
    sys.__excepthook__(kind, error, traceback)


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help begins with a script's docstring."""
    return _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_parser(doc: str) -> argparse.ArgumentParser:
    """The arguments of scripts that read settings: data set, file, overrides, device."""
    arguments = parser(doc)
    arguments.add_argument("--dataset", help="name of a folder experiments/NAME/ with this script's YAML")
    arguments.add_argument("--config", help="settings file to use instead")
    arguments.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, e.g. trainer.max_epoch=10"
    )
    add_device(arguments)
    # torch.distributed.launch passes the rank in one of these spellings; the environment has it too.
    arguments.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return arguments


def add_device(arguments: argparse.ArgumentParser) -> None:
    """What the networks run on."""
    arguments.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: a GPU if there is one")


def add_precision(arguments: argparse.ArgumentParser) -> None:
    """The precision of the forward passes of a trained detector."""
    precision_help = "of the forward pass (fp32); thresholds hold for the one that they were chosen in"
    arguments.add_argument("--precision", choices=FORWARD_PRECISIONS, default=FP32, help=precision_help)


def add_resume_options(arguments: argparse.ArgumentParser) -> None:
    """What a training does with the checkpoints of an earlier run."""
    choice = arguments.add_mutually_exclusive_group()
    choice.add_argument("--resume", action="store_true", help="continue the run whose checkpoints are in the folder")
    choice.add_argument("--overwrite", action="store_true", help="delete the checkpoints of an earlier run, start anew")


class _Parser(argparse.ArgumentParser):
    """Explains the error of a value in braces that the shell has cut into words."""

    def error(self, message: str) -> NoReturn:
        words = sys.argv[1:]
        cut = next(
            (word for word in words if word.count("{") + word.count("[") > word.count("}") + word.count("]")), ""
        )
        if message.startswith("unrecognized arguments") and "=" in cut:
            message += f'\nput quotes around the whole value: --set "{cut} ..."'
        super().error(message)
