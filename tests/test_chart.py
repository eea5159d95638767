"""The look of pages and pictures: what is drawn are the points given, text does nothing, colours can be read."""
import math
import re
import xml.etree.ElementTree as ET

import pytest

from minirlhf import chart
from minirlhf.chart import (DARK, LIGHT, Point, colours, figure, lines, look, mixed, shortened, span, text, thinned,
                            ticks)

SVG = "{http://www.w3.org/2000/svg}"


def contrast(a, b):
    """WCAG 2.2's contrast ratio of two "#rrggbb": (L1 + 0.05) / (L2 + 0.05), 1 to 21."""
    def luminance(colour):
        channels = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def drawn(svg):
    """An SVG's elements by class: {class: [element]}, and its tooltips."""
    root = ET.fromstring(svg)
    found = {}
    for element in root.iter():
        found.setdefault(element.get("class"), []).append(element)
    return found, [t.text for t in root.iter(f"{SVG}title")]


def numbers(path):
    return [*map(float, re.findall(r"-?\d+\.?\d*", path))]


def test_contrast_is_that_of_the_standard():
    """Black on white is 21, a colour on itself 1; #777777 on white is the known 4.48 that just fails."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#123456", "#123456") == 1
    assert round(contrast("#777777", "#ffffff"), 2) == 4.48


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_every_text_can_be_read_on_every_ground(palette):
    """Ink, faint text, lines' names and the focus ring have a contrast of 4.5 on paper and panel, ink on every shade
    of a token too; a pressed button is paper on ink."""
    found = colours(palette)
    for ground in ("paper", "panel"):
        for name in ("ink", "faint", "focus", *(f"line{k}" for k in range(chart.LINES))):
            assert contrast(found[name], found[ground]) >= 4.5, (name, ground)
    shades = [name for name in found if re.fullmatch(r"(low|high)\d*", name)]
    assert len(shades) == 2 + 2 * chart.SHADES
    for name in shades:
        assert contrast(found["ink"], found[name]) >= 4.5, name
    assert found["low4"] == found["low"] and found["high4"] == found["high"]


def test_a_mixed_colour_lies_between_two():
    """A quarter of the way from black to #ff8000 is #402000: 255 / 4 = 63.75 -> 64 = 0x40, 128 / 4 = 32 = 0x20."""
    assert mixed("#000000", "#ff8000", 0.25) == "#402000"
    assert (mixed("#102030", "#ffffff", 0), mixed("#102030", "#ffffff", 1)) == ("#102030", "#ffffff")


def test_the_style_holds_both_palettes_and_no_colour_of_its_own():
    """Every colour of LIGHT, then of DARK for a dark screen only, as print is on paper; rules name them only, and each
    name that a rule takes is there."""
    style = look(chart.PAGE, chart.CHART)
    first, second, rules = style.split("\n", 2)
    for name, value in colours(LIGHT).items():
        assert f"--{name}: {value};" in first
    for name, value in colours(DARK).items():
        assert f"--{name}: {value};" in second
    assert second.startswith("@media screen and (prefers-color-scheme: dark)")
    assert not re.search(r"#[0-9a-f]{3}|rgb", rules)
    assert {*re.findall(r"var\(--(\w+)\)", rules)} <= {*colours(LIGHT)} == {*colours(DARK)}


@pytest.mark.parametrize("given, expected", [
    ("<script>alert('x')</script> & \"y\"",
     "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;y&quot;"),
    ("a\x00b\x1bc\x7f", r"a\x00b\x1bc\x7f"), ("\ud800", r"\ud800"), ("\udfff", r"\udfff"),
    ("\u202eevil", r"\u202eevil"), ("a\u200bb\xad\U000e0041\u2064", r"a\u200bb\xad\U000e0041\u2064"),
    ("\u2066x\u2069\u200f\ufeff", r"\u2066x\u2069\u200f\ufeff"), ("a\n\tb\r", "a\n\tb\\r"),
    ("שלום é 👩‍👩‍👧 \u00a0\ufffd", "שלום é 👩‍👩‍👧 \u00a0\ufffd"), (3, "3"), ("\uffff\ufffe", r"\uffff\ufffe")])
def test_a_text_shows_and_does_nothing_else(given, expected):
    """Markup is escaped, what is invisible or turns the direction is named; letters of any script stay as they are.
    The result is always well-formed XML, in an attribute too."""
    assert text(given) == expected
    assert ET.fromstring(f'<a b="{text(given)}">{text(given)}</a>').tag == "a"
    text(given).encode()  # no lone surrogate


def test_a_long_text_is_shortened_with_a_sign():
    assert (shortened("abcdef", 6), shortened("abcdef", 5), shortened("", 5)) == ("abcdef", "abcd…", "")


@pytest.mark.parametrize("low, high, expected", [
    (0, 10, ["0", "2", "4", "6", "8", "10"]), (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
    (-0.31, 1.2, ["0.0", "0.5", "1.0"]), (0, 36, ["0", "10", "20", "30"]), (3.2, 3.9, ["3.2", "3.4", "3.6", "3.8"]),
    (0, 0.001, ["0.0000", "0.0002", "0.0004", "0.0006", "0.0008", "0.0010"]),
    (0, 1e7, ["0", "2e+06", "4e+06", "6e+06", "8e+06", "1e+07"])])
def test_ticks_are_round_numbers(low, high, expected):
    """1, 2 or 5 times a power of ten apart, within the axis, with the digits that tell them apart."""
    assert [label for _, label in ticks(low, high)] == expected
    assert all(low <= value <= high for value, _ in ticks(low, high))


def test_an_axis_has_room_around_its_values_and_reaches_what_it_must():
    """4 % of the span on either side; one value alone, or zeros, do not make an axis of no length; what it must reach
    is its end exactly where no value lies beyond."""
    assert span([0, 100]) == (-4, 104)
    assert span([50.0]) == (48, 52)
    assert span([0, 0]) == (-1, 1)
    assert span([0.2, 0.9], (0, 1)) == (0, 1)
    assert span([0.5, 2.0], (0, 1)) == pytest.approx((0, 2.08))
    assert span([None, math.nan, 1, 3]) == (0.92, 3.08)


def test_a_figure_is_whole_or_has_four_digits():
    assert [*map(figure, (12, 12.0, 0.31254, 123456, 1234567.8, -0.5, -0.0))] == [
        "12", "12", "0.3125", "123456", "1.235e+06", "-0.5", "0"]


def test_lines_put_each_point_where_its_figures_are():
    """On an axis from 0 to 10 and one from 0 to 1, (5, 0.25) lies half way to the right and a quarter up."""
    svg = lines({"a": [(0, 0), (5, 0.25), (10, 1)]}, "step", "score, nats", "Title", x_range=(0, 10), y_range=(0, 1))
    found, titles = drawn(svg)
    assert titles == ["step 0: score, nats 0", "step 5: score, nats 0.25", "step 10: score, nats 1"]
    (x0, y0), (x, y), (x1, y1) = [numbers(e.get("d"))[:2] for e in found["at0"]]
    assert ((x - x0) / (x1 - x0), (y - y0) / (y1 - y0)) == pytest.approx((0.5, 0.25), abs=1e-3)
    assert x0 < x1 and y0 > y1  # upwards is less in SVG
    assert numbers(found["line of0"][0].get("d")) == pytest.approx([x0, y0, x, y, x1, y1])
    texts = [t.text for t in ET.fromstring(svg).iter(f"{SVG}text")]
    assert texts[:2] == ["Title", "score, nats"] and texts[-1] == "step"  # both axes say quantity and unit
    assert "10" in texts and "0.6" in texts


def test_everything_lies_within_the_picture():
    """Whatever the numbers, no mark, bar, tick or text begins outside the view box, and none is NaN."""
    for rows in ([(0, -1e9), (1, 1e9)], [(1, 1e-9)], [(5, 3.0)] * 3, [(k, k * 0.1) for k in range(1000)],
                 [(1e12, 1e12, 0, 2e12)], [(1, 5, None, None, -3, 9)]):
        svg = lines({"one": rows, "two": rows}, "x", "y", "t" * 300, guides={"g" * 99: [(0, 0), (1, 1)]})
        assert "nan" not in svg and "inf" not in svg
        found, _ = drawn(svg)
        for kind in ("at0", "at1", "bar of0", "grid", "guide"):
            for element in found.get(kind, []):
                x, y = numbers(element.get("d"))[:2]
                assert 0 <= x <= 460 and 0 <= y <= 290
        for label in ET.fromstring(svg).iter(f"{SVG}text"):
            assert 0 <= float(label.get("x")) <= 460 and 0 <= float(label.get("y")) <= 290
            if label.get("text-anchor") is None:
                assert float(label.get("x")) + 6.5 * len(label.text) <= 480
            elif label.get("text-anchor") == "end":
                assert float(label.get("x")) >= 7 * len(label.text)


def test_a_gap_parts_a_line_and_its_points_are_not_invented():
    """What is not finite, no number, or true is no point: 1, 2, gap, 4, gap, 6, 7 gives two lines and a lone mark."""
    rows = [(1, 1.0), (2, 2.0), (3, None), (4, 4.0), (5, math.nan), (5, math.inf), (5, "x"), (5, True), (6, 3.0),
            (7, 4.0), (None, 1.0), (math.nan, 1.0)]
    found, titles = drawn(lines({"a": rows}, "x", "y", "t"))
    assert len(found["at0"]) == 5 == len(titles) and len(found["line of0"]) == 2
    assert [t.split(":")[0] for t in titles] == ["x 1", "x 2", "x 4", "x 6", "x 7"]
    assert lines({"a": [(1, None)]}, "x", "y", "t") == "" == lines({}, "x", "y", "t")


def test_intervals_are_bars_that_end_at_their_ends():
    """y from 0.2 to 0.6 and x from 1 to 3 around (2, 0.5), on axes 0..4 and 0..1; the tooltip tells y's."""
    svg = lines({"a": [Point(2, 0.5, 0.2, 0.6, 1, 3, "beta 0.1")], "b": [(0, 0), (4, 1)]}, "KL", "rate", "t",
                joined=False)
    found, titles = drawn(svg)
    upright, flat = [numbers(e.get("d")) for e in found["bar of0"]]
    (xa, ya), (xb, yb) = [numbers(e.get("d"))[:2] for e in found["at1"][1:]]
    assert [(v - ya) / (yb - ya) for v in upright[1:]] == pytest.approx([0.2, 0.6], abs=2e-3)
    assert [(v - xa) / (xb - xa) for v in (flat[0], flat[2])] == pytest.approx([0.25, 0.75], abs=2e-3)
    assert titles[0] == "a, beta 0.1, KL 2: rate 0.5 (0.2 to 0.6)"
    assert not [d for d in found if d and d.startswith("line") and len(found[d]) > 1]  # that of the legend alone


def test_a_legend_names_each_line_and_does_not_depend_on_colour():
    """One line has none; several have each a name, another dash and another mark, and rows that do not leave the
    picture."""
    assert len([*ET.fromstring(lines({"a": [(1, 1)]}, "x", "y", "t")).iter(f"{SVG}title")]) == 1
    names = [f"a rather long name {k}" for k in range(4)]
    svg = lines({name: [(0, k), (1, k)] for k, name in enumerate(names)}, "x", "y", "t",
                guides={"even": [(0, 0), (1, 3)]})
    found, _ = drawn(svg)
    texts = {t.text: t for t in ET.fromstring(svg).iter(f"{SVG}text")}
    assert {*names, "even"} <= {*texts}
    assert len({found[f"line of{k}"][-1].get("stroke-dasharray") for k in range(4)}) == 4
    assert len({re.sub(r"^M[\d.]+ [\d.]+", "", found[f"at{k}"][-1].get("d")) for k in range(4)}) == 4
    top = min(numbers(e.get("d"))[1] for e in found["grid"])
    assert all(float(texts[name].get("y")) < top for name in names)


def test_of_many_points_the_highest_and_the_lowest_stay():
    """Of 5,000 points with one spike up and one down at most 200 are drawn, in order, ends and both spikes among them;
    200 stay as they are."""
    rows = [Point(k, k % 7) for k in range(5000)]
    rows[1234], rows[4321] = Point(1234, 50), Point(4321, -50)
    kept = thinned(rows)
    assert len(kept) <= 200 and kept == sorted(kept) and {*kept} <= {*rows}
    assert {rows[0], rows[-1], rows[1234], rows[4321]} <= {*kept}
    assert thinned(rows[:200]) == rows[:200]
    assert len(drawn(lines({"a": rows}, "x", "y", "t"))[1]) == len(kept)


def test_names_and_labels_are_escaped():
    """Markup, NUL and a direction mark in a series', a guide's or a point's name, in labels and title: text."""
    evil = "</svg><script>\x00\u202e\ud800"
    svg = lines({evil: [Point(1, 1, name=evil)], "b": [(2, 2)]}, evil, evil, evil, guides={evil: [(0, 0), (1, 1)]})
    assert "<script" not in svg and r"\x00\u202e\ud800" in svg
    assert ET.fromstring(svg).tag == f"{SVG}svg"
    assert evil.replace("\x00\u202e\ud800", r"\x00\u202e\ud800") in ET.fromstring(svg).get("aria-label")


def test_a_file_of_its_own_brings_its_colours():
    """standalone: a style for light and dark within the SVG; else none, as the page has it. It has a role and a name
    for who does not see it."""
    alone = ET.fromstring(lines({"a": [(1, 1)]}, "x", "y", "t", standalone=True, width=720, height=400))
    assert "prefers-color-scheme: dark" in alone.find(f"{SVG}style").text
    assert (alone.get("role"), alone.get("aria-label"), alone.get("viewBox")) == ("img", "t: y by x", "0 0 720 400")
    assert ET.fromstring(lines({"a": [(1, 1)]}, "x", "y", "t")).find(f"{SVG}style") is None
