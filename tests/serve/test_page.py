"""The chat page in a headless browser: streaming, stop, gates, parameters, keys of the keyboard. Skipped where no browser is."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
pytest.importorskip("openai", reason="pip install openai")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from tests.serve.served import Served  # noqa: E402

BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="needs the programs chromium and chromedriver")


@pytest.fixture(scope="module")
def served(run: Path) -> Iterator[Served]:
    server = Served(run)
    yield server
    server.close()


@pytest.fixture
def page(served: Served, tmp_path: Path) -> Iterator["webdriver.Chrome"]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    browser.get(served.url)
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#model option"))
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    browser.quit()


FAKE = """const body = arguments[0]; state.models[0].chat = true; window.fetch = async () => new Response(body);"""


def wait(browser: "webdriver.Chrome", condition, seconds: float = 30) -> None:
    WebDriverWait(browser, seconds, 0.05).until(lambda _: condition())


def status(browser: "webdriver.Chrome") -> str:
    return browser.find_element(By.ID, "status").text


def set_value(browser: "webdriver.Chrome", name: str, value: str) -> None:
    browser.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, value)


def test_enter_sends_and_the_text_streams_in(page: "webdriver.Chrome", served: Served) -> None:
    set_value(page, "temperature", "0")
    set_value(page, "max_tokens", "12")
    page.switch_to.active_element.send_keys("so it", Keys.ENTER)
    wait(page, lambda: status(page) == "Done.")
    asked = {"model": "tiny", "prompt": "so it", "max_tokens": 12, "temperature": 0.0, "top_p": 0.95}
    answer = served.openai.completions.create(**asked).choices[0].text
    body = page.find_element(By.CSS_SELECTOR, ".turn .body")
    assert body.get_property("textContent") == "so it" + answer
    assert "12 tokens" in page.find_element(By.ID, "speed").text
    assert page.switch_to.active_element.get_attribute("id") == "prompt"


def test_tokens_are_shaded_by_gate_and_say_it_to_a_screen_reader(page: "webdriver.Chrome") -> None:
    page.find_element(By.ID, "gates").click()
    set_value(page, "max_tokens", "6")
    page.find_element(By.ID, "prompt").send_keys("so it", Keys.ENTER)
    wait(page, lambda: status(page) == "Done.")
    tokens = page.find_elements(By.CSS_SELECTOR, ".token")
    assert page.find_element(By.CSS_SELECTOR, ".turn .body").get_property("textContent") == "so it" + "".join(
        token.get_property("textContent") for token in tokens
    )
    assert [token.get_attribute("tabindex") for token in tokens] == ["0", *["-1"] * (len(tokens) - 1)], "one stop of Tab an answer"
    page.execute_script("document.querySelector('.token').focus()")
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert page.switch_to.active_element == tokens[1]
    for token in tokens:
        assert token.get_attribute("aria-description") == token.get_attribute("title") != ""
        assert token.value_of_css_property("background-color") != "rgba(0, 0, 0, 0)"


def test_escape_stops_and_an_error_gives_the_prompt_back(page: "webdriver.Chrome") -> None:
    set_value(page, "max_tokens", "400")
    prompt = page.find_element(By.ID, "prompt")
    prompt.send_keys("so it", Keys.ENTER, Keys.ESCAPE)
    wait(page, lambda: status(page) == "Stopped.")
    set_value(page, "top_p", "7")
    prompt.send_keys("again", Keys.ENTER)
    wait(page, lambda: page.find_elements(By.CSS_SELECTOR, ".turn.error"))
    assert "top_p" in page.find_element(By.CSS_SELECTOR, ".turn.error").text
    assert prompt.get_property("value") == "again"
    page.get_log("browser")  # the refused request is written there, as it should be


def test_reasoning_is_folded_away_its_tags_not_shown_and_a_server_that_is_gone_is_an_error(page: "webdriver.Chrome") -> None:
    def chunk(token: str, **delta: str) -> dict:
        return {"choices": [{"delta": delta, "gates": [{"token": token, "gate": 0.5}]}]}

    chunks = [chunk("<think>"), chunk("why", reasoning_content="why"), chunk("</think>so", content="so"), chunk(" on", content=" on")]
    page.execute_script(FAKE, "".join(f"data: {json.dumps(one)}\n\n" for one in chunks))
    page.find_element(By.ID, "prompt").send_keys("so it", Keys.ENTER)
    wait(page, lambda: page.find_elements(By.CSS_SELECTOR, ".turn.error"))
    assert "Is it still running?" in page.find_element(By.CSS_SELECTOR, ".turn.error").text, "nothing said [DONE]"
    shown = [token.get_property("textContent") for token in page.find_elements(By.CSS_SELECTOR, ".turn .token")]
    assert shown == ["why", "so", " on"]
    assert page.find_element(By.CSS_SELECTOR, "details.thought span").get_property("textContent") == "why"


def test_dark_is_a_button_that_says_whether_it_is_on(page: "webdriver.Chrome") -> None:
    button = page.find_element(By.ID, "theme")
    before = button.get_attribute("aria-pressed"), page.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    button.click()
    after = button.get_attribute("aria-pressed"), page.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    assert {before[0], after[0]} == {"true", "false"}
    assert before[1] != after[1]
