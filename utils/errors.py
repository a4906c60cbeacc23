"""Exceptions that end a command, one exit code each. utils/cli.py prints them as one line on stderr."""


class UsageError(ValueError):
    """Wrong use: a setting, an argument or an input file. Exit code 2."""


class RunError(RuntimeError):
    """A failure that is not a mistake in the input. Exit code 1."""


class Stopped(Exception):
    """A signal asked the run to end, and its state is saved. Exit code 128 + signal.

    Args:
        signal: its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"signal {signal}")
        self.signal = signal
