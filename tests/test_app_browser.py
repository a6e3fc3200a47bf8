"""The page as a person uses it: Debian's Chromium, driven by Playwright, at desktop and at phone width."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import example_prompts
import pytest
import studio
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Browser, BrowserContext, Page, expect

import app
from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline

PATIENCE = 30_000  # milliseconds for what takes a second where nothing else runs
VIEWPORTS = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def pipe():
    return FineLIPStableDiffusionPipeline.from_pretrained()


@pytest.fixture(scope="module")
def url(pipe):
    demo = app.build_demo(pipe)
    _, url, public = demo.launch(prevent_thread_lock=True, quiet=True, **app.look())
    assert public is None  # no link for the whole world unless somebody asks for it
    yield url
    demo.close()


@pytest.fixture(scope="module")
def tabs(browser: Browser) -> Iterator[BrowserContext]:
    """The browser of one person, who has the page's scripts already."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


@contextmanager
def opened(tabs: BrowserContext, url: str, width: str = "desktop", theme: str = "light") -> Iterator[Page]:
    """A tab of its own; nothing it shows is fetched from, or told to, anybody but the page's own server."""
    page, hosts, troubles = tabs.new_page(), set(), []
    page.set_viewport_size(VIEWPORTS[width])
    page.on("request", lambda request: hosts.add(re.sub(r"^\w+://|/.*$", "", request.url)))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(f"{url}?__theme={theme}")
    expect(page.locator("#prompt textarea")).to_be_visible()
    yield page
    page.close()
    assert hosts == {re.sub(r"^\w+://|/.*$", "", url)}
    assert not troubles


def type_prompt(page: Page, text: str) -> None:
    page.locator("#prompt textarea").fill(text)


def set_number(page: Page, name: str, value: str) -> None:
    box = page.locator(f"#{name} input[type=number]")
    box.fill(value)
    box.press("Tab")


def begin(page: Page, prompt: str, steps: str) -> None:
    """Draws, and waits until it is under way or done."""
    type_prompt(page, prompt)
    set_number(page, "steps", steps)
    page.locator("#draw").click()
    expect(page.locator("#stage")).to_contain_text(re.compile("step|Drawn in"))


def drop(page: Page, name: str, content: bytes, words: str) -> None:
    """Drops a file on the page, and reads what it says of it."""
    page.get_by_role("tab", name="Kept").click()
    page.locator("#file input[type=file]").set_input_files({"name": name, "mimeType": "image/png", "buffer": content})
    expect(page.locator("#restored")).to_contain_text(words)
    page.locator("#file").get_by_label("Clear").click()


def faint_texts(page: Page) -> list[str]:
    """Every visible text whose contrast is less than the 4.5 that WCAG 2 AA asks for; disabled controls are exempt."""
    return page.evaluate(
        """() => {
            const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
            const over = (colours) => {  // colours from the ground up, as a screen shows them
                canvas.clearRect(0, 0, 1, 1);
                for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
                return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
            };
            const light = colour => colour.map(value => value / 255)
                .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
                .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
            const faint = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (walker.nextNode()) {
                const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
                const box = element.getBoundingClientRect(), style = getComputedStyle(element);
                if (!text || !box.width || style.visibility !== 'visible' || element.closest('script, style')
                    || element.closest(':disabled')) continue;
                const grounds = [];
                let opacity = 1;
                for (let at = element; at; at = at.parentElement) {
                    grounds.unshift(getComputedStyle(at).backgroundColor);
                    opacity *= getComputedStyle(at).opacity;
                }
                if (!opacity) continue;
                const ground = over(['white', ...grounds]), ink = over([`rgb(${ground})`, style.color]);
                const seen = ink.map((value, index) => value * opacity + ground[index] * (1 - opacity));
                const [low, high] = [light(seen), light(ground)].sort((a, b) => a - b);
                const ratio = (high + 0.05) / (low + 0.05);
                if (ratio < 4.5) faint.push(`${ratio.toFixed(2)}: ${text.slice(0, 60)} <${element.className}>`);
            }
            return faint;
        }"""
    )


def all_is_legible(page: Page) -> None:
    """No text is faint once whatever fades in has done so."""
    for _ in range(20):
        if not (faint := faint_texts(page)):
            return
        page.wait_for_timeout(100)
    pytest.fail(f"too little contrast: {faint}")


@pytest.mark.parametrize(("width", "theme"), [("desktop", "light"), ("phone", "dark")])
def test_type_read_draw_compare_listen_and_bring_back(tabs, url, width, theme, tmp_path):
    prompt = example_prompts.SCENES["7 shapes"]
    with opened(tabs, url, width, theme) as page:
        # The meter and the coloured prompt, while typing.
        page.locator("#prompt textarea").press_sequentially("A red star.")
        expect(page.locator("#meter")).to_contain_text("6 of 77: reads all")
        expect(page.locator("#reading .unread")).to_have_count(0)
        type_prompt(page, example_prompts.SCENES["9 shapes"] * 2)
        expect(page.locator("#meter")).to_contain_text("of 248: reads all, in 2 windows")
        expect(page.locator("#reading .further").first).to_be_visible()
        all_is_legible(page)
        page.locator("#examples").get_by_text("7 shapes").click()
        expect(page.locator("#prompt textarea")).to_have_value(prompt)
        expect(page.locator("#meter")).to_contain_text("of 77: never reads the last 64")
        expect(page.locator("#meter .over .count b")).to_have_text("141")
        unread = page.locator("#reading .unread").first
        assert prompt.endswith(unread.inner_text())
        decoration = unread.evaluate("element => getComputedStyle(element).textDecoration")
        assert "underline" in decoration  # not by colour alone
        expect(page.locator("#reading .cut")).to_have_text("the 77-token encoder stops here")
        page.locator("#negative textarea").fill("blurry")
        expect(page.locator("#negative-meter")).to_contain_text("5 of 248 tokens")

        # Draw, by the keyboard: a preview, then the picture.
        set_number(page, "steps", "12")
        page.locator("#prompt textarea").press("Control+Enter")
        expect(page.locator("#stage img")).to_have_attribute("alt", re.compile(r"Preview after step \d+ of 12"))
        expect(page.locator("#stage")).to_contain_text("Drawn in")
        expect(page.locator("#drawn img").first).to_be_visible()

        # Compare: three pictures side by side, labelled, and the reader's verdict on every object.
        page.locator("#compare").click()
        expect(page.locator("#verdict tbody tr")).to_have_count(7)
        tops = set()
        for name, label in {"truncate": "truncate", "chunk": "chunk", "stretch": "FineLIP"}.items():
            picture = page.locator(f"#compared-{name}")
            expect(picture.locator("label")).to_contain_text(label)
            expect(picture.get_by_alt_text(f"Drawn under {label}")).to_be_visible()
            tops.add(round(picture.bounding_box()["y"]))
        assert len(tops) == 1
        found = [int(text.split()[0]) for text in re.findall(r"\d of 7", page.locator("#verdict thead").inner_text())]
        assert found[2] > found[0]  # the prompt was chosen for this
        all_is_legible(page)

        # Listen: a sentence of the picture that FineLIP drew, then one that `truncate` never read.
        page.get_by_role("tab", name="Listen").click()
        sentences = page.locator("#sentences button")
        sentences.nth(2).click()
        expect(page.locator("#heard")).to_contain_text("Attention peaks")
        expect(page.locator("#heat img")).to_have_attribute("alt", re.compile("A red cross.*Attention peaks"))
        expect(sentences.nth(2)).to_have_attribute("aria-pressed", "true")
        sentences.last.scroll_into_view_if_needed()
        expect(page.locator("#heat img")).to_be_in_viewport()  # the picture stays beside what is clicked
        page.locator("#which").get_by_text("truncate").click()
        expect(sentences.last).to_be_disabled()
        expect(sentences.last).to_contain_text("never read")
        all_is_legible(page)

        # Keep: what was drawn first comes back from its PNG.
        page.get_by_role("tab", name="Kept").click()
        expect(page.locator("#kept .thumbnail-item img")).to_have_count(4)
        page.get_by_role("tab", name="Drawn").click()
        with page.expect_download() as download:
            page.locator("#drawn").get_by_label("Download").click()
        download.value.save_as(tmp_path / "drawn.png")
        type_prompt(page, "something else")
        set_number(page, "steps", "33")
        drop(page, "drawn.png", (tmp_path / "drawn.png").read_bytes(), "Everything is as it was")
        expect(page.locator("#prompt textarea")).to_have_value(prompt)
        expect(page.locator("#negative textarea")).to_have_value("blurry")
        expect(page.locator("#steps input[type=number]")).to_have_value("12")
        all_is_legible(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= VIEWPORTS[width]["width"]


def test_whatever_comes_is_answered_in_a_sentence_and_the_page_goes_on(tabs, url, tmp_path):
    with opened(tabs, url) as page:

        def refused(words: str) -> None:
            """Draw says no: in a message that goes, and in a line that stays."""
            page.locator("#draw").click()
            message = page.locator(".toast-body", has_text=words)
            expect(message).to_be_visible()
            expect(page.locator("#stage")).to_contain_text(words)
            text = message.inner_text()
            assert "Traceback" not in text and 'File "' not in text and len(text) < 400, text
            all_is_legible(page)
            message.locator(".toast-close").click()

        refused("The prompt is empty")
        type_prompt(page, "x" * 20_001)
        expect(page.locator("#meter")).to_contain_text("The prompt has 20,001 characters")
        refused("shorten it to 20,000")
        strange = "a\0b שלום עולם، مرحبا 👩‍👩‍👧 <script>alert(1)</script>"
        type_prompt(page, strange)
        expect(page.locator("#reading .read").first).to_have_text(strange.replace("\0", " "))
        for seed in ("-5", "99999999999"):
            set_number(page, "seed", seed)
            refused(f"Seed cannot be {seed}")
        set_number(page, "seed", "1")

        hostile, file = PngInfo(), tmp_path / "hostile.png"
        hostile.add_itxt(
            "settings", json.dumps({"prompt": "<img src=x onerror=alert(1)>", "model": "m", "steps": 1e9})
        )
        Image.new("RGB", (8, 8)).save(file, pnginfo=hostile)
        drop(page, "none.png", b"<html>", "This file is no PNG")
        drop(
            page, "hostile.png", file.read_bytes(), "The settings in this PNG do not hold. Steps cannot be 1000000000"
        )
        expect(page.locator("#prompt textarea")).to_have_value(strange)

        for steps, done in (("0", "1"), ("10000", "150")):  # the slider's own bounds
            set_number(page, "steps", steps)
            expect(page.locator("#steps input[type=number]")).to_have_value(done)
        for name, bound in (("steps", "steps"), ("guidance", "guidance_scale"), ("number", "num_images")):
            box = page.locator(f"#{name} input[type=number]")
            assert [int(box.get_attribute(side)) for side in ("min", "max")] == list(studio.BOUNDS[bound][:2])
        begin(page, strange, "1")
        expect(page.locator("#stage")).to_contain_text("Drawn in")


def test_two_tabs_a_place_in_line_stop_and_a_closed_tab(tabs, url, pipe):
    calls = []
    with opened(tabs, url) as second:
        with opened(tabs, url) as first:
            begin(first, example_prompts.SCENES["9 shapes"], "150")
            type_prompt(second, "A small red star.")
            set_number(second, "steps", "1")
            second.locator("#draw").click()
            place = second.locator("#stage").get_by_text("queue: 1/1")
            box, stage = (element.bounding_box() for element in (place, second.locator("#stage")))
            assert stage["y"] <= box["y"] < stage["y"] + stage["height"]  # in sight
            second.locator("#stop").click()
            expect(first.locator("#stage")).to_contain_text("step")
            first.locator("#stop").click()
            for page in (first, second):  # who only waited, when its turn comes
                expect(page.locator("#stage")).to_contain_text("Stopped.")

            set_number(first, "steps", "1")
            for page in (first, second):
                page.locator("#draw").click()
            for page, words in ((first, "nine objects"), (second, "A small red star.")):
                expect(page.locator("#stage")).to_contain_text("Drawn in")
                page.get_by_role("tab", name="Listen").click()
                expect(page.locator("#sentences")).to_contain_text(words)
            set_number(first, "number", "4")
            counting = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
            begin(first, example_prompts.SCENES["9 shapes"], "150")

        # The first tab is closed: the second is served at once, not after 600 steps.
        second.locator("#compare").click()
        expect(second.locator("#stage")).to_contain_text("Three pictures from the same noise")
        counting.remove()
        assert 3 <= len(calls) < 300


def test_every_control_has_a_name_and_the_keyboard_reaches_them_in_order(tabs, url):
    with opened(tabs, url) as page:
        nameless = page.evaluate(
            """() => [...document.querySelectorAll('input, textarea, select, button')]
                .filter(element => element.offsetParent && element.type !== 'file')
                .filter(element => !(element.labels?.length || element.getAttribute('aria-label') || element.title
                    || element.getAttribute('aria-labelledby') || element.innerText?.trim() || element.placeholder))
                .map(element => element.outerHTML.slice(0, 200))"""
        )
        assert nameless == []
        page.locator("#prompt textarea").focus()
        reached = ["prompt"]
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.closest('[id]')?.id"))
        order = ["prompt", "draw", "compare", "stop", "examples", "negative", "strategy", "weighting", "steps",
                 "guidance", "seed", "number", "keep-seed"]  # fmt: skip
        assert list(dict.fromkeys(name for name in reached if name in order)) == order


def test_a_model_that_fails_to_load_and_then_an_sdxl(tabs, stock_xl, finelip_folder):
    """What the page says while there is no model, then everything that it does, on SDXL."""
    missing = threading.Event()
    missing.set()

    def load():
        if missing.is_set():
            raise OSError("no such model\nas nowhere/nothing")
        return FineLIPStableDiffusionXLPipeline(
            **stock_xl.components, finelip=finelip_folder / "text_encoder", add_watermarker=False
        )

    demo = app.build_demo(load, name="nowhere/nothing", scenes=False)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.look())
    try:
        with opened(tabs, url) as page:
            words = "The model could not be loaded: no such model as nowhere/nothing"
            expect(page.locator("#meter")).to_have_text(words)
            type_prompt(page, "A cat.")
            page.locator("#draw").click()
            expect(page.locator("#stage")).to_contain_text(words)
            missing.clear()
            page.locator("#examples").get_by_text("Harbour at dawn").click()
            expect(page.locator("#meter")).to_contain_text("of 248: reads all")
            expect(page.locator("#reading .cut")).to_have_text("the 77-token encoder stops here")
            set_number(page, "width", "72")
            set_number(page, "height", "68")
            set_number(page, "steps", "1")
            page.locator("#draw").click()
            expect(page.locator("#stage")).to_contain_text("Height cannot be 68: choose a multiple of 8")
            set_number(page, "height", "64")
            page.locator("#compare").click()
            expect(page.locator("#stage")).to_contain_text("Three pictures from the same noise")
            expect(page.locator("#verdict")).to_have_text("")  # nobody reads these pictures
            page.get_by_role("tab", name="Listen").click()
            page.locator("#sentences button").last.click()
            expect(page.locator("#heard")).to_contain_text("and everything is in focus.")
            width, height = page.locator("#heat img").evaluate("image => [image.naturalWidth, image.naturalHeight]")
            assert width / height == 72 / 64
    finally:
        demo.close()
