"""The page as text: whole by itself, and nothing in it that a run is called is taken for code."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from diffussm.report.charts import Chart, Line
from diffussm.report.files import write_report
from diffussm.report.page import Gallery, Section, Strip, render_page
from diffussm.report.pictures import Picture
from diffussm.report.tables import Column, Table

HOSTILE = "</script><script>alert('x')</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"


def section(name: str) -> Section:
    table = Table(name, name, [Column(name, is_text=True)], [[name]], [name])
    chart = Chart("loss", name, name, [Line(name, {"images": [1, 2]}, [0.5, 0.25])], is_log=True)
    picture = Picture("data:image/png;base64,AAAA", name, 8, 8, is_sharp=True)
    return Section(
        name,
        lead=[name],
        state=name,
        facts=[(name, name)],
        tables=[table],
        charts=[chart],
        galleries=[Gallery(name, name, [Strip(name, [picture])], [name])],
        more_tables=[table],
        texts=[(name, name)],
    )


class Reader(HTMLParser):
    """Collects tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.mark.parametrize("count", [1, 2])
def test_hostile_names_stay_text(count):
    page = render_page(HOSTILE, HOSTILE, [section(HOSTILE)] * count)
    tags = Reader(page).tags
    assert [tag for tag, _ in tags].count("script") == 2  # the data and ours
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert {attributes["src"] for tag, attributes in tags if tag == "img"} == {"data:image/png;base64,AAAA"}
    assert {attributes["alt"] for tag, attributes in tags if tag == "img"} == {HOSTILE}
    assert "{{ 7 * 7 }}" in page and "<script>alert" not in page


def test_nothing_is_asked_of_a_network():
    page = render_page("t", "s", [section("a"), section("b")])
    for _, attributes in Reader(page).tags:
        for name in ("src", "href", "action", "poster", "srcset"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "@import" not in style and "url(" not in style
    script = page[page.rindex("<script>") + len("<script>") : page.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_headings_names_and_labels_are_there_for_all():
    tags = Reader(render_page("t", "s", [section("a"), section("b")])).tags
    names = [tag for tag, _ in tags]
    assert names.count("h1") == names.count("main") == 1 and names.count("h2") == 2
    identities = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert all("alt" in attributes for tag, attributes in tags if tag == "img")
    assert ("html", {"lang": "en"}) in tags
    assert any(tag == "meta" and a.get("name") == "viewport" for tag, a in tags)
    linked = {attributes["href"][1:] for tag, attributes in tags if (attributes.get("href") or "").startswith("#")}
    assert linked <= set(identities)


def test_tables_lie_beside_the_page_and_in_it(tmp_path):
    page = write_report(tmp_path, "t", "s", [section("one"), section("two")], section("one").charts)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["curve-loss.png", "one.csv", "one.tex", "report.html", "report.md", "two.csv", "two.tex"]
    links = [attributes for tag, attributes in Reader(page.read_text()).tags if "download" in attributes]
    csv = next(link for link in links if link["download"] == "one.csv")
    assert base64.b64decode(csv["href"].partition("base64,")[2]) == (tmp_path / "one.csv").read_bytes()
    assert (tmp_path / "report.md").read_text().startswith("# t\n\ns\n\n## one")
