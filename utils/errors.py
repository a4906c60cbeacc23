"""The ways a command ends early, told apart by exit code. utils/cli.py prints failures as one line on stderr."""


class UsageError(ValueError):
    """Wrong use: a setting, an argument or an input file. Exit code 2."""


class RunError(RuntimeError):
    """A failure while running that is no mistake in the input. Exit code 1."""


class Stopped(Exception):
    """A signal has asked the run to end, and its state is saved. Exit code 128 + signal.

    Args:
        signal: its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"signal {signal}")
        self.signal = signal
