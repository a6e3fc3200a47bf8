"""What many tests share: tiny pipelines with CLIP's real tokenizer, prompts of a given length, a browser."""

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Here and in the processes that tests start: sums over several threads may round otherwise, and two workers share two
# cores, where threads that wait for each other take many times as long. numpy looks once, when it is imported.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from tiny_models import as_published, make_stable_diffusion, make_stable_diffusion_xl, tiny_text_encoder, tiny_unet
from transformers import CLIPTokenizer

from finelip_diffusion.tokenizer import clip_tokenizer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests get the markers that what they use says: `-m "not browser and not script"` leaves both out."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
        if hasattr(getattr(item, "module", None), "scripts"):
            item.add_marker("script")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Whatever imported torch before this file."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright. Where there is none, tests are skipped; in `.ci/run` they fail."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        missing = "this test drives a real browser: apt install chromium"
        pytest.fail(missing) if os.environ.get("FINELIP_NEEDS_BROWSER") else pytest.skip(missing)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=chromium, args=flags) as driver:
        yield driver


@pytest.fixture(scope="session")
def bundled_pipe() -> Any:
    """The bundled model; tests share it and leave it as it is."""
    from finelip_diffusion import FineLIPStableDiffusionPipeline

    pipe = FineLIPStableDiffusionPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def room(bundled_pipe: Any) -> Any:
    """The page's studio, with the bundled model."""
    import studio

    return studio.Studio(lambda: bundled_pipe, scenes=True)


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    """CLIP's own, with the stock window of 77 tokens."""
    return clip_tokenizer(77)


@pytest.fixture(scope="session")
def text_of(tokenizer: CLIPTokenizer) -> Callable[[int], str]:
    """Makes a prompt of exactly n tokens, in sentences of twelve."""

    def make(n: int) -> str:
        words = ["red", "cat", "under", "a", "green", "tree", "beside", "two", "blue", "dogs", "asleep"]
        tokens = [*words, "."]
        text = " ".join(tokens[i % 12] for i in range(n)).replace(" .", ".")
        assert len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) == n
        return text

    return make


@pytest.fixture(scope="session")
def stable_diffusion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stable_diffusion")
    make_stable_diffusion().save_pretrained(folder)
    return as_published(folder)


@pytest.fixture(scope="session")
def stable_diffusion_xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stable_diffusion_xl")
    make_stable_diffusion_xl().save_pretrained(folder)
    return as_published(folder)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A "trained" long encoder: other weights than the base's."""
    folder = tmp_path_factory.mktemp("encoder")
    tiny_text_encoder(7, positions=248).save_pretrained(folder / "text_encoder")
    clip_tokenizer(248).save_pretrained(folder / "tokenizer")
    return as_published(folder)


@pytest.fixture(scope="session")
def finelip_folder(encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with a UNet adapted to it."""
    folder = tmp_path_factory.mktemp("finelip")
    shutil.copytree(encoder_folder, folder, dirs_exist_ok=True)
    tiny_unet(8).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="session")
def _stock() -> StableDiffusionPipeline:
    return make_stable_diffusion()


@pytest.fixture(scope="session")
def _stock_xl() -> StableDiffusionXLPipeline:
    return make_stable_diffusion_xl()


@pytest.fixture
def stock(_stock: StableDiffusionPipeline) -> Iterator[StableDiffusionPipeline]:
    """diffusers' own pipeline; its weights are shared by the tests and must be left as they are."""
    yield copy.copy(_stock)


@pytest.fixture
def stock_xl(_stock_xl: StableDiffusionXLPipeline) -> Iterator[StableDiffusionXLPipeline]:
    yield copy.copy(_stock_xl)
