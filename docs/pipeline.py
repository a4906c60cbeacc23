"""Draws docs/pipeline.svg, the figure of the README: python docs/pipeline.py.

It has no background and follows the reader's colour scheme, so that it is readable in dark mode too.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1000, 346
STYLE = """
  text { font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; text-anchor: middle; }
  .name { font-weight: 600; }
  .small { font-size: 12px; fill: #59636e; }
  .lane { font-size: 12px; font-weight: 600; letter-spacing: 1px; text-anchor: start; fill: #59636e; }
  rect { fill: #f6f8fa; stroke: #8c959f; stroke-width: 1.2; }
  .ours { fill: #ddf4ff; stroke: #0969da; }
  .out { fill: #ffebe9; stroke: #cf222e; }
  path { fill: none; stroke: #59636e; stroke-width: 1.6; }
  marker path { fill: #59636e; stroke: none; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .small, .lane { fill: #9198a1; }
    rect { fill: #21262d; stroke: #6e7681; }
    .ours { fill: #0c2d6b; stroke: #58a6ff; }
    .out { fill: #67060c; stroke: #ff7b72; }
    path { stroke: #9198a1; }
    marker path { fill: #9198a1; }
  }
"""


@dataclass(frozen=True)
class Box:
    """A step of the method: its middle, its size, its name, and lines that explain it."""

    x: int
    y: int
    name: str
    lines: tuple[str, ...] = ()
    kind: str = ""
    width: int = 128
    height: int = 78

    def svg(self) -> str:
        left, top = self.x - self.width // 2, self.y - self.height // 2
        frame = f'<rect x="{left}" y="{top}" width="{self.width}" height="{self.height}" rx="8" class="{self.kind}"/>'
        first = self.y + 5 - 9 * len(self.lines)
        words = [f'<text class="name" x="{self.x}" y="{first}">{escape(self.name)}</text>']
        for row, line in enumerate(self.lines, 1):
            words.append(f'<text class="small" x="{self.x}" y="{first + 18 * row}">{escape(line)}</text>')
        return "\n".join([frame, *words])

    @property
    def right(self) -> tuple[int, int]:
        return self.x + self.width // 2, self.y

    @property
    def left(self) -> tuple[int, int]:
        return self.x - self.width // 2, self.y


def arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """From one point to another, along the axes if they are not level."""
    (x, y), (to_x, to_y) = start, end
    middle = (x + to_x) // 2
    course = f"M{x},{y} H{to_x - 7}" if y == to_y else f"M{x},{y} H{middle} V{to_y} H{to_x - 7}"
    return f'<path d="{course}" marker-end="url(#head)"/>'


def picture() -> str:
    """The figure's text."""
    good = Box(80, 90, "Good images", ("all that is needed",))
    sdas = Box(280, 90, "SDAS", ("a diffusion model;", "variance × (1 + s)"), "ours", 150)
    drawn = Box(490, 90, "Anomalous images", ("stronger with s",), width=168)
    blend = Box(710, 90, "Blend", ("under a random mask", "into good images"), "ours", 160)
    sample = Box(910, 90, "Image + mask", ("to train on",))
    upper = [good, sdas, drawn, blend, sample]
    names = (
        ("Image", ("to inspect",), "", 90),
        ("Backbone", ("ImageNet features,", "frozen"), "", 132),
        ("AFS", ("channels that react", "to anomalies"), "ours", 140),
        ("Reconstruction", ("of normal features",), "ours", 140),
        ("RRS", ("residuals that react,", "decoded"), "ours", 144),
        ("Anomaly map", ("score and verdict",), "out", 132),
    )
    lower, x = [], 16
    for name, lines, kind, width in names:
        lower.append(Box(x + width // 2, 292, name, lines, kind, width))
        x += width + 38
    lanes = [arrow(a.right, b.left) for row in (upper, lower) for a, b in pairwise(row)]
    # Good images go round the diffusion model, too.
    lanes.append(f'<path d="M{good.x},{good.y + 39} V160 H{blend.x} V{blend.y + 46}" marker-end="url(#head)"/>')
    # What is made above trains what is below.
    lanes.append(f'<path d="M{sample.x},{sample.y + 39} V205 H{lower[3].x} V246" marker-end="url(#head)"/>')
    lanes.append(
        f'<text class="small" x="{(sample.x + lower[3].x) // 2}" y="198">chooses channels, trains the rest</text>'
    )
    head = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="5" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L10,5 L0,10 z"/></marker></defs>'
    )
    titles = [
        '<text class="lane" x="16" y="34">MAKE ANOMALIES</text>',
        '<text class="lane" x="16" y="236">FIND ANOMALIES</text>',
    ]
    label = "RealNet: anomalies are made of good images, and train a detector that reconstructs normal features"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">',
            f"<style>{STYLE}</style>",
            head,
            *titles,
            *lanes,
            *(box.svg() for box in [*upper, *lower]),
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("pipeline.svg").write_text(picture(), encoding="utf-8")
