"""The report: every section from its facts, none without them, and nothing in the page that has to be fetched."""

import re
from html.parser import HTMLParser

import pytest

from byrote.eval.probes import Gain
from byrote.eval.report import Bar, GatedText, Report, Sample, render

NASTY = "<script>alert('&\")</script>"
TRAIN = [{"kind": "train", "step": step, "bits_per_byte": 8.0 / step} for step in (1, 2, 5)]
FULL = Report(
    title=f"run {NASTY}",
    facts=[("corpus", f"{NASTY} files")],
    train=TRAIN,
    validation=[{"kind": "validation", "step": 5, "bits_per_byte": 1.75}],
    bits=[Bar("this model", 1.5), Bar(f"xz {NASTY}", 1.25)],
    bits_note=f"3 files {NASTY}",
    gated=[GatedText(f"a{NASTY}.py", ["def", " main", "\n", NASTY], [0.1, 0.9, 0.5, 0.5])],
    gains=[Gain(1, 1.0, 1.25), Gain(2, 1.5, 1.75)],
    loads={"blocks.1.ffn": [0.5, 1.5, 1.0], f"<b>{NASTY}": [1.0, 1.0]},
    acceptance=[0.75, 0.5],
    samples=[Sample("def read", f" the {NASTY}")],
)
SECTIONS = {
    "train": "Learning curve",
    "bits": "Bits per byte of unseen files",
    "gated": "Where memory speaks",
    "gains": "composite gain over depth",
    "loads": "Expert load per layer",
    "acceptance": "Multi-token prediction: acceptance",
    "samples": "Samples",
}
VOID = {"meta", "br", "hr", "img", "input", "link", "!doctype"}


class Page(HTMLParser):
    """Elements with their attributes, all text, and whether every element that opens also closes."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text, self.errors = [], [], "", []
        self.feed(page)
        self.close()
        self.errors += [f"{tag} is never closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"{tag} closes something else")

    def handle_data(self, data):
        self.text += data


def check_self_contained(page: str) -> Page:
    """Balanced, without scripts, and without an address that a browser would load."""
    parsed = Page(page)
    assert parsed.errors == []
    for tag, attributes in parsed.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "xlink:href", "action", "background"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in page and "url(" not in page
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "the name of a vocabulary, which no browser fetches"
    return parsed


def test_every_section_is_there_and_nothing_needs_a_network():
    parsed = check_self_contained(render(FULL))
    for heading in SECTIONS.values():
        assert heading in parsed.text
    tags = [tag for tag, _ in parsed.elements]
    assert tags.count("svg") == 2 and tags.count("h1") == 1 and tags.count("h2") == len(SECTIONS)
    assert {"name": "viewport", "content": "width=device-width,initial-scale=1"} in [attributes for _, attributes in parsed.elements]


def test_text_of_users_stays_text():
    parsed = check_self_contained(render(FULL))
    assert parsed.text.count(NASTY) >= 8
    assert "def main\n" in parsed.text, "pieces of a text stand side by side, whitespace kept"


@pytest.mark.parametrize("field", SECTIONS)
def test_a_section_without_facts_is_left_out(field):
    empty = {} if field == "loads" else []
    parsed = check_self_contained(render(FULL._replace(**{field: empty})))
    for name, heading in SECTIONS.items():
        assert (heading in parsed.text) == (name != field)


def test_the_least_a_report_can_hold():
    parsed = check_self_contained(render(Report("t", [], [], [], [], "")))
    assert parsed.text.split()[-1] == "t"


def test_bars_are_drawn_to_scale_and_carry_their_numbers():
    page = render(FULL)
    assert 'style="width:100.0%"></i><b>1.500</b>' in page and 'style="width:83.3%"></i><b>1.250</b>' in page
    assert "busiest 1.50, idlest 0.50 times the mean" in page
    assert 'style="height:33%" title="expert 0: 0.50"' in page
    assert "1 token further on" in page and "2 tokens further on" in page and "<b>75.0 %</b>" in page


def test_the_darkest_token_has_the_widest_gate():
    shades = [float(shade) for shade in re.findall(r"rgba\(var\(--spoke\),([\d.]+)\)", render(FULL))]
    assert shades == [0.0, 0.75, 0.38, 0.38]
    assert 'title="gate 0.900"' in render(FULL)


def test_gates_that_are_all_alike_are_no_trouble():
    page = render(FULL._replace(gated=[GatedText("a.py", ["x", "y"], [0.5, 0.5])]))
    assert page.count("rgba(var(--spoke),0.00)") == 2


def test_a_curve_without_validation_has_no_line_for_it():
    assert "validation, bits per byte" in render(FULL)
    assert "validation, bits per byte" not in render(FULL._replace(validation=[]))
    assert "Learning curve" in render(FULL._replace(train=TRAIN[:1], validation=[]))


def test_a_row_whose_loss_was_not_finite_breaks_nothing():
    check_self_contained(render(FULL._replace(train=[*TRAIN, {"kind": "train", "step": 9, "bits_per_byte": None}])))
