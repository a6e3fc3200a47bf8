"""The page in a browser: a tab of it, what people do there, and what is wrong with what they see."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

PATIENCE = 30_000  # milliseconds for what takes a second where nothing else runs
VIEWPORTS = {
    "desktop": {"width": 1440, "height": 900},
    "tablet": {"width": 1024, "height": 768},
    "phone": {"width": 390, "height": 844},
}
AXE = Path(__file__).with_name("node_modules") / "axe-core" / "axe.min.js"

expect.set_options(timeout=PATIENCE)


@contextmanager
def opened(
    tabs: BrowserContext, url: str, width: str = "desktop", theme: str = "light", lonely: bool = False
) -> Iterator[Page]:
    """A tab of its own; nothing it shows is fetched from, or told to, anybody but the page's own server.

    Args:
        tabs: The browser of one person.
        url: The page's address.
        width: One of `VIEWPORTS`.
        theme: `"light"` or `"dark"`.
        lonely: Whether the server goes away meanwhile, which browsers report as an error.
    """
    page, hosts, troubles = tabs.new_page(), set(), []
    page.set_default_timeout(PATIENCE)
    page.set_viewport_size(VIEWPORTS[width])
    page.on("request", lambda request: hosts.add(re.sub(r"^\w+://|/.*$", "", request.url)))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    address, _, fragment = url.partition("#")
    try:
        page.goto(f"{address}?__theme={theme}" + (f"#{fragment}" if fragment else ""))
        is_ready(page)
        yield page
    finally:
        page.close()
    assert {host for host in hosts if host} == {re.sub(r"^\w+://|/.*$", "", address)}
    if lonely:
        troubles = [text for text in troubles if not re.search("net::ERR|network error|Connection errored", text)]
    assert not troubles


def is_ready(page: Page) -> None:
    """The page has been opened, or opened again."""
    page.wait_for_function("window.page?.entered()", timeout=PATIENCE)


def type_prompt(page: Page, text: str) -> None:
    page.locator("#prompt textarea").fill(text)


def set_number(page: Page, name: str, value: str) -> None:
    box = page.locator(f"#{name} input[type=number]")
    if not box.is_visible():
        page.locator("#settings button").first.click()
        expect(box).to_be_visible()
        # Gradio sets the values of what an accordion shows for the first time once more, a frame later.
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    box.fill(value)
    box.press("Tab")


def begin(page: Page, prompt: str, steps: str) -> None:
    """Draws, and waits until it is under way or done."""
    type_prompt(page, prompt)
    set_number(page, "steps", steps)
    page.locator("#draw").click()
    expect(page.locator("#shown")).to_contain_text(re.compile("step|Drawn in"))


def drop(page: Page, name: str, content: bytes, words: str, kind: str = "image/png") -> None:
    """Drops a file on the prompt, and reads what the page says of it."""
    page.evaluate(
        """([name, type, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, { type }));
            for (const event of ['dragover', 'drop']) {
                document.querySelector('#prompt textarea').dispatchEvent(
                    new DragEvent(event, { dataTransfer: data, bubbles: true, cancelable: true }));
            }
        }""",
        [name, kind, list(content)],
    )
    expect(page.locator("#told")).to_contain_text(words)


# ----------------------------------------------------------------------------------------------------- accessibility


@cache
def axe() -> str:
    """The script of axe-core, in the version of tests/package-lock.json."""
    if not AXE.exists():
        missing = "this test needs axe-core: npm ci --prefix tests --ignore-scripts"
        pytest.fail(missing) if os.environ.get("FINELIP_NEEDS_BROWSER") else pytest.skip(missing)
    return AXE.read_text(encoding="utf-8")


def is_accessible(page: Page, state: str) -> None:
    """Neither in the light on a desktop nor in the dark on a phone does axe-core find anything, nor is a text faint.

    All of axe-core's rules, and WCAG 2.2's sizes of targets, which it leaves out unless asked; once what fades or
    changes its color has done so.
    """
    if not page.evaluate("Boolean(window.axe)"):
        page.evaluate(axe())
    for theme, width in (("dark", "phone"), ("light", "desktop")):
        page.evaluate("theme => document.body.classList.toggle('dark', theme === 'dark')", theme)
        page.set_viewport_size(VIEWPORTS[width])
        found = page.evaluate(
            """async () => {
                const short = item => item.playState === 'running' && item.effect.getComputedTiming().endTime < 2000;
                for (let turn = 0, busy = [null]; busy.length && turn < 20; turn++) {  // one may start after another
                    await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
                    busy = document.getAnimations().filter(short);
                    await Promise.all(busy.map(item => item.finished.catch(() => 0)));
                }
                const rules = { 'target-size': { enabled: true } };
                const { violations } = await axe.run(document, { rules, resultTypes: ['violations'] });
                return violations.flatMap(({ id, nodes }) => nodes.map(node => `${id}: ${node.html.slice(0, 150)}`));
            }"""
        )
        found += faint_texts(page)
        assert not found, f"{state}, {theme}, {width}: {found}"


def faint_texts(page: Page) -> list[str]:
    """Every visible text whose contrast is less than the 4.5 that WCAG 2 AA asks for; disabled controls are exempt."""
    return page.evaluate(
        """() => {
            const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
            const over = (colors) => {  // colors from the ground up, as a screen shows them
                canvas.clearRect(0, 0, 1, 1);
                for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
                return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
            };
            const light = color => color.map(value => value / 255)
                .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
                .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
            const faint = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (walker.nextNode()) {
                const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
                const box = element.getBoundingClientRect(), style = getComputedStyle(element);
                if (!text || !box.width || style.visibility !== 'visible' || element.closest('script, style')
                    || element.closest(':disabled, .marks')) continue;
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
