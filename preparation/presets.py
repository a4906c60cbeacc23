"""The presets: whole settings files that realnet.yaml of a data set of one's own begins with."""

from pathlib import Path

PRESETS = Path(__file__).resolve().parent.parent / "experiments" / "presets"


def preset_names() -> list[str]:
    """The presets that there are."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))
