"""The anomaly types of pairs, as `synthesize.py --types` names them."""

import math

from utils.choices import EDIT, NORMAL
from utils.errors import UsageError
from utils.settings import SETTINGS

TYPES = SETTINGS["realnet"].keys["dataset"].keys["train"].keys["anomaly_types"].choices
BLENDED = tuple(name for name in TYPES if name not in (NORMAL, EDIT))


def chosen_types(text: str | None, trained: dict[str, float]) -> dict[str, float]:
    """The shares of the anomaly types, which add up to 1, in the order of TYPES.

    Args:
        text: of --types; shares need not add up to 1, and are equal without numbers.
        trained: those of the settings, which are taken without `normal` if there is no text.

    Example:
        >>> chosen_types("dtd=3,sdas=1", {}), chosen_types(None, {"normal": 0.5, "dtd": 0.25, "noise": 0.25})
        ({'sdas': 0.25, 'dtd': 0.75}, {'dtd': 0.5, 'noise': 0.5})
    """
    shares = dict(trained) if text is None else _parsed(text)
    known = {name: shares[name] for name in BLENDED if shares.get(name, 0) > 0}
    total = sum(known.values())
    if not known:
        where = "dataset.train.anomaly_types" if text is None else f"--types {text}"
        raise UsageError(f"{where}: no type of anomaly has a share above 0")
    return {name: share / total for name, share in known.items()}


def _parsed(text: str) -> dict[str, float]:
    """The shares in the text of --types, as they are there."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.partition("="))
        if name == NORMAL:
            raise UsageError(f"--types {text}: every pair has an anomaly, so {NORMAL} is no type of it")
        if name == EDIT:
            raise UsageError(f"--types {text}: pairs of the type {EDIT} are made by --source edit, without --types")
        if name not in TYPES:
            raise UsageError(f"--types {text}: {name!r} is no type; known are {', '.join(BLENDED)}")
        if name in shares:
            raise UsageError(f"--types {text}: {name} is there twice")
        try:
            shares[name] = float(number) if "=" in part else 1.0
        except ValueError:
            raise UsageError(f"--types {text}: {number!r} is not a number; expected e.g. {name}=0.5") from None
        if not 0 <= shares[name] < math.inf:
            raise UsageError(f"--types {text}: the share of {name} has to be 0 or more")
    if len({"=" in part for part in text.split(",")}) > 1:
        raise UsageError(f"--types {text}: give every type a share, or none")
    return shares
