"""The page from a program: its API, many clients at once, a full queue, and what a client cannot reach."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import png_settings
import pytest
import settings as page_settings
from gradio import analytics
from gradio_client import Client
from PIL import Image
from test_app_drawing import NAME, PROMPT

import app
from finelip_diffusion.cli import load_pipeline
from finelip_diffusion.prompts import sentence_spans
from finelip_diffusion.scenes import IMAGE_SIZE

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def page(bundled_pipe):
    demo = app.build_demo(bundled_pipe, name=NAME)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.look())
    yield url
    demo.close()


def connect(url: str) -> Client:
    return Client(url, verbose=False, ssl_verify=False)  # loading certificates would take most of the time


@pytest.fixture(scope="module")
def client(page):
    return connect(page)


def test_the_api_draws_compares_and_listens(client, bundled_pipe):
    report = client.predict(prompt=PROMPT, long_prompt="truncate", api_name="/describe")
    assert report["tokens"] > 75
    assert report["dropped"] == bundled_pipe.describe_prompt(PROMPT, "truncate").dropped
    files = client.predict(prompt=PROMPT, steps=2, seed=3, num_images=2, api_name="/draw")
    assert [png_settings.settings_of(Path(file).read_bytes())[0].seed for file in files] == [3, 4]
    files = client.predict(prompt=PROMPT, steps=2, api_name="/compare")
    assert list(files) == ["truncate", "chunk", "stretch"]
    assert all(Image.open(file).size == (IMAGE_SIZE, IMAGE_SIZE) for file in files.values())
    heard = client.predict(sentence=2, picture=2, api_name="/listen")
    assert heard["sentence"] in PROMPT
    assert np.asarray(heard["attention"]).shape == (IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"prompt": " ", "api_name": "/draw"}, "The prompt is empty"),
        ({"prompt": "x", "steps": 0, "api_name": "/draw"}, "Steps cannot be 0"),
        ({"prompt": "x", "seed": -4, "api_name": "/compare"}, "Seed cannot be -4"),
        ({"prompt": "x", "width": 512, "api_name": "/draw"}, f"{IMAGE_SIZE} x {IMAGE_SIZE} pixels alone"),
        ({"prompt": "x", "long_prompt": "../../etc", "api_name": "/describe"}, "long_prompt='../../etc' is unknown"),
        ({"sentence": 0, "picture": 99, "api_name": "/listen"}, "There is no picture 99"),
    ],
    ids=str,
)
def test_the_api_refuses_in_one_sentence(client, call, words):
    with pytest.raises(Exception) as caught:
        client.predict(**call)
    assert words in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_the_api_has_four_names_and_no_way_around_the_queue(client):
    names = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(names) == {"/describe", "/draw", "/compare", "/listen"}
    parameters = [parameter["parameter_name"] for parameter in names["/draw"]["parameters"]]
    assert parameters == ["prompt", *list(page_settings.as_record(page_settings.Settings("x")))[1:]]


def test_no_file_of_the_server_is_served_or_taken_in(page, client, capfd):
    """Neither by its address, nor as the file that somebody claims to have dropped."""
    (drop,) = [event["id"] for event in client.config["dependencies"] if "upload" in str(event["targets"])]
    for path in (ROOT / "README.md", ROOT / "app" / "app.py", "/etc/passwd"):
        with pytest.raises(HTTPError, match="403"):
            urlopen(f"{page}gradio_api/file={path}")
        data = [{"path": str(path), "meta": {"_type": "gradio.FileData"}}]
        asked = json.dumps({"data": data, "fn_index": drop, "session_hash": "anybody"}).encode()
        with pytest.raises(HTTPError, match="500"):
            urlopen(Request(f"{page}gradio_api/run/predict", asked, {"Content-Type": "application/json"}))
        assert "not uploaded by a user" in capfd.readouterr().err


def test_two_clients_hear_their_own_pictures(page, client):
    client.predict(prompt="A red star. " + PROMPT, steps=1, api_name="/draw")
    other = connect(page)
    with pytest.raises(Exception, match="this client's last drawing has 0"):
        other.predict(sentence=0, api_name="/listen")
    assert client.predict(sentence=0, api_name="/listen")["sentence"] == "A red star."


def test_many_clients_at_once_lose_nothing(page):
    """As the script does that measured 20 clients and 1,800 requests for docs/app.md."""
    spec = importlib.util.spec_from_file_location("page_load", ROOT / "benchmarks" / "page_load.py")
    page_load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page_load)
    clients = [connect(page) for _ in range(20)]
    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(lambda seed: page_load.ask(clients[seed % 20], seed), range(20)))
    assert not page_load.ask(Other(clients[0]), 7)


class Other:
    """A client whose pictures are those of the next seed."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def predict(self, *, seed: int, **call):
        return self.client.predict(seed=seed + 1, **call)


def test_a_full_queue_says_so(bundled_pipe):
    demo = app.build_demo(bundled_pipe, max_queue=1)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.look())
    try:
        client = connect(url)
        jobs = [client.submit(prompt=PROMPT, steps=10, api_name="/draw") for _ in range(6)]
        words = [str(error) for error in (job.exception() for job in jobs) if error is not None]
        assert 0 < len(words) < 6
        assert all("The line is full: 1 requests wait already" in word for word in words)
    finally:
        demo.close()


def test_building_a_page_loads_nothing_and_tells_nobody():
    demo = app.build_demo(lambda: 1 / 0)
    assert not demo.analytics_enabled
    assert not analytics.analytics_enabled()


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """The Space in a folder of its own."""
    subprocess.run(["make", "space"], cwd=ROOT, check=True, capture_output=True)
    return shutil.move(ROOT / "build" / "space", tmp_path_factory.mktemp("space") / "space")


def test_a_space_is_complete(space):
    front = (space / "README.md").read_text().split("---")[1]
    assert "sdk: gradio" in front
    assert "app_file: app.py" in front
    project = (ROOT / "pyproject.toml").read_text()
    declared = project.split("\ndependencies = [")[1].split("]")[0].replace('"', "").replace(",", "").split()
    declared += [part.strip().strip('"') for part in project.split("\napp = [")[1].split("]")[0].split(",")]
    declared = [part for part in declared if not part.startswith("gradio")]  # a Space has it
    assert (space / "requirements.txt").read_text().split() == declared


def check_a_model_of_folders(url: str, model: Path) -> None:
    """Counting, drawing at a size of one's own, and listening to the last sentence."""
    client = connect(url)
    report = client.predict(prompt=PROMPT, api_name="/describe")
    assert (report["tokens"] > 75, report["dropped"]) == (True, "")
    (file,) = client.predict(prompt=PROMPT, steps=1, width=64, height=72, api_name="/draw")
    settings, name = png_settings.settings_of(Path(file).read_bytes())
    assert (settings.width, settings.height, name) == (64, 72, str(model))
    last = len(sentence_spans(PROMPT)) - 1
    assert np.shape(client.predict(sentence=last, api_name="/listen")["attention"]) == (72, 64)


def test_an_sdxl_of_the_command_line_as_a_user_starts_it(space, stable_diffusion_xl_folder, finelip_folder):
    """In the Space, whose package is the one beside the page."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "GRADIO_SERVER_PORT")}
    command = [sys.executable, "-u", "app.py", "--model", str(stable_diffusion_xl_folder)]
    command += ["--finelip", str(finelip_folder / "text_encoder")]
    with subprocess.Popen(command, cwd=space, env=environment, text=True, stdout=subprocess.PIPE) as server:
        try:
            url = next(match[0] for line in server.stdout if (match := re.search(r"http://\S+", line)))
            check_a_model_of_folders(url, stable_diffusion_xl_folder)
        finally:
            server.terminate()


def test_a_stable_diffusion_of_folders(stable_diffusion_folder, finelip_folder):
    demo = app.build_demo(
        lambda: load_pipeline(str(stable_diffusion_folder), str(finelip_folder)),
        name=str(stable_diffusion_folder),
        scenes=False,
    )
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.look())
    try:
        check_a_model_of_folders(url, stable_diffusion_folder)
    finally:
        demo.close()


def test_the_example_of_the_documentation_runs(page, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "app.md").read_text(encoding="utf-8")
    code = text.split("from gradio_client import Client", 1)[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(
        "from gradio_client import Client" + code.replace("http://127.0.0.1:7860", page).replace("steps=20", "steps=1")
    )
