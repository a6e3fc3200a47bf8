"""Many people at the page at once: what is lost, how long it takes, and what the server's memory does.

python benchmarks/page_load.py                                # 20 clients, 200 pictures of one step
python benchmarks/page_load.py --clients 4 --requests 8
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gradio_client import Client

ROOT = Path(__file__).resolve().parents[1]


def resident(process: subprocess.Popen) -> float:
    """Memory that a process holds, in MB."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def ask(client: Client, seed: int) -> bool:
    """Draws a picture; whether the file that came back is that one."""
    prompt = f"A small red star in the very centre. {seed}"
    (file,) = client.predict(prompt=prompt, steps=1, seed=seed, api_name="/draw")
    return f'"seed": {seed}'.encode() in Path(file).read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--requests", type=int, default=200, help="of all clients together")
    parser.add_argument("--rounds", type=int, default=2, help="memory is read after each of them")
    args = parser.parse_args()
    command = [sys.executable, "-u", str(ROOT / "app" / "app.py")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        found = next(match for line in server.stdout if (match := re.search(r"http://\S+", line)))
        clients = [Client(found[0], verbose=False, ssl_verify=False) for _ in range(args.clients)]
        ask(clients[0], 0)  # loads the model
        held, answered, began = [resident(server)], 0, time.perf_counter()
        with ThreadPoolExecutor(args.clients) as pool:
            for part in range(args.rounds):
                seeds = range(part * args.requests // args.rounds, (part + 1) * args.requests // args.rounds)
                answered += sum(pool.map(lambda seed: ask(clients[seed % args.clients], seed), seeds))
                held.append(resident(server))
        seconds = time.perf_counter() - began
    finally:
        server.terminate()
        server.wait()
    figures = {"clients": args.clients, "requests": args.requests, "lost": args.requests - answered}
    figures |= {"seconds": round(seconds, 1), "server_MB": [round(size) for size in held]}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
