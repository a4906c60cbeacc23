"""The YAML settings: load files, check them against utils/settings.py, and fill in the defaults."""

import difflib
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from easydict import EasyDict

from utils.errors import RunError, UsageError
from utils.names import text_problem
from utils.setting_types import KINDS, MISSING, Entries, Section, Setting
from utils.settings import SETTINGS

# ---- loading ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-4 as a number (YAML 1.1 alone requires 1.0e-4), and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            # Merge keys (<<) may come several times, and other keys than texts fail the check of settings.
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    text = f"the key {key_node.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, text, key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+"),
    list("-+0123456789."),
)


def read_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is not YAML, or gives a key twice.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(str(getattr(error, "problem", None) or error).split("\n", 1)[0]) from error


def load_config(path: str | Path, overrides: Sequence[str] = (), script: str | None = None) -> EasyDict:
    """Read a settings file, apply `key.path=value` overrides, check it and fill in the defaults.

    The sections in the file show which script it is for. List entries are addressed by number or by `name`:
    `net.backbone.kwargs.weights=random`.

    Args:
        script: which file it has to be: diffusion, classifier, sample or realnet; None for any.

    Raises:
        UsageError: the file is missing or not YAML, or a key is unknown, missing or has a wrong value. One message
            lists all problems.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        mark = getattr(error.__cause__, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{where}: not readable as YAML ({error})") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: has to hold settings, one `key: value` per line")
    for override in overrides:
        _apply(raw, override)
    return checked(raw, path, script)


MOST_LEVELS, MOST_VALUES = 40, 200_000  # far above those of any settings file or checkpoint


def refuse_excess(value: Any, path: str | Path) -> None:
    """Refuse values nested so deeply, or repeating each other so often, that going through them would take forever.

    Raises:
        UsageError: the message names the file.
    """
    count, stack = 0, [(value, 1)]
    while stack:
        value, level = stack.pop()
        entries = value.values() if isinstance(value, dict) else value
        children = list(entries) if isinstance(value, (dict, list, tuple)) else []
        count += len(children)
        if level > MOST_LEVELS or count > MOST_VALUES:
            raise UsageError(f"{path}: more than {MOST_LEVELS} levels of nested values, or {MOST_VALUES} values")
        stack += [(child, level + 1) for child in children]


def checked(raw: Any, path: str | Path, script: str | None = None) -> EasyDict:
    """Check the settings of a YAML file or a checkpoint, and fill in the defaults.

    Args:
        path: of the file, for error messages.
        script: which file they have to be of, see load_config.

    Raises:
        UsageError: see load_config.
    """
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: its settings are {shortened(raw)}, not a mapping")
    refuse_excess(raw, path)
    if script is not None and _script_of(raw, path) != script:
        other = _script_of(raw, path)
        raise UsageError(f"{path}: holds the settings of a {other}.yaml; those of a {script}.yaml are needed here")
    problems: list[str] = []
    config = _check(raw, SETTINGS[_script_of(raw, path)], "", problems)
    if problems:
        raise UsageError("\n".join(f"{path}: {problem}" for problem in problems))
    return EasyDict(config)


def _script_of(raw: dict, path: str | Path) -> str:
    """The script that these settings are for, known by their sections."""
    if "net" in raw:
        return "realnet"
    if "workspace" in raw or "sample_number" in raw:
        return "sample"
    if "unet" in raw:
        return "diffusion"
    if "classifier" in raw:
        return "classifier"
    raise UsageError(f"{path}: has none of the sections net, unet, classifier; which script is it for?")


def _apply(raw: dict, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"--set {override}: write it as key.path=value")
    try:
        value = read_yaml(text)
    except ValueError as error:
        raise UsageError(f"--set {override}: the value is not readable as YAML ({error})") from None
    node: Any = raw
    *parents, last = name.strip().split(".")
    for part in parents:
        node = _child(node, part, override)
    if isinstance(node, list):
        node[node.index(_child(node, last, override))] = value
    else:
        node[last] = value


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        for i, entry in enumerate(node):
            if part == str(i) or (isinstance(entry, dict) and entry.get("name") == part):
                return entry
        names = [entry["name"] for entry in node if isinstance(entry, dict) and "name" in entry]
        known = did_you_mean(part, names) or f"; it has {', '.join(map(str, names)) or f'{len(node)} without names'}"
        raise UsageError(f"--set {override}: the list has no entry {part!r}{known}")
    if node.get(part) is None:
        node[part] = {}
    if not isinstance(node[part], (dict, list)):
        raise UsageError(f"--set {override}: {part} is a value, not a section")
    return node[part]


def _check(raw: Any, section: Section, prefix: str, problems: list[str]) -> dict | None:
    if raw is None and section.optional:
        return None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        problems.append(f"{prefix.rstrip('.')}: has to be a section of settings, not {shortened(raw)}")
        return {}
    for name in raw:
        if name not in section.keys:
            key = name if isinstance(name, str) else f"{shortened(name)} (not text)"
            problems.append(f"{prefix}{key[:80]} is not a setting{_suggest(str(name), section, prefix)}")
    checked = {}
    for name, entry in section.keys.items():
        if isinstance(entry, Section):
            checked[name] = _check(raw.get(name), entry, f"{prefix}{name}.", problems)
        elif isinstance(entry, Entries) and name in raw:
            checked[name] = raw[name]
            _check_entries(raw[name], entry, f"{prefix}{name}", problems)
        elif name in raw:
            # YAML 1.1 reads `off` as False.
            checked[name] = raw[name] = "off" if raw[name] is False and "off" in entry.choices else raw[name]
            problem = _problem(raw[name], entry)
            if problem:
                problems.append(f"{prefix}{name}: {shortened(raw[name])} {problem}. {entry.help}")
        elif entry.default is MISSING:
            problems.append(f"{prefix}{name} is missing. {entry.help}")
        else:
            checked[name] = entry.default
    return checked


def _check_entries(raw: Any, entries: Entries, key: str, problems: list[str]) -> None:
    """Check a list of sections; an entry is called by its number, or by its name if it has one of its own."""
    if not isinstance(raw, list):
        problems.append(f"{key}: {shortened(raw)} is not a list. {entries.help}")
        return
    if not raw and not entries.may_be_empty:
        problems.append(f"{key}: is empty. {entries.help}")
    seen: list[Any] = []
    for number, entry in enumerate(raw):
        if not isinstance(entry, dict):
            problems.append(f"{key}.{number}: has to be a section of settings, not {shortened(entry)}")
            continue
        name = entry.get(entries.distinct)
        usable = isinstance(name, str) and len(name) <= 60 and not text_problem(name)
        called = name if usable and name not in seen else number
        if name in seen:
            problems.append(f"{key}.{number}.{entries.distinct}: {shortened(name)} is given twice")
        seen.append(name)
        kwargs = entries.kwargs.get(entry.get("type") if isinstance(entry.get("type"), str) else "", None)
        known = {**entries.keys, "kwargs": kwargs} if kwargs else entries.keys
        # The kwargs of an unknown type cannot be checked; the type is refused later.
        given = entry if kwargs or not entries.kwargs else {k: v for k, v in entry.items() if k != "kwargs"}
        _check(given, Section(known), f"{key}.{called}.", problems)


MOST = 2**63 - 1  # what an int64 holds
NUMERIC = ("int", "float", "ints", "floats", "shares")


def _problem(value: Any, setting: Setting) -> str | None:
    """What is wrong with a value, or None."""
    kind = setting.kind.rstrip("?")
    if not _fits(value, setting.kind):
        return f"is not {KINDS[kind]}"
    if value is None:
        return None
    if kind == "str" and text_problem(value):
        return text_problem(value)
    if setting.length is not None and len(value) != setting.length:
        return f"has to hold {setting.length} numbers"
    if kind in ("ints", "floats", "strs") and not value and not setting.may_be_empty:
        return "is empty"
    names = [] if not setting.choices else value if kind in ("shares", "strs") else [value]
    for name in names:
        if name not in setting.choices:
            return (
                f"is not one of {', '.join(setting.choices)}"
                if kind == "str"
                else f"names {shortened(name)}; known are {', '.join(setting.choices)}"
            )
    numbers = value.values() if kind == "shares" else value if kind in ("ints", "floats") else [value]
    problems = (_out_of_bounds(number, setting) for number in numbers if kind in NUMERIC)
    return next(filter(None, problems), None) or (setting.check(value) if setting.check else None)


def _out_of_bounds(number: float, setting: Setting) -> str | None:
    if isinstance(number, int) and abs(number) > MOST:
        return "is too large"
    if not math.isfinite(number):
        return "is not finite"
    if setting.low is not None and number < setting.low:
        return f"has to be at least {setting.low:g}"
    if setting.high is not None and number > setting.high:
        return f"has to be at most {setting.high:g}"
    if setting.above is not None and number <= setting.above:
        return f"has to be above {setting.above:g}"
    if setting.below is not None and number >= setting.below:
        return f"has to be below {setting.below:g}"
    return None


def shortened(value: Any) -> str:
    """A value in words of up to 60 characters, for messages."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _suggest(name: str, section: Section, prefix: str) -> str:
    known = [key for key, entry in section.keys.items() if not getattr(entry, "legacy", False)]
    more = ", ... (docs/settings.md)" if len(known) > 8 else ""
    return did_you_mean(name, section.keys, prefix) or f"; known are {', '.join(known[:8])}{more}"


def did_you_mean(name: object, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: the nearest known one, with a prefix; "" if none is near.

    Example:
        >>> did_you_mean("thresold", ["channel", "threshold"])
        '; did you mean threshold?'
    """
    known, text = list(known), str(name)[:80]
    # In another case, or with dashes, it is still the same name.
    same = [other for other in known if other == text.lower().replace("-", "_")]
    close = same or difflib.get_close_matches(text, known, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _fits(value: Any, kind: str) -> bool:
    if kind.endswith("?"):
        return value is None or _fits(value, kind[:-1])
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return {
        "int": whole,
        "float": number,
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "ints": isinstance(value, list) and all(_fits(v, "int") for v in value),
        "floats": isinstance(value, list) and all(_fits(v, "float") for v in value),
        "strs": isinstance(value, list) and all(isinstance(v, str) for v in value),
        "list": isinstance(value, list),
        "map": isinstance(value, dict),
        "shares": isinstance(value, dict) and all(_fits(v, "float") for v in value.values()),
        "any": True,
    }[kind]


def collect_errors(path: str | Path, checks: Iterable[tuple[str, Callable[[], Any]]]) -> None:
    """Run checks of settings, and report all failures in one message that names the file.

    Args:
        path: of the settings file.
        checks: pairs of the settings checked and a function that raises if they are wrong. They run one by one, so a
            generator may depend on earlier checks. Messages that start with a command-line option (--...) are passed
            on without the file's name.

    Raises:
        UsageError: one line per failure.
    """
    problems = []
    for section, check in checks:
        try:
            check()
        except UsageError as error:
            prefixes = (str(path), "--")
            for text in str(error).splitlines():
                if not text.startswith(prefixes):
                    # A function may know its argument, but not the settings that it came from.
                    named = any(part.strip() in text for part in section.split(","))
                    text = f"{path}: {text}" if named else f"{path}: {section}: {text}"
                problems.append(text)
        except RunError:
            # Not a mistake in the settings but, for example, missing weights: reported when the run needs them.
            continue
        except OSError as error:
            problems.append(f"{path}: {section}: {shortened(error.filename)}: {error.strerror}")
        # Torch and Python raise these on values that they cannot use; REALNET_DEBUG=1 shows the traceback.
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if os.environ.get("REALNET_DEBUG"):
                raise
            reason = f"{type(error).__name__}: {error}".split("\n", 1)[0]
            problems.append(f"{path}: {section}: {reason} (REALNET_DEBUG=1 shows where)")
    if problems:
        raise UsageError("\n".join(dict.fromkeys(problems)))


def plain(config: Any) -> Any:
    """The settings as plain dicts and lists, for checkpoints."""
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(value) for value in config]
    return config


def pretrained_path(section: dict) -> str | None:
    """The path of the starting weights in a `unet` or `classifier` section, under either spelling of the key."""
    return section.get("pretrain_path") or section.get("pertrain_path")


def model_kwargs(section: dict) -> dict:
    """A `unet` or `classifier` section as keyword arguments of its factory, without the path of the weights."""
    return {key: value for key, value in section.items() if key not in ("pertrain_path", "pretrain_path")}


def call_with_settings(where: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call function(*args, **kwargs) with keyword arguments from settings.

    Raises:
        UsageError: the function does not take these arguments; the message names the settings, `where`.
    """
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"{where}: {error}") from None
    return function(*args, **kwargs)


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, str, str]]:
    """The settings that differ, as (key, old, new) in words; entries of a list are named by their `name` or number."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        parts = [differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip(".")) for key in keys]
        return [difference for part in parts for difference in part]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and old and isinstance(old[0], dict):
        names = [str(entry.get("name", i)) if isinstance(entry, dict) else str(i) for i, entry in enumerate(old)]
        parts = [differences(a, b, f"{prefix}.{name}") for name, a, b in zip(names, old, new, strict=True)]
        return [difference for part in parts for difference in part]
    return [] if old == new else [(prefix, shortened(old), shortened(new))]


def changed_settings(old: Any, new: Any) -> list[str]:
    """The settings that differ, as "key: old -> new"."""
    return [f"{key}: {before} -> {now}" for key, before, now in differences(old, new)]
