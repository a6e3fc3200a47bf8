"""Whether everybody can use the page: axe-core in every state and both themes, names, the keyboard, sizes."""

import re
from collections.abc import Iterator

import example_prompts
import pytest
from pages import axe, begin, drop, is_accessible, opened, set_number, type_prompt
from playwright.sync_api import Browser, BrowserContext, expect
from test_app_pictures import A1111, png

import app


@pytest.fixture(scope="module")
def url(bundled_pipe):
    demo = app.build_demo(bundled_pipe)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.look())
    yield url
    demo.close()


@pytest.fixture(scope="module")
def tabs(browser: Browser) -> Iterator[BrowserContext]:
    axe()
    context = browser.new_context()
    yield context
    context.close()


def test_axe_finds_nothing_in_any_state(tabs, url):
    with opened(tabs, url) as page:
        expect(page.locator("#meter")).to_contain_text("unread")
        is_accessible(page, "the first thing to see")
        type_prompt(page, "A cat on a sofa.")
        expect(page.locator("#advice .warning")).to_be_visible()
        set_number(page, "steps", "100")
        is_accessible(page, "settings, and a prompt that the model cannot draw")
        page.locator("#strategy input").click()
        expect(page.get_by_role("option").first).to_be_visible()
        is_accessible(page, "a choice")
        page.keyboard.press("Escape")
        begin(page, example_prompts.SCENES["7 shapes"], "150")
        is_accessible(page, "drawing")
        with opened(tabs, url) as second:
            begin_waiting(second)
            is_accessible(second, "waiting")
        page.locator("#stop").click()
        expect(page.locator("#shown")).to_contain_text("Stopped.")
        is_accessible(page, "stopped")
        set_number(page, "steps", "1")
        page.locator("#compare").click()
        expect(page.locator("#shown")).to_contain_text("Drawn in")
        is_accessible(page, "compared")
        page.get_by_role("tab", name="Listen").click()
        page.locator("#sentences button").nth(2).click()
        expect(page.locator("#heard")).to_contain_text("Attention peaks")
        is_accessible(page, "heard")
        page.locator("#which").get_by_text("Stable Diffusion").click()
        expect(page.locator("#sentences button").last).to_be_disabled()
        is_accessible(page, "sentences that were never read")
        page.get_by_role("tab", name="History").click()
        expect(page.locator("#kept li").first).to_be_visible()
        is_accessible(page, "history")
        drop(page, "theirs.png", png(parameters=A1111), "Read from A1111 or Forge")
        is_accessible(page, "a picture from elsewhere")
        type_prompt(page, "")
        page.locator("#draw").click()
        expect(page.locator(".toast-body")).to_contain_text("The prompt is empty")
        is_accessible(page, "refused")


def begin_waiting(page) -> None:
    page.locator("#draw").click()
    expect(page.locator("#shown .screen").first).to_contain_text("Waiting: 1 before you")


def test_axe_finds_what_is_wrong(tabs, url):
    """Were the script not the real one, nothing would."""
    with opened(tabs, url) as page:
        page.evaluate("document.querySelector('#shown img').removeAttribute('alt')")
        with pytest.raises(AssertionError, match="image-alt"):
            is_accessible(page, "a picture without a name")


def test_every_control_has_a_name_of_its_own_and_the_keyboard_reaches_it_in_order(tabs, url):
    with opened(tabs, url) as page:
        page.locator("#settings button").first.click()
        expect(page.locator("#keep-seed")).to_be_visible()
        controls = page.evaluate(
            """() => [...document.querySelectorAll('input, textarea, button, a[href]')]
                .filter(element => element.offsetParent && element.type !== 'file' && element.offsetHeight > 1)
                .map(element => [element.getAttribute('aria-label') || element.labels?.[0]?.innerText.trim()
                    || element.innerText?.trim() || '', element.type, element.getBoundingClientRect().height])"""
        )
        names = [(name, kind) for name, kind, _ in controls]
        assert all(name for name, _ in names), names
        assert len(set(names)) == len(names), names
        assert [(name, height) for name, _, height in controls if height < 24] == []
        page.locator("#prompt textarea").focus()
        reached = ["prompt"]
        for _ in range(60):
            page.keyboard.press("Tab")
            at, outline = page.evaluate(
                """() => {
                    const element = document.activeElement;
                    return [element.closest('[id]')?.id, getComputedStyle(element).outlineStyle];
                }"""
            )
            reached.append(at)
            assert outline == "solid" or at is None, at  # the focus is visible
        order = ["prompt", "compare", "draw", "examples", "file", "link", "settings", "negative", "strategy",
                 "weighting", "steps", "guidance", "seed", "number", "keep-seed"]  # fmt: skip
        assert list(dict.fromkeys(name for name in reached if name in order)) == order
        page.get_by_role("tab", name="Pictures").focus()
        keys = {"ArrowLeft": "History", "Home": "Pictures", "ArrowRight": "Listen", "End": "History"}
        for key, name in keys.items():
            page.keyboard.press(key)
            tab = page.get_by_role("tab", name=name)
            expect(tab).to_be_focused()
            expect(tab).to_have_attribute("aria-selected", re.compile("true"))
