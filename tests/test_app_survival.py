"""What outlives a reload, and a server that is killed and comes back: prompt, settings, pictures, and the drawing."""

import random
import re
import signal
import socket
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import example_prompts
import pytest
import scripts
from pages import begin, is_ready, opened, set_number, type_prompt
from playwright.sync_api import expect

APP = Path(__file__).resolve().parents[1] / "app" / "app.py"


@pytest.fixture
def port() -> int:
    """Below those that the system gives to connections: one that is tried while nobody listens could get it."""
    while True:
        number = random.randrange(20_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", number)):
                return number


class Server:
    """The page as its script opens it, which is killed and started again."""

    def __init__(self, port: int, folder: Path) -> None:
        self.port, self.folder = port, folder
        self.url = f"http://127.0.0.1:{port}/"

    def start(self) -> None:
        self.process = scripts.start(APP, "--port", self.port, before=Keeping(self.folder))
        for _ in range(600):
            try:
                urlopen(self.url).close()
                return
            except URLError:
                time.sleep(0.1)
        raise TimeoutError("The page was not there after a minute.")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL


class Keeping:
    """Called in the new process: pictures lie in a folder of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> None:
        import os

        os.environ["GRADIO_TEMP_DIR"] = str(self.folder)


def test_a_reload_and_a_killed_server_lose_nothing(browser, port, tmp_path):
    server, context = Server(port, tmp_path), browser.new_context()
    server.start()
    try:
        with opened(context, server.url, lonely=True) as page:
            area, shown = page.locator("#prompt textarea"), page.locator("#shown")
            begin(page, "A small red star in the very centre.", "2")
            expect(shown).to_contain_text("Drawn in")
            picture = page.locator("#shown img").get_attribute("src")

            page.reload()
            is_ready(page)
            expect(page.locator("#shown img")).to_have_attribute("src", picture)
            expect(area).to_have_value("A small red star in the very centre.")
            page.locator("#settings button").first.click()
            expect(page.locator("#steps input[type=number]")).to_have_value("2")
            page.get_by_role("tab", name="Listen").click()
            expect(page.locator("#sentences")).to_contain_text("A small red star")

            # Loaded again while it draws the second of three, then killed; meanwhile somebody goes on typing.
            type_prompt(page, example_prompts.SCENES["4 shapes"])
            set_number(page, "steps", "50")
            page.locator("#compare").click()
            expect(shown).to_contain_text("Drawing 2 of 3")
            page.reload()
            is_ready(page)
            expect(shown).to_contain_text("Drawing 1 of 3")
            server.kill()
            expect(page.locator(".toast-body")).to_contain_text("Attempting reconnection")
            area.press("End")
            area.press_sequentially(" And a hat.")
            page.evaluate("window.before = true")
            server.start()
            page.wait_for_function("!window.before && window.page?.entered()")
            expect(shown).to_contain_text(re.compile("step [1-9]"))  # it goes on by itself
            expect(area).to_have_value(example_prompts.SCENES["4 shapes"] + " And a hat.")
            expect(area).to_be_focused()
            page.locator("#stop").click()
            expect(shown).to_contain_text("Stopped.")
            page.get_by_role("tab", name="History").click()
            first = page.locator("#kept li").last  # the server before drew it
            first.scroll_into_view_if_needed()
            page.wait_for_function("document.querySelector('#kept li:last-child img').naturalWidth")
            first.get_by_role("button").click()
            expect(area).to_have_value("A small red star in the very centre.")
    finally:
        server.process.kill()
        context.close()
