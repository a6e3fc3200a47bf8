"""Load test of the page: with many clients at once, counts lost requests and measures time and server memory.

python benchmarks/page_load.py                                # 20 clients, 200 images of one step
python benchmarks/page_load.py --clients 4 --requests 8
python benchmarks/page_load.py --kill --window                # killed halfway, while a window is reloaded

With --kill, the server is killed with SIGKILL after half of the images and started again. A client that loses its
connection reconnects and repeats its request. With --window, a user compares images in Chromium the whole time and
reloads the page in the middle of each comparison. A comparison counts as lost if it is not there at the end. Every
error in the console is listed, except those caused by the absent server.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gradio_client import Client

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300  # seconds that anything may take
AWAY = re.compile("net::ERR|network error|Connection errored")  # what browsers say of a server that is not there


def free(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


class Server:
    """The page in a process of its own, always at the same address."""

    def __init__(self, folder: str) -> None:
        # Below those that the system gives to connections: one that a client tries while nobody listens could get it.
        self.port = next(port for port in range(20_000, 30_000) if free(port))
        self.url, self.folder = f"http://127.0.0.1:{self.port}/", folder

    def start(self) -> None:
        command = [sys.executable, "-u", str(ROOT / "app" / "app.py"), "--port", str(self.port)]
        environment = os.environ | {"GRADIO_TEMP_DIR": self.folder}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        assert self.process.stdout is not None
        next(line for line in self.process.stdout if "http://" in line)

    def resident(self) -> int:
        """Memory that it holds, in MB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def connect(url: str) -> Client:
    return Client(url, verbose=False, ssl_verify=False)


def ask(client: Client, seed: int) -> bool:
    """Draws a picture; whether the file that came back is that one."""
    prompt = f"A small red star in the very centre. {seed}"
    (file,) = client.predict(prompt=prompt, steps=1, seed=seed, api_name="/draw")
    return f'"seed": {seed}'.encode() in Path(file).read_bytes()


class Crowd:
    """Clients that ask for pictures, and ask again where the server was not there.

    Args:
        server: Draws.
        clients: How many they are.
    """

    def __init__(self, server: Server, clients: int) -> None:
        self.server, self.answered, self.again = server, 0, 0
        self.clients = [connect(server.url) for _ in range(clients)]

    def get(self, number: int, seed: int) -> bool:
        """Whether a client got its picture, at last."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                return ask(self.clients[number], seed)
            except Exception:  # whatever a client makes of a connection that is gone
                self.again += 1
                time.sleep(1)
                try:
                    self.clients[number] = connect(self.server.url)
                except Exception:
                    continue
        return False

    def ask_for(self, seeds: range) -> None:
        """All at once, each client its share."""
        many = len(self.clients)
        with ThreadPoolExecutor(many) as pool:
            shares = [pool.submit(lambda n: [self.get(n, seed) for seed in seeds[n::many]], n) for n in range(many)]
            self.answered += sum(sum(share.result()) for share in shares)


class Window(threading.Thread):
    """Somebody who compares, reloads in the middle of it, and waits for the comparison, over and over.

    Args:
        url: The page.
    """

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.over = url, threading.Event()
        self.figures: dict[str, Any] = {"comparisons": 0, "reloads": 0, "lost": 0, "errors": []}

    def run(self) -> None:
        from playwright.sync_api import expect, sync_playwright

        expect.set_options(timeout=PATIENCE * 1000)
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
            page = browser.new_page()
            page.set_default_timeout(PATIENCE * 1000)
            page.on("pageerror", lambda error: self.figures["errors"].append(str(error)))
            page.on("console", self.listen)
            page.goto(self.url)
            page.wait_for_function("window.page?.entered()")
            number = 0
            while not self.over.is_set():
                number += 1
                self.compare(page, f"A small red star in the very centre. Number {number}.")
            browser.close()

    def listen(self, message: Any) -> None:
        if message.type == "error" and not AWAY.search(message.text):
            self.figures["errors"].append(message.text)

    def compare(self, page: Any, prompt: str) -> None:
        """One comparison, which a reload interrupts; the page goes on by itself."""
        from playwright.sync_api import expect

        shown, area = page.locator("#shown"), page.locator("#prompt textarea")
        area.fill(prompt)
        page.locator("#compare").click()
        expect(page.locator("#stop")).to_be_visible()
        for _ in range(PATIENCE):
            try:
                page.reload()
                break
            except Exception:  # the server is not there
                time.sleep(1)
        self.figures["reloads"] += 1
        try:
            expect(shown).to_contain_text("Drawn in")
            page.get_by_role("tab", name="History").click()
            expect(page.locator("#kept li p")).to_contain_text([prompt] * 3)
            expect(area).to_have_value(prompt)
        except AssertionError as error:
            self.figures["lost"] += 1
            self.figures["errors"].append(str(error)[:300])
        self.figures["comparisons"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20, help="The number of clients. The default is 20.")
    parser.add_argument(
        "--requests", type=int, default=200, help="The number of requests of all clients together. The default is 200."
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="The number of rounds. The server's memory is read after each of them. The default is 2.",
    )
    parser.add_argument(
        "--kill", action="store_true", help="Whether to kill and restart the server after half of the images."
    )
    parser.add_argument(
        "--window", action="store_true", help="Whether to also compare images in a Chromium window at the same time."
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(folder)
        server.start()
        window = Window(server.url)
        try:
            crowd = Crowd(server, args.clients)
            ask(crowd.clients[0], 0)  # loads the model
            if args.window:
                window.start()
            held, began = [server.resident()], time.perf_counter()
            for part in range(args.rounds):
                seeds = range(part * args.requests // args.rounds, (part + 1) * args.requests // args.rounds)
                asking = threading.Thread(target=crowd.ask_for, args=[seeds])
                asking.start()
                if args.kill and part == args.rounds // 2:
                    time.sleep(2)
                    server.kill()
                    server.start()
                asking.join()
                held.append(server.resident())
            seconds = time.perf_counter() - began
            window.over.set()
            if args.window:
                window.join(PATIENCE)
        finally:
            server.kill()
    figures = {"clients": args.clients, "requests": args.requests, "lost": args.requests - crowd.answered}
    figures |= {"asked_again": crowd.again, "seconds": round(seconds, 1), "server_MB": held}
    if args.window:
        figures["window"] = window.figures
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
