"""Every figure: tokens stay text, axes and scales are titled, and a browser draws it."""

import functools
import json
import re
import shutil
import struct
import subprocess
import zlib

import plotly.graph_objects as go
import pytest
from plot_cases import HOSTILE, every_figure

from lig_lens.show.plots import write_html

pytestmark = [
    pytest.mark.program,
    pytest.mark.filterwarnings("ignore::lig_lens.CancellationWarning"),  # random Flows
    pytest.mark.filterwarnings("ignore:The kopts argument is ignored"),  # plotly gives it, whether of use or not
]

FIGURES = {name: functools.cache(draw) for name, draw in every_figure().items()}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def strings(node):
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from strings(value)


@pytest.mark.parametrize("name", FIGURES)
def test_tokens_and_names_are_never_markup(name):
    found = list(strings(json.loads(FIGURES[name]().to_json())))
    assert not [text for text in found if "<script" in text or "<b>x" in text or "<b>m" in text]
    tags = {tag for text in found for tag in re.findall(r"<(/?\w+)", text)}
    assert tags <= {"b", "/b", "i", "/i", "br", "span", "/span", "extra", "/extra"}
    # A token that looks like a template is none: it stands in labels, which are not rendered as templates.
    templates = [trace.hovertemplate for trace in FIGURES[name]().data if trace.hovertemplate]
    assert all(
        set(re.findall(r"%\{(\w+)", text)) <= {"x", "y", "z", "text", "hovertext", "customdata", "fullData"}
        for text in templates
    )


@pytest.mark.parametrize("name", FIGURES)
def test_headings_axes_and_scales_have_titles(name):
    figure = FIGURES[name]()
    assert isinstance(figure, go.Figure)
    notes = [note.text for note in figure.layout.annotations]
    heading = figure.layout.title.text or next(text for text in notes if text.startswith("<b>"))
    assert "<br>" in heading and 560 <= figure.layout.width < 2500 and figure.layout.height < 2500
    if figure.data[0].type == "heatmap":
        assert figure.layout.coloraxis.colorbar.title.text and notes[-1]
        if figure.layout.coloraxis.cmin < 0 < figure.layout.coloraxis.cmax:
            assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    elif figure.layout.xaxis.visible is not False:  # a text has no axes
        assert figure.layout.xaxis.title.text and figure.layout.yaxis.title.text
    assert figure.layout.template.layout.colorway  # a template of ours, whatever the user's default is


@pytest.mark.parametrize("name", FIGURES)
def test_no_button_sends_a_figure_away(name):
    assert "sendChartToCloud" in FIGURES[name]().layout.modebar.remove


def png_size_and_variety(png):
    """Width, height and number of different bytes of the pixels: a blank image has next to none."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    data, place = b"", 8
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"IDAT":
            data += png[place + 8 : place + 8 + length]
        place += length + 12
    return width, height, len(set(zlib.decompress(data)))


def test_a_blank_image_has_no_variety():
    row = b"\x00" + b"\xff" * 30
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 10, 5, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(row * 5))]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + k + d + b"crc." for k, d in chunks)
    assert png_size_and_variety(png) == (10, 5, 2)


@pytest.fixture(scope="module")
def kaleido():
    """One browser for all images, where each would start its own."""
    found = pytest.importorskip("kaleido", reason='no kaleido for static images: pip install "kaleido>=1.0"')
    found.start_sync_server()
    yield
    found.stop_sync_server()


@pytest.mark.usefixtures("kaleido")
@pytest.mark.parametrize("name", FIGURES)
def test_static_images(name, tmp_path):
    figure = FIGURES[name]()
    figure.write_image(tmp_path / "x.png")
    width, height, variety = png_size_and_variety((tmp_path / "x.png").read_bytes())
    assert (width, height) == (figure.layout.width, figure.layout.height) and variety > 100


def browse(page, *options):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--virtual-time-budget=8000", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()


@pytest.mark.skipif(BROWSER is None, reason="no browser to draw figures: apt-get install chromium")
def test_a_browser_draws_every_figure(tmp_path):
    page = write_html([draw() for draw in FIGURES.values()], tmp_path / "x.html")
    drawn = browse(page, "--dump-dom").split('<div class="figure">')[1:]
    assert len(drawn) == len(FIGURES)
    for (name, draw), html in zip(FIGURES.items(), drawn, strict=True):
        figure = draw()
        svg = html[html.index('class="main-svg"') :]
        assert f'width="{figure.layout.width}" height="{figure.layout.height}"' in svg[:300], name
        is_map = figure.data[0].type == "heatmap"
        marks = svg.count("<image") if is_map else len(re.findall('class="trace (scatter|bars)', svg))
        assert marks >= 1, name
        assert "<script>alert" not in html, name
        assert figure.layout.xaxis.fixedrange or 'data-title="Pan"' in html, name
        assert 'data-title="Share' not in html, name
    # What its reader sees is the token itself.
    assert ">&lt;/script&gt;&lt;scr…" in drawn[0] and HOSTILE[0].startswith("</script><scr")


@pytest.mark.skipif(BROWSER is None, reason="no browser to draw figures: apt-get install chromium")
def test_a_page_is_not_blank(tmp_path):
    page = write_html(FIGURES["paths_graph"](), tmp_path / "x.html")
    browse(page, f"--screenshot={tmp_path / 'x.png'}", "--window-size=900,600")
    width, height, variety = png_size_and_variety((tmp_path / "x.png").read_bytes())
    assert (width, height) == (900, 600) and variety > 100
