"""The look of every page and picture: colours, type and spacing as CSS, text made safe, line charts as inline SVG.

Invariant: what is drawn are points that were given, each with its figures as a tooltip; nothing is smoothed. Colours
stand in LIGHT and DARK alone, and everything else names them (`var(--ink)`), so that one place decides both.

Left out: bars, areas, logarithmic axes, and scripts. A page that wants a read-out takes it from the tooltips.
"""
import html
import math
import re
from typing import NamedTuple

# Text of "ink", "faint" or a line's colour has a contrast of 4.5 or more on "paper" and on "panel" (WCAG 2.2, 1.4.3).
LIGHT = {"paper": "#ffffff", "panel": "#f3f5f7", "ink": "#1a1f24", "faint": "#56606a", "rule": "#cfd6dd",
         "focus": "#0b57d0", "line0": "#0b57a4", "line1": "#a84300", "line2": "#146c2e", "line3": "#7a3aa0",
         "line4": "#a3005c", "low": "#f28e5c", "high": "#5aa7e8"}
DARK = {"paper": "#14181c", "panel": "#1e242a", "ink": "#e8ecf0", "faint": "#a9b4be", "rule": "#3c4650",
        "focus": "#8ab4f8", "line0": "#7db8f2", "line1": "#f2a267", "line2": "#74cf92", "line3": "#cba3ee",
        "line4": "#ff9ac2", "low": "#a0471a", "high": "#1c659f"}
LINES = 5  # colours of lines; more lines begin again with the first
SHADES = 4  # of a token's colour, on either side of none
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

CHART = f"""
svg.chart {{ background: var(--paper); color: var(--ink); font: 13px {FONT}; max-width: 100%; height: auto; }}
svg.chart text {{ fill: var(--faint); }}
svg.chart .title {{ fill: var(--ink); font-weight: 600; font-size: 14px; }}
svg.chart .grid {{ stroke: var(--rule); fill: none; }}
svg.chart .guide {{ stroke: var(--faint); stroke-dasharray: 2 4; fill: none; }}
svg.chart .line {{ fill: none; stroke-width: 2; stroke-linejoin: round; }}
svg.chart .bar {{ fill: none; stroke-width: 1.2; }}
""" + "".join(f"svg.chart .of{k} {{ stroke: var(--line{k}); }} svg.chart .at{k}, svg.chart text.in{k} "
              f"{{ fill: var(--line{k}); }}\n" for k in range(LINES))

PAGE = f"""
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 {FONT}; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }}
h2 {{ font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--rule); }}
h3 {{ font-size: 1.05rem; margin: 1.5rem 0 .25rem; }}
p {{ margin: .5rem 0; max-width: 48rem; }}
a {{ color: var(--line0); }}
.faint {{ color: var(--faint); }}
.panel {{ background: var(--panel); border: 1px solid var(--rule); border-radius: .4rem; padding: .75rem; }}
button, select, input {{ font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--faint);
  border-radius: .3rem; padding: .3rem .6rem; max-width: 100%; }}
button {{ cursor: pointer; }}
button[aria-pressed=true] {{ background: var(--ink); color: var(--paper); }}
:focus-visible {{ outline: 3px solid var(--focus); outline-offset: 2px; }}
code, pre {{ font-family: ui-monospace, 'DejaVu Sans Mono', monospace; font-size: .9em; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: top; }}
th:first-child, td.text, th.text {{ text-align: left; }}
@media print {{ .screen {{ display: none !important; }} h2, h3, figure, tr {{ break-inside: avoid; }}
  h2, h3 {{ break-after: avoid; }} }}
"""

HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\ud800-\udfff\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
                    "\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]")
# controls, halves of characters, turns of direction, letters without a shape


def text(value):
    """A text from anywhere as HTML or XML that shows it and does nothing else: markup is escaped, and what would be
    invisible, forbidden or turn the direction of its neighbours is written as Python writes it."""
    return html.escape(HIDDEN.sub(lambda c: c[0].encode("unicode_escape").decode(), str(value)))


def shortened(value, most):
    """At most so many characters, the last of them an ellipsis where some are left out."""
    return value if len(value) <= most else value[:most - 1] + "…"


def mixed(a, b, share):
    """"#rrggbb" between two colours: `share` of b, the rest of a."""
    return "#" + "".join(f"{round((1 - share) * int(a[i:i + 2], 16) + share * int(b[i:i + 2], 16)):02x}"
                         for i in (1, 3, 5))


def colours(palette):
    """{name: "#rrggbb"}: those of a palette, and the shades low1.. and high1.. between its paper, "low" and "high"."""
    return palette | {f"{end}{k}": mixed(palette["paper"], palette[end], k / SHADES)
                      for end in ("low", "high") for k in range(1, SHADES + 1)}


def look(*rules):
    """CSS: the colours of LIGHT, or on a dark screen of DARK, then the rules: PAGE, CHART or a page's own."""
    light, dark = ("; ".join(f"--{name}: {value}" for name, value in colours(p).items()) for p in (LIGHT, DARK))
    return (f":root {{ color-scheme: light dark; {light}; }}\n"
            f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}; }} }}\n" + "".join(rules))


class Point(NamedTuple):
    """Of a line. low, high: an interval of y, left, right: of x, drawn as bars; name: put before the figures."""
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    left: float | None = None
    right: float | None = None
    name: str = ""


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e100  # NaN is not


def figure(x):
    """A number as a person reads it: whole ones whole, others to four digits."""
    return f"{x + 0.0:.0f}" if x == round(x) and abs(x) < 1e15 else f"{x:.4g}"  # + 0.0: no "-0"


def ticks(low, high, about=5):
    """Round numbers from low to high, 1, 2 or 5 times a power of ten apart, `about` many at most, as texts too."""
    step = 10.0 ** math.floor(math.log10((high - low) / about))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= about)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    form = f".{digits}f" if digits <= 5 and max(abs(low), abs(high)) < 1e6 else ".3g"
    found = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(k * step, format(k * step, form)) for k in found]


def span(values, least=()):
    """The ends of an axis: of the values and what it shall reach at least, with some room around."""
    found = [*filter(is_number, values), *least]
    low, high = min(found), max(found)
    room = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
    return (low if low in least else low - room), (high if high in least else high + room)


def thinned(points, most=200):
    """At most so many of many points: in each stretch its lowest and its highest, and both ends of the line."""
    if len(points) <= most:
        return points
    inner, stretches, kept = points[1:-1], (most - 2) // 2, []
    for k in range(stretches):
        part = inner[len(inner) * k // stretches:len(inner) * (k + 1) // stretches]
        kept += sorted({min(part, key=lambda p: p.y), max(part, key=lambda p: p.y)}, key=part.index)
    return [points[0], *kept, points[-1]]


MARKS = ("m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z", "m-3-3h6v6h-6z", "m0-4 4 7h-8z", "m0-4 4 4-4 4-4-4z",
         "m-4-1h3v-3h2v3h3v2h-3v3h-2v-3h-3z")
DASHES = ("", ' stroke-dasharray="7 3"', ' stroke-dasharray="2 3"', ' stroke-dasharray="8 3 2 3"',
          ' stroke-dasharray="14 4"')


def lines(series, x_label, y_label, title, guides=None, x_range=(), y_range=(), joined=True, width=460, height=290,
          standalone=False):
    """A line chart, or with joined=False one of points, as SVG text; "" where there is no point to draw.

    series: {name: [Point or its first fields, (x, y) or (x, y, low, high)]}; a y that is no finite number leaves a gap.
    guides: {name: [(x, y), ...]}, thin lines to compare with. x_label, y_label: quantity and unit, as "KL, nats a
    response". x_range, y_range: numbers that the axes reach at least. standalone: a file of its own, light and dark.
    """
    series = {name: [Point(*p) for p in points] for name, points in series.items()}
    series = {name: [p for p in points if is_number(p.x)] for name, points in series.items()}
    seen = [p for points in series.values() for p in points if is_number(p.y)]
    guides = {name: [Point(*p) for p in points] for name, points in (guides or {}).items()}
    if not seen:
        return ""
    drawn = [*seen, *(p for points in guides.values() for p in points)]
    x0, x1 = span([v for p in drawn for v in (p.x, p.left, p.right)], x_range)
    y0, y1 = span([v for p in drawn for v in (p.y, p.low, p.high)], y_range)
    legend, top = legend_of(series, guides, width) if len(series) + len(guides) > 1 else ("", 46)
    y_ticks = ticks(y0, y1)
    left, right, bottom = 16 + 7.6 * max(len(label) for _, label in y_ticks), width - 14, height - 42

    def at(x, y):
        return (f"{left + (x - x0) / (x1 - x0) * (right - left):.1f}",
                f"{bottom - (y - y0) / (y1 - y0) * (bottom - top):.1f}")

    out = [f'<text class="title" x="6" y="17">{text(shortened(title, width // 8))}</text>'
           f'<text x="6" y="36">{text(shortened(y_label, width // 7))}</text>', legend]
    for y, label in y_ticks:
        out.append(f'<path class="grid" d="M{left:.1f} {at(x0, y)[1]}H{right}"/><text x="{left - 6:.1f}" '
                   f'y="{at(x0, y)[1]}" dy=".35em" text-anchor="end">{label}</text>')
    for x, label in ticks(x0, x1):
        out.append(f'<path class="grid" d="M{at(x, y0)[0]} {bottom}v5"/><text x="{at(x, y0)[0]}" y="{bottom + 18}" '
                   f'text-anchor="middle">{label}</text>')
    out.append(f'<path class="grid" d="M{left:.1f} {top}V{bottom}H{right}"/><text x="{(left + right) / 2:.1f}" '
               f'y="{height - 6}" text-anchor="middle">{text(shortened(x_label, width // 7))}</text>')
    for points in guides.values():
        out.append(f'<path class="guide" d="M{"L".join(" ".join(at(p.x, p.y)) for p in points)}"/>')
    for k, (name, points) in enumerate(series.items()):
        out += line_of(name if len(series) > 1 else "", points, k, at, x_label, y_label, joined)
    inside = f"<style>{look(CHART)}</style>" if standalone else ""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" aria-label="{text(title)}: {text(y_label)} by {text(x_label)}">'
            f'{inside}{"".join(out)}</svg>')


def beside(*charts):
    """Charts of `lines`, not standalone, side by side as one file, light and dark; "" where there is none."""
    out, x, height = [], 0, 0
    for chart in filter(None, charts):
        size = re.search(r'width="(\d+)" height="(\d+)"', chart)
        out.append(f'<g transform="translate({x} 0)">{chart}</g>')
        x, height = x + int(size[1]) + 20, max(height, int(size[2]))
    width = x - 20
    if not out:
        return ""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}"><style>{look(CHART)}</style><path fill="var(--paper)" d="M0 0h{width}v{height}H0z"/>'
            f'{"".join(out)}</svg>\n')


def legend_of(series, guides, width):
    """Names beside their marks, in rows under the title -> SVG, and where the chart may begin."""
    out, x, y = [], 6, 56
    for k, name in enumerate([*series, *guides]):
        label, line = shortened(name, width // 9), k % LINES
        if x > 6 and x + 34 + 7.2 * len(label) > width:
            x, y = 6, y + 18
        if k < len(series):
            out.append(f'<path class="line of{line}"{DASHES[line]} d="M{x} {y - 4}h22"/>'
                       f'<path class="at{line}" d="M{x + 11} {y - 4}{MARKS[line]}"/>')
        else:
            out.append(f'<path class="guide" d="M{x} {y - 4}h22"/>')
        out.append(f'<text class="{f"in{line}" if k < len(series) else ""}" x="{x + 28}" y="{y}">{text(label)}</text>')
        x += 46 + 7.2 * len(label)
    return "".join(out), y + 12


def line_of(name, points, k, at, x_label, y_label, joined):
    """One line: stretches between gaps, bars of intervals, a mark a point with its figures as a tooltip."""
    k, stretches = k % LINES, [[]]
    for p in points:
        if is_number(p.y):
            stretches[-1].append(p)
        elif stretches[-1]:
            stretches.append([])
    shown = [thinned(stretch) for stretch in stretches if stretch]
    for stretch in shown * joined:
        if len(stretch) > 1:
            yield f'<path class="line of{k}"{DASHES[k]} d="M{"L".join(" ".join(at(p.x, p.y)) for p in stretch)}"/>'
    mark = MARKS[k] if sum(map(len, shown)) <= 80 else "m-1 0h2v2h-2z"
    for p in (p for stretch in shown for p in stretch):
        (x, y), words = at(p.x, p.y), f"{figure(p.y)}"
        if is_number(p.low) and is_number(p.high):
            words += f" ({figure(p.low)} to {figure(p.high)})"
            yield f'<path class="bar of{k}" d="M{x} {at(p.x, p.low)[1]}V{at(p.x, p.high)[1]}"/>'
        if is_number(p.left) and is_number(p.right):
            yield f'<path class="bar of{k}" d="M{at(p.left, p.y)[0]} {y}H{at(p.right, p.y)[0]}"/>'
        before = "".join(f"{part}, " for part in (name, p.name) if part)
        yield (f'<path class="at{k}" d="M{x} {y}{mark}"><title>{text(before)}{text(x_label)} {figure(p.x)}: '
               f'{text(y_label)} {words}</title></path>')
