"""Names that come out of files and folders: which may become a folder of results, and how names are shown."""

import unicodedata

MOST_BYTES = 200  # of a class's name; file systems allow 255 for a file name with its endings
MOST_LETTERS = 1000  # of a text in settings; paths are the longest ones
RESERVED = ("all", "uni", "mean")  # --class_name all, the lists of all classes, and the last row of tables
# Control characters, half surrogate pairs, line and paragraph separators.
_CONTROL = ("Cc", "Cs", "Zl", "Zp")
# They change the direction of the text around them, so that a name reads as another one.
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def name_problem(name: object) -> str | None:
    """Why a name cannot be that of a class, whose results go to a folder of this name; None if it can.

    Example:
        >>> name_problem("bolts M4"), name_problem("../x"), name_problem("-rf"), name_problem("mean")
        (None, 'holds a slash', 'begins with a dot, dash or blank', 'is reserved')
    """
    if not isinstance(name, str):
        return "is not text"
    if not name.strip():
        return "is empty"
    if "/" in name or "\\" in name:
        return "holds a slash"
    if any(_is_control(character) for character in name):
        return "holds a control character"
    if name[0] in ".- ":
        return "begins with a dot, dash or blank"
    if name[-1] in ". ":
        return "ends with a dot or blank"
    if "," in name or "{" in name:
        return "holds a comma or a brace, which --class_name and paths in settings use"
    if len(name.encode()) > MOST_BYTES:
        return f"is longer than {MOST_BYTES} bytes"
    return "is reserved" if name in RESERVED else None


def text_problem(text: str) -> str | None:
    """Why a text cannot be a value of a setting; None if it can."""
    if any(_is_control(character) for character in text):
        return "holds a control character"
    return f"is longer than {MOST_LETTERS} letters" if len(text) > MOST_LETTERS else None


def folder_problem(text: str) -> str | None:
    """Why a text cannot be the path of a folder; None if it can."""
    if not text.strip():
        return "is empty"
    longest = max(len(part.encode()) for part in text.replace("\\", "/").split("/"))
    return f"has a part of more than {MOST_BYTES} bytes" if longest > MOST_BYTES else None


def shown(text: str) -> str:
    """The text with control characters escaped, except line breaks: a name cannot steer the terminal.

    Parts of names that are not UTF-8 are escaped too, because they cannot be printed.

    Example:
        >>> shown("a\\x1b[2Jb")
        'a\\\\x1b[2Jb'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode() if _is_control(character) and character not in "\n\t" else character
        for character in text
    )


def csv_cell(text: str) -> str:
    """A text for a CSV file that spreadsheets will not take for a formula: with an apostrophe before = + - @.

    Example:
        >>> csv_cell("=1+1"), csv_cell("bolts")
        ("'=1+1", 'bolts')
    """
    return f"'{text}" if text.startswith(_FORMULA) else text


def markdown_cell(text: str) -> str:
    """A text for a cell of a Markdown table."""
    return shown(text).replace("\n", " ").replace("|", "\\|")


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in _CONTROL or character in _DIRECTIONS
