"""The page in headless Chromium: a person draws, asks, reconstructs, makes a clip, and looks back."""

import os
import pathlib
import shutil

import pytest
from PIL import Image
from serving_stand_ins import FakeJobs, FakeModel, served

from emu3_jax.serving.app import make_app
from emu3_jax.serving.guard import LOOPBACK

pytestmark = pytest.mark.slow  # the quick tier has no Selenium

KEY = "key-of-the-page"


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not program or not driver:
        if os.environ.get("CI") == "true":
            pytest.fail("Chromium and its driver are not installed: apt-get install chromium chromium-driver")
        pytest.skip("Chromium and its driver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=420,900"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture
def page(browser):
    jobs = FakeJobs()
    with served(make_app(jobs, FakeModel(), key=KEY, hosts=LOOPBACK), jobs) as url:
        browser.get(url)
        yield browser
        jobs.release.set()
        # Faults of the script, and what the Content-Security-Policy forbids. Refusals ("network") are wanted here.
        bad = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert [entry for entry in bad if entry["source"] != "network"] == []
        browser.get("about:blank")


def wait(browser, what):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20, 0.05).until(lambda _: what())


def test_a_person_uses_the_page(page, tmp_path):
    from selenium.webdriver.common.keys import Keys

    def at(name):
        return page.find_element("id", name)

    wait(page, lambda: at("key-form").is_displayed())
    assert "API key" in at("error").text
    wait(page, lambda: page.switch_to.active_element == at("key"))
    page.switch_to.active_element.send_keys(KEY, Keys.ENTER)  # by the keyboard alone
    wait(page, lambda: at("model").text == "tiny")
    assert not at("key-form").is_displayed() and at("error").text == ""

    at("seed").send_keys("7", Keys.ENTER)
    wait(page, lambda: at("progress").text == "Done, 16x16, seed 7")
    assert at("picture").get_attribute("naturalWidth") == "16"
    assert at("picture").get_attribute("alt") == "3d emoji of red heart"
    assert "seed\n7" in at("past").text

    at("prompt").clear()
    at("prompt").send_keys("<|image start|>")
    at("draw-form").find_element("css selector", "button").click()
    wait(page, lambda: "control token" in at("error").text)

    file = tmp_path / "red.png"
    Image.new("RGB", (8, 8), "red").save(file)
    at("ask-file").send_keys(str(file))
    at("question").send_keys(Keys.ENTER)
    wait(page, lambda: at("answers").text.endswith("Model: abcd"))

    at("codes-file").send_keys(str(file))
    at("codes-form").find_element("css selector", "button").click()
    wait(page, lambda: at("again-text").text == "2 rows of 2 codes, 16x16 pixels")
    assert at("codes-text").get_attribute("textContent") == "0 1\n2 3"

    at("clip-prompt").send_keys(Keys.ENTER)
    wait(page, lambda: at("clip-progress").text == "completed")
    assert at("clip-place").find_element("css selector", "*").is_displayed()

    # Readable on a phone: nothing is wider than the window. Everything has a label.
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    unlabelled = "return [...document.querySelectorAll('input,select,textarea')].filter(e => !e.labels.length).length"
    assert page.execute_script(unlabelled) == 0
    assert page.execute_script("return [...document.images].filter(i => !i.alt).length") == 0


def test_the_page_stops_a_picture(page):
    def at(name):
        return page.find_element("id", name)

    page.execute_script(f"sessionStorage.setItem('key', '{KEY}')")
    page.refresh()
    wait(page, lambda: at("model").text == "tiny")
    at("prompt").clear()
    at("prompt").send_keys("for ever")
    at("draw-form").find_element("css selector", "button").click()
    wait(page, lambda: "of 16 pixel rows" in at("progress").text)
    at("stop").click()
    wait(page, lambda: at("progress").text == "Stopped")
    if folder := os.environ.get("EMU3_JAX_SCREENSHOTS"):
        page.save_screenshot(str(pathlib.Path(folder) / "serving.png"))


def test_nothing_of_the_page_is_from_elsewhere():
    import emu3_jax.serving.page as page

    folder = pathlib.Path(page.__file__).parent
    for name in ("index.html", "page.css", "page.js"):
        text = (folder / name).read_text()
        assert "http:" not in text and "https:" not in text and "innerHTML" not in text and "style=" not in text
