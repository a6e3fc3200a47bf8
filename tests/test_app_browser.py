"""The page as a person uses it: Debian's Chromium, driven by Playwright, at desktop and at phone width."""

import re

import pytest
import studio
import tryouts
from playwright.sync_api import Browser, Page, expect

import app
from finelip_diffusion import FineLIPStableDiffusionPipeline

PATIENCE = 30_000  # milliseconds for what takes a second where nothing else runs
VIEWPORTS = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 375, "height": 812}}

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def url():
    demo = app.build_demo(FineLIPStableDiffusionPipeline.from_pretrained)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.look())
    yield url
    demo.close()


def open_page(browser: Browser, url: str, width: str = "desktop") -> Page:
    context = browser.new_context(viewport=VIEWPORTS[width], accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.hosts, page.troubles = set(), []
    page.on("request", lambda request: page.hosts.add(re.sub(r"^\w+://|/.*$", "", request.url)))
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.goto(url)
    expect(page.locator("#meter .bar").first).to_be_visible()  # the model is there and has read the empty prompt
    return page


def type_prompt(page: Page, text: str) -> None:
    page.locator("#prompt textarea").fill(text)


def set_number(page: Page, name: str, value: str) -> None:
    box = page.locator(f"#{name} input[type=number]")
    box.fill(value)
    box.press("Tab")


def toast(page: Page, words: str) -> None:
    """The message appears, is one sentence or two, and the page goes on living once it is closed."""
    message = page.locator(".toast-body", has_text=words)
    expect(message.first).to_be_visible()
    text = message.first.inner_text()
    assert "Traceback" not in text and 'File "' not in text and len(text) < 400, text
    message.first.locator(".toast-close").click()


@pytest.mark.parametrize("width", list(VIEWPORTS))
def test_type_read_draw_compare_listen_and_bring_back(browser, url, width, tmp_path):
    page = open_page(browser, url, width)
    prompt = tryouts.SCENES["7 shapes"]

    # The meter and the coloured prompt, while typing.
    page.locator("#prompt textarea").press_sequentially("A red star.")
    expect(page.locator("#meter")).to_contain_text("6 of 77: reads all")
    expect(page.locator("#reading .unread")).to_have_count(0)
    type_prompt(page, prompt)
    expect(page.locator("#meter")).to_contain_text("of 77: never reads the last")
    expect(page.locator("#meter")).to_contain_text("of 248: reads all")
    unread = page.locator("#reading .unread").first
    assert prompt.endswith(unread.inner_text())
    assert "underline" in unread.evaluate("element => getComputedStyle(element).textDecoration")  # not by colour alone
    expect(page.locator("#reading .cut")).to_have_text("the 77-token encoder stops here")
    page.locator("#negative textarea").fill("blurry")
    expect(page.locator("#negative-meter")).to_contain_text("5 of 248 tokens")

    # Draw, by the keyboard: a preview, then the picture.
    set_number(page, "steps", "12")
    page.locator("#prompt textarea").press("Control+Enter")
    expect(page.locator("#stage img")).to_be_visible()
    expect(page.locator("#stage")).to_contain_text("Drawn in")
    expect(page.locator("#drawn img").first).to_be_visible()

    # Compare: three pictures, labelled, and the reader's verdict on every object.
    page.locator("#compare").click()
    expect(page.locator("#verdict tbody tr")).to_have_count(7)
    for name in ("truncate", "chunk", "FineLIP"):
        expect(page.locator(".labelled").get_by_text(name, exact=True)).to_be_visible()
    assert len({page.locator(f"#compared-{name} img").get_attribute("src") for name in ("truncate", "stretch")}) == 2
    found = [int(text.split()[0]) for text in re.findall(r"\d of 7", page.locator("#verdict thead").inner_text())]
    assert found[2] > found[0]  # the prompt was chosen for this

    # Listen: a sentence of the picture that FineLIP drew, then one that `truncate` never read.
    page.get_by_role("tab", name="Listen").click()
    page.locator("#sentences button").nth(2).click()
    expect(page.locator("#heat img")).to_be_visible()
    expect(page.locator("#heard")).to_contain_text("Attention peaks")
    expect(page.locator("#sentences button").nth(2)).to_have_attribute("aria-pressed", "true")
    page.locator("#which").get_by_text("truncate").click()
    expect(page.locator("#sentences button").last).to_be_disabled()
    expect(page.locator("#sentences button").last).to_contain_text("never read")

    # Keep: what was drawn first comes back from its PNG.
    page.get_by_role("tab", name="Kept").click()
    expect(page.locator("#kept .thumbnail-item img")).to_have_count(4)
    page.get_by_role("tab", name="Drawn").click()
    with page.expect_download() as download:
        page.locator("#drawn").get_by_label("Download").click()
    file = tmp_path / "drawn.png"
    download.value.save_as(file)
    type_prompt(page, "something else")
    set_number(page, "steps", "33")
    page.get_by_role("tab", name="Kept").click()
    page.locator("#file input[type=file]").set_input_files(file)
    expect(page.locator("#restored")).to_contain_text("Everything is as it was")
    expect(page.locator("#prompt textarea")).to_have_value(prompt)
    expect(page.locator("#negative textarea")).to_have_value("blurry")
    expect(page.locator("#steps input[type=number]")).to_have_value("12")

    assert page.evaluate("document.documentElement.scrollWidth") <= VIEWPORTS[width]["width"]
    assert page.hosts == {re.sub(r"^\w+://|/.*$", "", url)}  # nothing is fetched from, or told to, anybody else
    assert not page.troubles
    page.context.close()


def test_every_error_is_a_sentence_and_the_page_goes_on(browser, url, tmp_path):
    page = open_page(browser, url)
    page.locator("#draw").click()
    toast(page, "The prompt is empty")
    type_prompt(page, "x" * 20_001)
    expect(page.locator("#meter")).to_contain_text("The prompt has 20,001 characters")
    page.locator("#compare").click()
    toast(page, "shorten it to 20,000")
    type_prompt(page, "A small red star in the very centre.")
    for seed in ("-5", "99999999999"):
        set_number(page, "seed", seed)
        page.locator("#draw").click()
        toast(page, f"Seed cannot be {seed}")
    set_number(page, "seed", "1")
    (tmp_path / "none.png").write_bytes(b"<html>")
    page.get_by_role("tab", name="Kept").click()
    page.locator("#file input[type=file]").set_input_files(tmp_path / "none.png")
    expect(page.locator("#restored")).to_contain_text("This file is no PNG")
    set_number(page, "steps", "2")
    page.locator("#draw").click()
    expect(page.locator("#stage")).to_contain_text("Drawn in")
    page.context.close()


def test_stop_stops_and_a_closed_tab_leaves_nothing_running(browser, url):
    page = open_page(browser, url)
    type_prompt(page, tryouts.SCENES["9 shapes"])
    set_number(page, "steps", "150")
    page.locator("#draw").click()
    expect(page.locator("#stage")).to_contain_text("step")
    page.locator("#stop").click()
    expect(page.locator("#stage")).to_contain_text("Stopped.")
    set_number(page, "number", "4")
    page.locator("#draw").click()
    expect(page.locator("#stage")).to_contain_text("step")
    page.context.close()

    # Another window is served at once: had the 600 steps gone on, it would wait for them.
    other = open_page(browser, url)
    type_prompt(other, "A small red star in the very centre.")
    set_number(other, "steps", "1")
    other.locator("#draw").click()
    expect(other.locator("#stage")).to_contain_text("Drawn in")
    other.context.close()


def test_two_tabs_draw_their_own(browser, url):
    pages = [open_page(browser, url) for _ in range(2)]
    for number, page in enumerate(pages):
        type_prompt(page, f"A small red star in the very centre. {number}")
        set_number(page, "steps", "8")
        page.locator("#draw").click()
    for number, page in enumerate(pages):
        expect(page.locator("#stage")).to_contain_text("Drawn in")
        page.get_by_role("tab", name="Listen").click()
        expect(page.locator("#sentences")).to_contain_text(str(number))
        page.context.close()


def test_every_control_has_a_name_and_the_keyboard_reaches_them_in_order(browser, url):
    page = open_page(browser, url)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('input, textarea, select, button')]
            .filter(element => element.offsetParent && element.type !== 'file')
            .filter(element => !(element.labels?.length || element.getAttribute('aria-label') || element.title
                || element.getAttribute('aria-labelledby') || element.innerText?.trim() || element.placeholder))
            .map(element => element.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    order = ["prompt", "draw", "compare", "stop", "examples", "negative", "strategy", "steps", "guidance", "seed"]
    places = page.evaluate(
        "names => names.map(name => document.getElementById(name)).map((element, index, all) => index === 0 ||"
        " !!(all[index - 1].compareDocumentPosition(element) & Node.DOCUMENT_POSITION_FOLLOWING))",
        order,
    )
    assert all(places), places
    page.locator("#prompt textarea").focus()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[id]')?.id"))
    assert [name for name in reached if name in ("draw", "compare", "stop")][:3] == ["draw", "compare", "stop"]
    page.context.close()


def contrast(page: Page, selector: str) -> float:
    """Contrast ratio of an element's text, as WCAG 2 defines it."""
    colours = page.locator(selector).first.evaluate(
        """element => {
            let ground = element;
            while (/, 0\\)|transparent/.test(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
            return [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor];
        }"""
    )
    levels = []
    for colour in colours:
        channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        levels.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(levels) + 0.05) / (min(levels) + 0.05)


def test_text_has_the_contrast_that_wcag_asks_for(browser, url):
    page = open_page(browser, url)
    type_prompt(page, tryouts.SCENES["9 shapes"] * 2)
    expect(page.locator("#reading .further").first).to_be_visible()
    for selector in (
        "#reading .read", "#reading .unread", "#reading .further", "#reading .cut", ".legend .unread", ".over .count",
        ".lead", ".hint", "#draw", "#compare", "#stop", "#stage .note", "#prompt label span", "#seed label span",
        "#tabs button[aria-selected=true]", "#tabs button[aria-selected=false]", "#examples button",
    ):  # fmt: skip
        assert contrast(page, selector) >= 4.5, selector
    page.context.close()


def test_the_limits_on_the_page_are_those_of_the_studio(browser, url):
    page = open_page(browser, url)
    for name, bound in (("steps", "steps"), ("number", "num_images")):
        box = page.locator(f"#{name} input[type=number]")
        assert [int(box.get_attribute(side)) for side in ("min", "max")] == list(studio.BOUNDS[bound][:2])
    page.context.close()
