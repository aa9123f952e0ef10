"""Gates as coloured text: every character stays, no colour runs over a line, and a page is text and not markup."""

import re

from byrote.eval.memory_text import SHADES, Heard, Knockout, as_html, as_terminal, shade

TOKENS = [Heard("if", 0.0, 3.0), Heard(" a<b:\n\n    ", 0.51, 0.0), Heard("é", 1.0, 12.5)]


def test_shades_go_from_none_to_full() -> None:
    found = [shade(gate / 100) for gate in range(101)]
    assert found == sorted(found) and found[0] == 0 and found[-1] == len(SHADES) - 1 and set(found) == set(range(len(SHADES)))


def test_a_terminal_shows_every_character_and_no_colour_runs_over_a_line() -> None:
    shown = as_terminal(TOKENS)
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == "".join(one.text for one in TOKENS)
    for line in shown.split("\n"):
        codes = re.findall(r"\x1b\[([0-9;]*)m", line)
        assert codes == [] or codes[-1] == "0"


def test_a_page_holds_the_text_escaped_with_gate_and_visits_of_each_token() -> None:
    page = as_html([("a & b", TOKENS)], [Knockout("a & b", 20, 1.25, 1.5)])
    assert "a &amp; b" in page and "a&lt;b" in page and page.count("<span") == 3
    assert "1.2500 bits per byte, 1.5000 with memory zeroed" in page
    assert 'title="gate 1.00, visits 12.5"' in page
