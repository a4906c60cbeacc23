"""The types of the settings tables in utils/settings.py, and the page that documents these tables."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MISSING = object()

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "str": "text",
    "ints": "a list of whole numbers",
    "floats": "a list of numbers",
    "strs": 'a list of texts (quote names such as "01")',
    "list": "a list",
    "map": "a mapping",
    "shares": "a mapping from names to numbers",
    "any": "a value",
}


@dataclass(frozen=True)
class Setting:
    """One key.

    Args:
        kind: one of KINDS; a "?" after it allows null.
        help: one or two sentences: what it does, and when to change it.
        default: the value if the key is left out; MISSING if it is required.
        low, high: bounds of a number, or of each number in a list or mapping.
        above, below: bounds that the number may not reach.
        length: required length of a list.
        may_be_empty: whether a list may be empty.
        check: what is wrong with a value beyond all this, in words, or None.
        choices: the allowed values, or the allowed names in a mapping.
        legacy: kept so that files of the reference program and of earlier versions load; nobody needs to set it.
    """

    kind: str
    help: str
    default: Any = MISSING
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    length: int | None = None
    may_be_empty: bool = False
    choices: tuple[str, ...] = ()
    check: Callable[[Any], str | None] | None = None
    legacy: bool = False


@dataclass(frozen=True)
class Section:
    """A group of keys. An optional section may be left out or null; both mean null."""

    keys: dict[str, Any]
    optional: bool = False


@dataclass(frozen=True)
class Entries:
    """A list of sections that are told apart by one of their keys. Left-out keys are not filled in.

    Args:
        keys: those of each entry.
        help: as in Setting.
        default: as in Setting.
        distinct: the key whose values have to differ.
        kwargs: the keys of an entry's `kwargs`, by the entry's `type`.
        may_be_empty: whether the list may.
    """

    keys: dict[str, Any]
    help: str
    default: Any = MISSING
    distinct: str = "name"
    kwargs: dict[str, Section] = field(default_factory=dict)
    may_be_empty: bool = False


def rows(section: Section, prefix: str = "") -> list[tuple[str, Setting | Entries]]:
    """Every (dotted key, setting) of a section, in order."""
    table = []
    for name, entry in section.keys.items():
        table += rows(entry, f"{prefix}{name}.") if isinstance(entry, Section) else [(f"{prefix}{name}", entry)]
    return table


def constraint(setting: Setting | Entries) -> str:
    """The type and the bounds or choices of a setting, in words."""
    if isinstance(setting, Entries):
        return f"a list of {{{', '.join([*setting.keys, *(['kwargs'] if setting.kwargs else [])])}}}"
    if setting.choices and setting.kind != "shares":
        return " or ".join(setting.choices)
    text = KINDS[setting.kind.rstrip("?")] + (" or null" if setting.kind.endswith("?") else "")
    if setting.choices:
        text += f" ({', '.join(setting.choices)})"
    if setting.length is not None:
        text += f" ({setting.length})"
    signs = ((">=", setting.low), (">", setting.above), ("<=", setting.high), ("<", setting.below))
    bounds = [f"{sign} {bound:.10g}" for sign, bound in signs if bound is not None]
    return ", ".join([text, *bounds])


def _as_yaml(value: Any) -> str:
    return "null" if value is None else str(value).replace("'", "")


def settings_page(tables: dict[str, Section]) -> str:
    """The Markdown page that documents the tables, by file."""
    lines = [
        "# Settings",
        "",
        "Every key of the YAML files under `experiments/<dataset>/`. Set one for a single run with `--set key=value`.",
        "*Legacy* keys need not be set: they exist so that files of the reference program and earlier versions load.",
        "",
        "This page is written by `python -m utils.settings > docs/settings.md`; edit",
        "[utils/settings.py](../utils/settings.py) or",
        "[utils/detector_settings.py](../utils/detector_settings.py) instead.",
    ]
    for name, section in tables.items():
        file = f"{name}.yaml" + (" and realnet_unified.yaml" if name == "realnet" else "")
        lines += ["", f"## {file}", "", "| key | value | default | meaning |", "|---|---|---|---|"]
        for key, setting in rows(section):
            default = "required" if setting.default is MISSING else f"`{_as_yaml(setting.default)}`"
            legacy = "*Legacy.* " if isinstance(setting, Setting) and setting.legacy else ""
            # <dataset> would be taken for a tag, and not be shown.
            meaning = setting.help.replace("<", "&lt;")
            lines.append(f"| `{key}` | {constraint(setting)} | {default} | {legacy}{meaning} |")
    return "\n".join(lines) + "\n"
