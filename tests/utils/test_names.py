"""Names that come out of files do no harm as folders, in terminals, in spreadsheets and in Markdown."""

import logging

import pytest

from utils.config import load_config
from utils.errors import UsageError
from utils.log import log_to_terminal
from utils.names import csv_cell, markdown_cell, name_problem, shown

HARMLESS = [
    "bolts M4",
    "Teil A (neu)",
    "螺丝",
    "деталь",
    "a|b",
    "x;touch y",
    "$(reboot)",
    "café",
    "1.0",
    "=1+1",
    "名前 2",
]
HARMFUL = [
    "", " ", ".", "..", "../x", "/etc", "a/b", "a\\b", "-rf", " a", ".lock", "a\nb", "a\x1b[2J", "a\0b", "x\u202egnp",
    "a" * 201, "螺" * 67, "all", "uni", "mean", "a,b", "{}", "\ud800", "a\u2028b", 3, None, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_names_of_classes_may_hold_what_does_no_harm(name):
    assert name_problem(name) is None


@pytest.mark.parametrize("name", HARMFUL, ids=repr)
def test_names_that_no_class_may_have(name):
    assert name_problem(name)


def test_a_name_cannot_steer_the_terminal(capsys):
    log_to_terminal()
    logging.getLogger("realnet").info("%s\n%s", "a\x1b]0;title\x07b\rc", "名\ud800")
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07b\\rc\n名\\ud800\n"
    assert shown("plain\ttext\n") == "plain\ttext\n"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_a_cell_is_no_formula(start):
    assert csv_cell(f"{start}cmd|x") == f"'{start}cmd|x"


def test_a_name_stays_in_its_markdown_cell():
    assert markdown_cell("a|b\nc") == "a\\|b c"


@pytest.mark.parametrize(
    "text",
    [
        "net: " + "[" * 60 + "]" * 60,
        "net: [" + "[" * 300 + "]" * 300 + "]",
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
        + "net: *i",
        "net: &a [*a]",
        "net: &a {x: *a}",
    ],
    ids=["60 levels", "300 levels", "alias bomb", "list in itself", "mapping in itself"],
)
def test_nested_values_end_at_once(text, tmp_path):
    path = tmp_path / "realnet.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"realnet\.yaml.*(levels of nested values|not readable as YAML)"):
        load_config(path)
