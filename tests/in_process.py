"""The commands without a process of their own: quick enough for a hundred broken inputs."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from utils import cli


def run(main: Callable, arguments: Iterable[str], folder: Path, monkeypatch, capsys) -> tuple[int, str, str]:
    """Run a script's main in a folder; returns its exit code, stdout and stderr. No traceback, no leftover file."""
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
