"""Tables that a killed run does not lose."""

import pytest

from utils.errors import UsageError
from utils.row_table import RowTable


def table_in(folder) -> RowTable:
    return RowTable(folder / "things.csv", ("name", "size"), lambda row: int(row["size"]), "delete it")


def row(name: str, size: int) -> dict[str, str]:
    return {"name": name, "size": str(size)}


def test_rows_are_there_before_and_after_the_table_is_written(tmp_path):
    table = table_in(tmp_path)
    assert table.rows() == []
    table.note(row("a, b", 1), rank=0)
    table.note(row("c", 2), rank=1)
    assert table_in(tmp_path).rows() == [row("a, b", 1), row("c", 2)]
    table.write(table.rows())
    table.note(row("c", 3), rank=0)
    assert table_in(tmp_path).rows() == [row("a, b", 1), row("c", 2), row("c", 3)]
    table.write(table.rows()[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["things.csv"]
    assert table.rows() == [row("a, b", 1)]
    table.note(row("d", 4), rank=0)
    table.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_note_that_was_cut_off_does_not_spoil_the_next_one(tmp_path):
    table = table_in(tmp_path)
    table.note(row("a", 1), rank=0)
    with (tmp_path / ".things.rank0.jsonl").open("a") as file:
        file.write('{"name": "b", "si')
    table.begin()
    table.note(row("c", 2), rank=0)
    assert table.rows() == [row("a", 1), row("c", 2)]


@pytest.mark.parametrize("line", ["a", "a,b", "a,1,2", "\xff"])
def test_a_table_that_somebody_has_changed_is_named(line, tmp_path):
    (tmp_path / "things.csv").write_text(f"name,size\nb,2\n{line}\n", encoding="latin-1")
    with pytest.raises(UsageError, match=r"things.csv, line 3: is not as it was written; delete it"):
        table_in(tmp_path).rows()
