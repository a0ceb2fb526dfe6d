"""The page as people have it: in Chromium, wide and narrow, in light and dark, with mouse, finger and keys."""

from collections.abc import Iterator

import pytest
from browser import CHROMIUM, Browser

from diffussm.report.charts import Chart, Line
from diffussm.report.page import Gallery, Section, Strip, render_page
from diffussm.report.pictures import Picture
from diffussm.report.tables import Column, Table

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: install it, as by apt install chromium")

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"
    "AAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PHONE = {"width": 390, "height": 844}
CHART = ".chart > svg"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two hostile runs with wide tables, long rows of pictures, and curves with a gap, a zero and one point."""
    images = [1000, 2000, 3000, 4000]
    hours = [0.1, 0.2, 0.3, 0.4]
    lines = [
        Line("first", {"images": images, "hours": hours}, [1.0, 0.1, 0.01, 0.001]),
        Line(HOSTILE, {"images": images[:2]}, [0.5, 0.25]),
        Line("one point", {"images": [1500], "hours": [0.15]}, [0.7], is_measured=True),
    ]
    charts = [
        Chart("loss", "Loss", "loss", lines, is_log=True),
        Chart("wait", "Waiting", "share", [Line("wait", {"images": images}, [0.0, 0.5, 0.0, 0.25])]),
        Chart("flat", "Flat", "rate", [Line("rate", {"images": images}, [0.0] * 4)]),
    ]
    columns = [Column("run", is_text=True), *(Column(f"a long heading {i}") for i in range(15))]
    table = Table("results", "Results", columns, [["name of a run", *range(15)]])
    pictures = [Picture(PIXEL, f"image {i}", 8, 8, is_sharp=True) for i in range(40)]
    gallery = Gallery(
        "Samples", "about them", [Strip("class 0", pictures), Strip(f"a run of {'many_' * 9}choices", pictures)]
    )
    sections = [
        Section(
            name,
            lead=["x" * 300],
            state="finished",
            facts=[("model", HOSTILE)],
            tables=[table],
            charts=charts,
            galleries=[gallery],
            texts=[("Configuration", "key: " + "y" * 500)],
        )
        for name in ("One", HOSTILE)
    ]
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(HOSTILE, "subtitle", sections))
    return path


@pytest.mark.parametrize("size", [{}, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_complains_of_nothing_and_asks_for_nothing(browser, page, size, scheme):
    browser.open(page, **size, scheme=scheme)
    width = size.get("width", 1280)
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.value("document.querySelectorAll('path.curve').length") > 0
    background = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) > 3 * 128) == (scheme == "light")
    assert browser.complaints() == [] and browser.requests() == [page.resolve().as_uri()]


def test_a_long_name_leaves_a_phone_room_for_its_pictures(browser, page):
    browser.open(page, **PHONE)
    short, long = browser.value(
        "[...document.querySelectorAll('.pictures tbody th')].slice(0, 2).map(th => th.offsetWidth)"
    )
    assert 0 < short == long < PHONE["width"] / 2


def test_what_the_page_may_not_do_it_cannot(browser, page):
    browser.open(page)
    browser.value(
        "{const image = new Image(); image.src = 'https://example.invalid/x.png'; document.body.append(image)}"
    )
    browser.value("new Promise(resolve => setTimeout(resolve, 50))")
    assert any("Content Security Policy" in str(message) for message in browser.complaints())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_stand_out_from_the_ground(browser, page, scheme):
    browser.open(page, scheme=scheme)
    contrast = """(() => {
      const light = color => color.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const probe = document.body.appendChild(document.createElement('i'));
      const of = name => { probe.style.color = `var(--${name})`; return light(getComputedStyle(probe).color); };
      const against = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      const names = ['ink', 'soft', 'link', 'fine', 'bad', ...Array.from({length: 8}, (_, i) => `line-${i}`)];
      const least = color => Math.min(against(color, of('ground')), against(color, of('raised')));
      return Object.fromEntries(names.map(name => [name, least(of(name))]));
    })()"""
    for name, ratio in browser.value(contrast).items():
        assert ratio >= (3.0 if name.startswith("line") else 4.5), name


def readout(browser: Browser) -> tuple[str, list[str]]:
    place = browser.value("document.querySelector('.readout').textContent")
    values = browser.value(
        "[...document.querySelector('.keys').querySelectorAll('.value')].map(value => value.textContent)"
    )
    return place, values


def test_the_mouse_reads_values(browser, page):
    browser.open(page)
    browser.point(CHART, 0.99)
    assert readout(browser) == ("images seen: 4000", ["0.001", "0.25 (at 2000)", "0.7 (at 1500)"])
    browser.point(CHART, 0.12)
    assert readout(browser)[0] == "images seen: 1000"


def test_a_finger_reads_values_and_they_stay(browser, page):
    browser.open(page, **PHONE)
    browser.touch(CHART, 0.99)
    assert readout(browser)[0] == "images seen: 4000"


def test_keys_read_values(browser, page):
    browser.open(page)
    browser.value("document.querySelector('.chart > svg').focus()")
    seen = []
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Escape"):
        browser.press(key)
        seen.append(readout(browser)[0].removeprefix("images seen: "))
    assert seen == ["1000", "1500", "2000", "1500", "4000", "4000", ""]


def test_names_hide_and_show_their_curves(browser, page):
    browser.open(page)
    count = "document.querySelector('.chart').querySelectorAll('path.curve').length"
    button = "document.querySelector('.keys button')"
    assert (browser.value(count), browser.value(f"{button}.getAttribute('aria-pressed')")) == (3, "true")
    browser.value(f"{button}.click()")
    assert (browser.value(count), browser.value(f"{button}.getAttribute('aria-pressed')")) == (2, "false")
    browser.value(f"{button}.click()")
    assert browser.value(count) == 3


def test_axes_are_chosen_and_what_is_not_known_there_is_left_out(browser, page):
    browser.open(page)
    labels = "[...document.querySelector('.chart > svg').querySelectorAll('text')].map(text => text.textContent)"
    paths = "document.querySelector('.chart').querySelectorAll('path.curve').length"
    assert "0.001" in browser.value(labels) and "images seen" in browser.value(labels)
    browser.value("document.querySelector('input[value=hours]').click()")
    assert "hours of training steps" in browser.value(labels) and browser.value(paths) == 2
    browser.value("document.querySelector('input[value=compute]').click()")
    assert browser.value(labels) == ["Nothing to show against total Gflops"]
    browser.value("document.querySelector('input[value=images]').click()")
    browser.value("document.querySelector('.chart figcaption input').click()")
    assert "0.001" not in browser.value(labels)  # now linear
    browser.value("document.querySelector('input[name=log-x]').click()")
    assert browser.value(paths) == 3 and browser.complaints() == []


def test_zeros_do_not_break_a_logarithmic_axis(browser, page):
    browser.open(page)
    browser.value("document.querySelectorAll('.chart')[1].querySelector('figcaption input').click()")
    drawn = browser.value("document.querySelectorAll('.chart')[1].querySelector('path.curve').getAttribute('d')")
    assert "NaN" not in drawn and drawn.count("L") == 1
    every = browser.value(
        "[...document.querySelectorAll('path.curve')].map(path => path.getAttribute('d')).join()"
    )
    assert "NaN" not in every and "Infinity" not in every


def test_copies_reach_the_clipboard_or_say_why_not(browser, page):
    browser.open(page)
    browser.value("document.querySelector('button.copy').click()")
    browser.value("new Promise(resolve => setTimeout(resolve, 100))")
    assert browser.value("document.getElementById('said').textContent") in (
        "Copied", "Could not copy: use the download beside it",
    )  # fmt: skip
    assert browser.complaints() == []
