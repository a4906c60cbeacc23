"""Exceptions that end a command, each with its own exit code. utils/cli.py prints the errors on stderr."""


class UsageError(ValueError):
    """Wrong use: a wrong setting, argument or input file. Exit code 2."""


class RunError(RuntimeError):
    """A failure that is not a mistake in the input. Exit code 1."""


class Stopped(Exception):
    """A signal ended the run after its state was saved. Exit code 128 + signal.

    Args:
        signal: number of the signal.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"signal {signal}")
        self.signal = signal
