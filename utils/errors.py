"""The two ways a command fails, told apart by exit code. utils/cli.py prints them as one line on stderr."""


class UsageError(ValueError):
    """Wrong use: a setting, an argument or an input file. Exit code 2."""


class RunError(RuntimeError):
    """A failure while running that is no mistake in the input. Exit code 1."""
