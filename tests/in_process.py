"""Runs the commands in the test process, which is quick enough for a hundred broken inputs."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from utils import cli


def run(main: Callable, arguments: Iterable[str], folder: Path, monkeypatch, capsys) -> tuple[int, str, str]:
    """Run a script's main in a folder; return its exit code, stdout and stderr. Refuses tracebacks and leftovers."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [main.__module__, *arguments])
    try:
        cli.run(main)
        code = 0
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert not list(folder.rglob(".part-*"))
    return code, captured.out, captured.err
