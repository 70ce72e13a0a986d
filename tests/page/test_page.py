"""The page room: one file that needs no other, and text that shows as it is."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.console import isolated
from pretrain.errors import InputError
from pretrain.page.figure import DARK_PAPER, draw_png, name_style
from pretrain.page.page import THUMBNAIL, Chart, Group, Page, Picture, check_target
from pretrain.page.text import Table, bytes_text, duration_text, html_text, markdown_text, number_text, shortened
from tests.page.parsed import ParsedPage

NAME = '5$ & <b>6$\x1b]0;title\x07\u202e\n\udce9 "quoted"'
SHOWN = '5$ & <b>6$\\x1b]0;title\\x07\\u202e\\n\\udce9 "quoted"'


def draw(figure):
    figure.subplots().set_title(shortened(NAME, 60), **name_style())


@pytest.fixture(scope="module")
def page():
    page = Page(NAME)
    page.cards({NAME: "1", "bytes": "2 kB"})
    page.notes([NAME])
    page.notes([f"amiss: {NAME}"], warning=True)
    page.grid(
        [
            Chart(f"half of {NAME}", draw),
            [Table(("class", "samples"), [(NAME, "12")], NAME)],
            Chart("the whole width", draw, height=1.0),
            Chart("left over", draw),
        ]
    )
    page.heading(NAME)
    page.table(Table(("weights", "features", "1-shot"), [("a", "cls", "1.5"), ("b", "tanh", "2.5")], names=2))
    noise = np.random.default_rng(0).integers(0, 256, (THUMBNAIL, 20, 3), dtype=np.uint8)
    page.pictures(
        [
            Picture(NAME, "id 1", Image.fromarray(noise)),
            Picture("small", "id 2", Image.fromarray(noise[:8])),
            Picture("none", "id 3", None, f"damaged: {NAME}"),
        ]
    )
    page.groups([Group(NAME, "seen first", [Picture(NAME, "a", None, "gone"), Picture("b", NAME, None, NAME)], 1)])
    page.facts({NAME: NAME})
    page.command(f"python x.py --config {NAME}")
    return page


def test_text_from_outside_shows_as_it_is(page):
    parsed = ParsedPage(page.html())  # every tag is closed in turn
    # titles, card, note, caption and row, heading, picture; those of a group; name and text of a fact
    assert parsed.text.count(SHOWN) == 2 + 1 + 1 + 2 + 1 + 1 + 3 + 2
    assert f"python x.py --config {SHOWN}" in parsed.text
    attributes = [
        value for _, attributes in parsed.tags for name, value in attributes.items() if name in ("alt", "title")
    ]
    assert f"half of {SHOWN}" in attributes
    assert f"damaged: {SHOWN}" in attributes
    assert not set("\x1b\x07\u202e\udce9") & set(page.html())


def test_the_page_needs_no_other_file_and_runs_nothing(page, tmp_path):
    assert not re.search(r"https?:|url\(|@import", page.html())
    assert {tag for tag, _ in ParsedPage(page.html()).tags}.isdisjoint({"script", "link", "iframe", "object"})
    page.write(tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == page.html()
    assert [path.name for path in tmp_path.iterdir()] == ["x.html"]


def test_every_image_says_in_words_what_it_shows(page):
    shown = [(attributes["alt"], image) for attributes, image in ParsedPage(page.html()).images()]
    assert [text for text, _ in shown[:3]] == ["the whole width", f"half of {SHOWN}", "left over"]
    wide, half, left_over = (image for _, image in shown[:3])
    assert wide.width == left_over.width > 2 * half.width
    assert (wide.height, half.height) == (120, 432)
    assert [(text, image.format, image.size) for text, image in shown[3:]] == [
        (f"{SHOWN}, id 1", "JPEG", (20, THUMBNAIL)),
        ("small, id 2", "PNG", (20, 8)),
    ]


def test_charts_are_drawn_for_the_light_and_the_dark_page(page):
    parsed = ParsedPage(page.html())
    dark = list(parsed.images(dark=True))
    charts = [attributes["alt"] for attributes, _ in parsed.images() if attributes.get("class") == "light"]
    assert [attributes["alt"] for attributes, _ in dark] == charts
    assert len(charts) == 3
    corner = dark[0][1].convert("RGB").getpixel((0, 0))
    assert f"#{bytes(corner).hex()}" == DARK_PAPER
    light = next(image for _, image in parsed.images())
    assert light.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert f"--paper: {DARK_PAPER}" in page.html()


def test_headers_of_tables_say_what_they_head(page):
    scopes = [attributes["scope"] for tag, attributes in ParsedPage(page.html()).tags if tag == "th"]
    assert scopes == ["col", "col", "row", *["col"] * 3, *["row"] * 4]


def test_a_table_can_be_scrolled_without_a_mouse_and_has_a_name(page):
    regions = [one for tag, one in ParsedPage(page.html()).tags if one.get("class") == "scroll"]
    assert [one["tabindex"] for one in regions] == ["0", "0"]
    assert [one["aria-label"] for one in regions] == [f"Table: {SHOWN}", "Table: weights, features, 1-shot"]


def test_the_first_pictures_of_a_group_are_set_off(page):
    tags = ParsedPage(page.html()).tags
    [start] = [at for at, (_, one) in enumerate(tags) if one.get("class") == "group"]
    assert [one.get("class") for tag, one in tags[start:] if tag == "figure"] == ["marked", None]


def test_a_table_as_markdown_and_for_a_terminal():
    table = Table(("weights", "features", "1-shot"), [("a|b", "cls", "1.50"), ("b\x1b", "pre_tanh", "12.50")], names=2)
    assert table.markdown() == [
        "| weights | features | 1-shot |",
        "|---|---|---|",
        "| a\\|b | cls | 1.50 |",
        "| b\\\\x1b | pre_tanh | 12.50 |",
    ]
    assert table.text() == [
        "weights  features  1-shot",
        "a|b      cls         1.50",
        "b\\x1b    pre_tanh   12.50",
    ]


def test_text_is_escaped_for_where_it_goes():
    assert markdown_text("_a_ b_c <i> $x$\n") == "\\_a\\_ b_c \\<i\\> \\$x\\$\\\\n"
    assert html_text('<a b="c">\x1b') == "&lt;a b=&#34;c&#34;&gt;\\x1b"
    assert html_text(html_text("&")) == "&amp;"
    assert shortened("a name that is long\x1b", 11) == "a name tha…"
    assert [bytes_text(count) for count in (0, 512, 4608, 99_600, 3.2e12)] == [
        "0 B",
        "512 B",
        "4.61 kB",
        "100 kB",
        "3.2 TB",
    ]


HEBREW, ARABIC = "\u05d7\u05ea\u05d5\u05dc", "\u0642\u0637\u0629"  # each reads from right to left


def test_what_shows_nothing_or_turns_the_text_is_shown_as_an_escape():
    for hidden in "\u200b\u2060\ufeff\xad\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c\udce9":
        shown = f"a{hidden.encode('unicode_escape').decode()}b"
        name = f"a{hidden}b"
        assert html_text(name) == shortened(name, 9) == shown
        assert markdown_text(name) == shown.replace("\\", "\\\\")
        assert Table(["name"], [[name]]).text() == ["name", shown]
    for whole in ("\U0001f469\u200d\U0001f4bb", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", HEBREW, "고양이"):
        assert html_text(whole) == whole  # joiners belong to emoji and to Persian


def test_a_name_from_right_to_left_leaves_its_neighbours_where_they_are():
    """Bare, "HEBREW → ARABIC" would be laid out as ARABIC → HEBREW, and a table's figures in the other order."""
    pair = f"{isolated(HEBREW)} → {isolated(ARABIC)}"
    assert pair == f"\u2068{HEBREW}\u2069 → \u2068{ARABIC}\u2069"
    assert isolated("cat") == "cat"
    assert isolated(isolated(HEBREW)) == isolated(HEBREW)
    for shown in (html_text(pair), markdown_text(pair), shortened(pair, 40), isolated(pair), *Table([pair], []).text()):
        assert shown == pair
    # The parts of a path stay in their order too.
    assert isolated(f"/{HEBREW}/5/{ARABIC}") == f"/\u2068{HEBREW}\u2069/5/\u2068{ARABIC}\u2069"
    # What stands within an isolated name cannot end it.
    assert isolated(f"{HEBREW}\u2069 x") == f"\u2068{HEBREW}\\u2069 x\u2069"
    # One that is cut is ended.
    assert shortened(pair, 11) == f"\u2068{HEBREW}\u2069 → \u2068…\u2069"


def test_columns_of_a_terminal_stand_below_each_other():
    rows = [(HEBREW, "12", "3"), ("고양이", "1", "2"), ("e\u0301", "1", "20")]
    assert Table(("name", "a", "b"), rows).text() == [
        "name     a   b",
        f"\u2068{HEBREW}\u2069    12   3",
        "고양이   1   2",
        "e\u0301        1  20",
    ]


def test_a_name_in_a_figure_reads_as_it_is_written():
    """No mathematics, no markup: the dollar signs are drawn."""

    def pixels(name):
        def draw_name(figure):
            figure.text(0, 0.5, shortened(name, 60), **name_style())

        return np.asarray(Image.open(io.BytesIO(draw_png(draw_name, 3, 0.5))).convert("L"))

    formula, plain = pixels("$x^2$"), pixels("x2")
    assert (formula < 128).any(axis=0).sum() > 2 * (plain < 128).any(axis=0).sum()
    for strange in ("$\\frac{1$", "\\textbf{x}", "%d {0} \x00 \udce9", HEBREW, "\u202eabc", "👩\u200d💻", "_under", ""):
        assert pixels(strange).shape == formula.shape


def test_a_file_that_cannot_be_written_is_refused(page, tmp_path):
    for path, what in [
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "x.html", "there is no folder"),
        (Path("s3://bucket/x.html"), "there is no folder s3:/bucket"),
    ]:
        with pytest.raises(InputError, match=what):
            check_target(path)
    with pytest.raises(InputError, match=r"x\.html: No such file"):
        page.write(tmp_path / "no" / "x.html")
    assert list(tmp_path.iterdir()) == []


def test_figures_have_three_digits_however_small():
    values = {12_345.6: "12,346", 100: "100", 23.456: "23.5", 2.5: "2.5", 0.0512: "0.0512", 0: "0"}
    assert {value: number_text(value) for value in values} == values


def test_time_left_reads_as_people_say_it():
    assert [duration_text(s) for s in (0.4, 42, 185, 7 * 3600 + 720, 3 * 86400 + 4 * 3600)] == [
        "0s",
        "42s",
        "3m05s",
        "7h12m",
        "3d04h",
    ]
