"""The page as a person uses it: Debian's Chromium, driven by Playwright, at desktop and at phone width."""

import json
import re
import threading
from collections.abc import Iterator

import example
import example_prompts
import pytest
import results
import settings as page_settings
import take_pictures
from pages import VIEWPORTS, begin, drop, opened, set_number, type_prompt
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Browser, BrowserContext, Page, expect
from test_app_pictures import A1111, READ, exif

import app
from finelip_diffusion import FineLIPStableDiffusionXLPipeline
from finelip_diffusion.prompts import sentence_spans


@pytest.fixture(scope="module")
def url(bundled_pipe):
    demo = app.build_demo(bundled_pipe)
    _, url, public = demo.launch(prevent_thread_lock=True, quiet=True, **app.look())
    assert public is None  # no link for the whole world unless somebody asks for it
    yield url
    demo.close()


@pytest.fixture(scope="module")
def tabs(browser: Browser) -> Iterator[BrowserContext]:
    """The browser of one person, who has the page's scripts already."""
    context = browser.new_context()
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    yield context
    context.close()


@pytest.mark.parametrize(("width", "theme"), [("desktop", "light"), ("phone", "dark")])
def test_type_read_compare_listen_and_bring_back(tabs, url, bundled_pipe, width, theme, tmp_path):
    prompt = example_prompts.SCENES["7 shapes"]
    start, stop = sentence_spans(prompt)[2]
    reading = bundled_pipe.describe_prompt(prompt, "truncate").readings[0]
    with opened(tabs, url, width, theme) as page:
        # The marks in the box, and the meter, while typing.
        area = page.locator("#prompt textarea")
        type_prompt(page, "")
        area.press_sequentially("A red star.")
        expect(page.locator("#meter")).to_contain_text("6 of 77: all read")
        expect(page.locator(".marks .unread")).to_have_count(0)
        type_prompt(page, example_prompts.SCENES["9 shapes"] * 2)
        expect(page.locator("#meter")).to_contain_text("of 248: all read, in 2 windows")
        expect(page.locator(".marks .further").first).to_be_attached()
        page.locator("#examples").get_by_text("7 shapes").click()
        expect(area).to_have_value(prompt)
        expect(page.locator("#meter")).to_contain_text(f"{reading.tokens + 2} of 77: {reading.tokens - 75} unread")
        unread = page.locator(".marks .unread")
        assert prompt.endswith(unread.text_content())
        assert "underline" in unread.evaluate(
            "element => getComputedStyle(element).textDecoration"
        )  # not by color alone
        assert marks_lie_behind_the_letters(page)

        # Compare, by the keyboard: pictures side by side, what was found under each, and every object in a table.
        set_number(page, "steps", "8")
        area.press("Control+Enter")
        expect(page.locator("#shown .screen img").first).to_have_attribute("alt", re.compile(r"Preview after step"))
        expect(page.locator("#shown figure").first).to_be_in_viewport()  # on a phone it lies below the buttons
        height = page.locator("#shown .frames").bounding_box()["height"]
        expect(page.locator("#shown .headline")).to_contain_text("Drawn in")
        assert page.locator("#shown .frames").bounding_box()["height"] == height  # nothing has jumped
        expect(page.locator("#shown .verdict tbody tr")).to_have_count(8)  # 7 objects and the background
        labels = page.locator("#shown figcaption").all_text_contents()
        assert labels == ["Stable Diffusion (77 tokens)", "Windows of 77", "FineLIP (248 tokens)"]
        tops = {round(picture.bounding_box()["y"]) for picture in page.locator("#shown .screen").all()}
        assert len(tops) == 1
        found = [int(text.split()[0]) for text in re.findall(r"\d of 7", page.locator("#shown .frames").inner_text())]
        assert found[2] > found[0]  # the prompt was chosen for this
        expect(page.locator("#shown img").last).to_have_attribute(
            "alt", re.compile(r"A \w+ background with .* in the very centre")
        )
        with page.expect_download() as download:
            page.get_by_text("Save the comparison as one picture").click()
        assert Image.open(download.value.path()).size[0] > 1200

        # Listen: a sentence of the picture that FineLIP drew, then one that Stable Diffusion never read.
        page.get_by_role("tab", name="Pictures").focus()
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("tab", name="Listen")).to_be_focused()
        sentences = page.locator("#sentences button")
        sentences.nth(2).click()
        expect(page.locator("#heard")).to_contain_text("Attention peaks")
        words = re.escape(prompt[start:stop].strip())
        expect(page.locator("#heard img")).to_have_attribute("alt", re.compile(f"{words}.*Attention peaks"))
        expect(sentences.nth(2)).to_have_attribute("aria-pressed", "true")
        sentences.last.scroll_into_view_if_needed()
        expect(page.locator("#heard img")).to_be_in_viewport()  # the picture stays beside what is clicked
        page.locator("#which").get_by_text("Stable Diffusion").click()
        expect(sentences.last).to_be_disabled()
        expect(sentences.last).to_contain_text("never read")

        # History: pictures are named by the beginning of their prompt, and bring all settings back.
        page.get_by_role("tab", name="History").click()
        cards = page.locator("#kept li")
        expect(cards.first).to_contain_text(results.beginning(prompt))
        type_prompt(page, "something else")
        set_number(page, "steps", "33")
        cards.nth(1).get_by_role("button").click()
        expect(area).to_have_value(prompt)
        expect(page.locator("#steps input[type=number]")).to_have_value("8")
        expect(page.locator("#strategy input")).to_have_value("Windows of 77")
        assert page.evaluate("document.documentElement.scrollWidth") <= VIEWPORTS[width]["width"]

        # A picture that was saved comes back when it is dropped on the prompt.
        page.get_by_role("tab", name="Pictures").click()
        with page.expect_download() as download:
            page.locator("#shown a.save").first.click()
        type_prompt(page, "something else")
        drop(page, "drawn.png", download.value.path().read_bytes(), "Everything is as it was")
        expect(area).to_have_value(prompt)


def marks_lie_behind_the_letters(page: Page) -> bool:
    """The layer has the box's text, and breaks its lines where the box does."""
    return page.evaluate(
        """() => {
            const area = document.querySelector('#prompt textarea'), layer = document.querySelector('.marks');
            const fresh = layer.textContent === area.value + '\u200b';
            return fresh && Math.abs(layer.scrollHeight - area.scrollHeight) <= 2;
        }"""
    )


def test_the_first_thing_to_see_is_an_example_which_typing_replaces(browser, url):
    context = browser.new_context()
    try:
        with opened(context, url) as page:
            expect(page.locator("#shown .own")).to_contain_text("Example")
            assert page.locator("#prompt textarea").input_value() == example.PROMPT
            expect(page.locator(".marks .unread")).to_be_attached()
            expect(page.locator("#settings")).not_to_contain_text("Steps")  # closed
            assert page.locator("#shown .verdict td").all_inner_texts().count("✓ found") > 8
            for size in VIEWPORTS.values():
                page.set_viewport_size(size)
                expect(page.locator("#compare")).to_be_in_viewport(ratio=1)
                assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
                place, button = page.locator("#results").bounding_box(), page.locator("#compare").bounding_box()
                if size["width"] > 860:
                    expect(page.locator("#shown .screen").last).to_be_in_viewport(ratio=1)
                else:
                    assert 0 < place["y"] - button["y"] < 200  # directly under the buttons
            page.set_viewport_size(VIEWPORTS["desktop"])
            page.locator("#prompt textarea").click()
            page.wait_for_function("getSelection().toString().length > 100")
            page.keyboard.type("A cat on a sofa.")
            expect(page.locator("#prompt textarea")).to_have_value("A cat on a sofa.")
            expect(page.locator("#shown .other")).to_contain_text("another prompt")
            expect(page.locator("#advice .warning")).to_contain_text("this prompt names none of these shapes")
    finally:
        context.close()


def test_a_link_brings_prompt_and_settings_and_so_does_a_picture_of_another_program(tabs, url):
    prompt = "A large star, (blue:1.3) & 100% red = #7, שלום."
    with opened(tabs, url) as page:
        type_prompt(page, prompt)
        set_number(page, "seed", "77")
        expect(page.locator("#seed input")).to_have_value("77")
        page.locator("#link").click()
        expect(page.locator("#told")).to_contain_text("The link is copied")
        link = page.evaluate("navigator.clipboard.readText()")
        assert "seed=77" in link
        type_prompt(page, "something else")
    with opened(tabs, link) as page:
        expect(page.locator("#told")).to_contain_text("come from the link")
        expect(page.locator("#prompt textarea")).to_have_value(prompt)
        set_number(page, "steps", "3")
        expect(page.locator("#seed input")).to_have_value("77")
        photo = exif("JPEG", b"UNICODE\0" + A1111.encode("utf-16-be"))
        drop(page, "theirs.jpg", photo, "Read from A1111 or Forge: prompt, negative prompt, seed, steps", "image/jpeg")
        expect(page.locator("#told")).to_contain_text("Not read: sampler DPM++ 2M")
        expect(page.locator("#prompt textarea")).to_have_value(READ["prompt"])
        expect(page.locator("#negative textarea")).to_have_value(READ["negative_prompt"])
        expect(page.locator("#steps input[type=number]")).to_have_value("28")


def test_whoever_types_while_it_draws_loses_nothing(tabs, url):
    with opened(tabs, url) as page:
        begin(page, "A small red star in the very centre.", "12")
        area = page.locator("#prompt textarea")
        area.focus()
        area.press("End")
        text = " A large blue circle is in the top left corner."
        page.keyboard.type(text, delay=30)
        expect(page.locator("#shown")).to_contain_text("Drawn in")
        page.keyboard.type("!")
        expect(area).to_be_focused()
        expect(area).to_have_value("A small red star in the very centre." + text + "!")


def test_whatever_comes_is_answered_in_a_sentence_and_the_page_goes_on(tabs, url, tmp_path):
    with opened(tabs, url) as page:

        def refused(words: str) -> None:
            """Draw says no: in a message that goes, and in a line that stays; what was drawn stays, too."""
            page.locator("#draw").click()
            message = page.locator(".toast-body", has_text=words)
            expect(message).to_be_visible()
            expect(page.locator("#told")).to_contain_text(words)
            expect(page.locator("#shown img").first).to_be_visible()
            text = message.inner_text()
            assert "Traceback" not in text and 'File "' not in text and len(text) < 400, text
            message.locator(".toast-close").click()

        type_prompt(page, "")
        refused("The prompt is empty")
        type_prompt(page, "x" * 20_001)
        expect(page.locator("#meter")).to_contain_text("The prompt has 20,001 characters")
        refused("shorten it to 20,000")
        strange = "a\0b שלום עולם، مرحبا 👩‍👩‍👧 <script>alert(1)</script>"
        type_prompt(page, strange)
        expect(page.locator("#meter")).to_contain_text("of 77: all read")
        for seed in ("-5", "99999999999"):
            set_number(page, "seed", seed)
            refused(f"Seed cannot be {seed}")
        set_number(page, "seed", "1")

        hostile, file = PngInfo(), tmp_path / "hostile.png"
        hostile.add_itxt(
            "settings", json.dumps({"prompt": "<img src=x onerror=alert(1)>", "model": "m", "steps": 1e9})
        )
        Image.new("RGB", (8, 8)).save(file, pnginfo=hostile)
        drop(page, "none.png", b"<html>", "This file is not a picture")
        drop(page, "hostile.png", file.read_bytes(), "are not valid. Steps cannot be 1000000000")
        expect(page.locator("#prompt textarea")).to_have_value(strange)

        for steps, done in (("0", "1"), ("10000", "150")):  # the slider's own bounds
            set_number(page, "steps", steps)
            expect(page.locator("#steps input[type=number]")).to_have_value(done)
        for name, bound in (("steps", "steps"), ("guidance", "guidance_scale"), ("number", "num_images")):
            box = page.locator(f"#{name} input[type=number]")
            assert [int(box.get_attribute(side)) for side in ("min", "max")] == list(page_settings.BOUNDS[bound][:2])
        begin(page, strange, "1")
        expect(page.locator("#shown")).to_contain_text("Drawn in")


def test_two_tabs_a_place_in_line_stop_and_a_closed_tab(tabs, url, bundled_pipe):
    calls = []
    with opened(tabs, url) as second:
        with opened(tabs, url) as first:
            expect(first.locator("#stop")).not_to_be_visible()
            begin(first, example_prompts.SCENES["9 shapes"], "150")
            expect(first.locator("#stop")).to_be_visible()
            type_prompt(second, "A small red star.")
            set_number(second, "steps", "1")
            second.locator("#draw").click()
            expect(second.locator("#shown")).to_contain_text("Waiting: 1 before you.")
            second.locator("#stop").click()
            expect(second.locator("#shown")).to_contain_text("Stopped.")  # at once, though the first one still draws
            expect(first.locator("#shown")).to_contain_text("step")
            first.locator("#stop").click()
            expect(first.locator("#shown")).to_contain_text("Stopped.")
            for page in (first, second):
                expect(page.locator("#stop")).not_to_be_visible()

            set_number(first, "steps", "1")
            for page in (first, second):
                page.locator("#draw").click()
            for page, words in ((first, "nine"), (second, "A small red star.")):
                expect(page.locator("#shown")).to_contain_text("Drawn in")
                page.get_by_role("tab", name="Listen").click()
                expect(page.locator("#sentences")).to_contain_text(words)
            set_number(first, "number", "4")
            counting = bundled_pipe.unet.register_forward_hook(lambda *_: calls.append(1))
            begin(first, example_prompts.SCENES["9 shapes"], "150")
            expect(first.locator("#shown")).to_contain_text("step")

        # The first tab is closed: the second is served at once, not after 600 steps.
        second.locator("#compare").click()
        expect(second.locator("#shown")).to_contain_text("The same noise", timeout=90_000)  # calls are what counts
        counting.remove()
        assert 3 <= len(calls) < 300


def test_the_newest_request_of_a_window_wins(tabs, url):
    with opened(tabs, url) as page:
        begin(page, example_prompts.SCENES["9 shapes"], "150")
        type_prompt(page, "A small red star in the very centre.")
        set_number(page, "steps", "2")
        page.locator("#draw").click()
        expect(page.locator("#shown .found").first).to_contain_text("of 1 objects")  # not of the first
        expect(page.locator("#shown")).to_contain_text("Drawn in")
        expect(page.locator("#stop")).not_to_be_visible()
        page.get_by_role("tab", name="Listen").click()
        expect(page.locator("#sentences")).to_have_text("A small red star in the very centre.")


def test_the_pictures_of_the_documentation_can_be_taken_again(browser, url, tmp_path):
    take_pictures.take(browser, url, tmp_path)
    sizes = {path.stem: Image.open(path).size for path in tmp_path.glob("*.png")}
    assert set(sizes) == {"page", "listen", "dark", "phone"}
    assert sizes["page"][0] == sizes["dark"][0] == 1280
    assert sizes["phone"] == (800, 844)


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
            expect(page.locator("#told")).to_contain_text(words)
            missing.clear()
            page.locator("#examples").get_by_text("Harbour at dawn").click()
            expect(page.locator("#meter")).to_contain_text("of 248: all read")
            set_number(page, "width", "72")
            set_number(page, "height", "68")
            set_number(page, "steps", "1")
            page.locator("#draw").click()
            expect(page.locator("#told")).to_contain_text("Height cannot be 68: choose a multiple of 8")
            set_number(page, "height", "64")
            page.locator("#compare").click()
            expect(page.locator("#shown")).to_contain_text("Drawn in")
            expect(page.locator("#shown .verdict")).to_have_count(0)  # nobody reads these pictures
            page.get_by_role("tab", name="Listen").click()
            page.locator("#sentences button").last.click()
            expect(page.locator("#heard")).to_contain_text("and everything is in focus.")
            width, height = page.locator("#heard img").evaluate("image => [image.naturalWidth, image.naturalHeight]")
            assert width / height == 72 / 64
    finally:
        demo.close()
