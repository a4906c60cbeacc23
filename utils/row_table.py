"""A CSV table of the files in a folder, which a run that is killed does not lose."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from utils.errors import UsageError
from utils.files import append_text, write_text

Row = dict[str, str]


class RowTable:
    """Rows that ranks note in journals beside the table while they work; at the end of the run, the table has them.

    Only one run at a time may use it (lock.folder_lock).

    Args:
        path: of the table.
        columns: its names.
        check: raises KeyError, TypeError or ValueError if a row has no numbers where numbers belong.
        advice: what to do about a table that somebody has changed.
    """

    def __init__(self, path: Path, columns: Sequence[str], check: Callable[[Row], object], advice: str) -> None:
        self.path, self.columns, self.check, self.advice = path, tuple(columns), check, advice

    def begin(self) -> None:
        """Make ready for notes, after a run that was killed while it wrote one."""
        for path in self._journals():
            # What follows a line that was cut off must not become a part of it.
            append_text(path, "\n")

    def clear(self) -> None:
        """Remove all rows."""
        for path in [*self._journals(), self.path]:
            path.unlink(missing_ok=True)

    def note(self, row: Row, rank: int) -> None:
        """Note a row; each rank has a journal of its own."""
        append_text(self._journal(str(rank)), json.dumps(row) + "\n")

    def rows(self) -> list[Row]:
        """The rows of the table, then those that were noted since.

        Raises:
            UsageError: a row of the table is damaged.
        """
        return [*self._table(), *(row for path in self._journals() for row in self._noted(path))]

    def write(self, rows: Iterable[Row]) -> None:
        """Write the table anew; what was noted is forgotten."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
        for path in self._journals():
            path.unlink()

    def _journal(self, rank: str) -> Path:
        return self.path.with_name(f".{self.path.stem}.rank{rank}.jsonl")

    def _journals(self) -> list[Path]:
        pattern = self._journal("*")
        return sorted(pattern.parent.glob(pattern.name))

    def _table(self) -> list[Row]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.DictReader(file))
        for line, row in enumerate(rows, 2):
            if not self._is_complete(row):
                raise UsageError(f"{self.path}, line {line}: is not as it was written; {self.advice}")
        return rows

    def _noted(self, path: Path) -> Iterator[Row]:
        """The rows of a journal, whose last one may be cut off."""
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and self._is_complete(row):
                yield row

    def _is_complete(self, row: Row) -> bool:
        try:
            self.check(row)
        except (KeyError, TypeError, ValueError):
            return False
        return set(row) == set(self.columns)
