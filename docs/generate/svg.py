"""A small drawing in SVG: boxes, arrows and lines of text, at the places that the caller gives. Units are pixels."""

from collections.abc import Sequence
from html import escape

LINE = 17  # from one line of text to the next
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2937; }
  .small { font-size: 11px; fill: #4b5563; }
  .bold { font-weight: 600; }
  .box { fill: #ffffff; stroke: #6b7280; }
  .good { fill: #dcfce7; stroke: #15803d; }
  .bad { fill: #fee2e2; stroke: #b91c1c; }
  .accent { fill: #dbeafe; stroke: #1d4ed8; }
  .still { fill: #f3f4f6; stroke: #9ca3af; }
  .arrow { fill: none; stroke: #374151; stroke-width: 1.4; marker-end: url(#head); }
  .dashed { stroke-dasharray: 5 4; }
"""


class Drawing:
    """Shapes in the order in which they were added."""

    def __init__(self, title: str, *, width: int, height: int, style: str = "") -> None:
        self.title, self.width, self.height, self.style = title, width, height, STYLE + style
        self.parts: list[str] = []

    def box(self, x: float, y: float, *lines: str, width: float = 150, height: float = 46, kind: str = "box") -> None:
        """A box with its upper left corner at (x, y) and its lines of text in the middle."""
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>')
        top = y + height / 2 - LINE * (len(lines) - 1) / 2 + 4
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + LINE * number, line, anchor="middle", kind="" if number == 0 else "small")

    def text(self, x: float, y: float, line: str, *, anchor: str = "start", kind: str = "small") -> None:
        """One line of text on the baseline y."""
        kind = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{kind}>{escape(line)}</text>')

    def arrow(self, *points: tuple[float, float], kind: str = "") -> None:
        """A line through the points with a head at the last one."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path class="arrow {kind}" d="{path}"/>'.replace(' "', '"', 1))

    def bars(self, values: Sequence[float], *, x: float, y: float, step: float, height: float, kind: str) -> None:
        """Bars that stand on the line y, `height` tall at 1."""
        path = "".join(
            f"M{x + step * (number + 0.5):.1f} {y:g}v-{height * value:.1f}" for number, value in enumerate(values)
        )
        self.parts.append(f'<path class="{kind}" d="{path}"/>')

    def render(self) -> str:
        """The file."""
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0L8 4L0 8z" fill="#374151"/></marker>'
        )
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(self.title)}">',
            f"<title>{escape(self.title)}</title>",
            f"<style>{self.style}</style>",
            f"<defs>{head}</defs>",
            f'<rect width="{self.width}" height="{self.height}" rx="8" fill="#fafafa"/>',
            *self.parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"
