"""Tiny pipelines of real classes with random weights and a fixed seed, with CLIP's real tokenizer."""

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finelip_diffusion.tokenizer import VOCAB_SIZE, clip_tokenizer

WIDTH, LAYERS = 32, 4


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Here and in the processes that tests start: sums over several threads may round otherwise."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


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


def tiny_text_encoder(
    seed: int,
    width: int = WIDTH,
    positions: int = 77,
    projection: bool = False,
    num_hidden_layers: int = LAYERS,
    hidden_act: str = "quick_gelu",
) -> CLIPTextModel | CLIPTextModelWithProjection:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=num_hidden_layers,
        hidden_act=hidden_act,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=VOCAB_SIZE - 2,
        eos_token_id=VOCAB_SIZE - 1,
        initializer_factor=5.0,  # states that differ visibly from token to token
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def tiny_unet(seed: int, cross_attention_dim: int = WIDTH, **config: object) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        **config,
    ).eval()


def tiny_vae(seed: int) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
    ).eval()


def tiny_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def make_stable_diffusion() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(0),
        text_encoder=tiny_text_encoder(1),
        tokenizer=clip_tokenizer(77),
        unet=tiny_unet(2),
        scheduler=tiny_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_stable_diffusion_xl(second_width: int = WIDTH) -> StableDiffusionXLPipeline:
    unet = tiny_unet(
        2,
        cross_attention_dim=WIDTH + second_width,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + second_width,
    )
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(0),
        text_encoder=tiny_text_encoder(1),
        text_encoder_2=tiny_text_encoder(3, width=second_width, projection=True),
        tokenizer=clip_tokenizer(77),
        tokenizer_2=clip_tokenizer(77, pad_token="!"),
        unet=unet,
        scheduler=tiny_scheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(
    pipe: Any, prompt: str | list[str] | None = None, seed: int = 0, steps: int = 2, **kwargs: Any
) -> torch.Tensor:
    """(N, H, W, 3): what a pipeline draws from the noise of a seed."""
    kwargs = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed), **kwargs}
    return torch.from_numpy(np.asarray(pipe(prompt, output_type="np", **kwargs).images))


@pytest.fixture(scope="session")
def stable_diffusion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stable_diffusion")
    make_stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stable_diffusion_xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stable_diffusion_xl")
    make_stable_diffusion_xl().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A "trained" long encoder: other weights than the base's."""
    folder = tmp_path_factory.mktemp("encoder")
    tiny_text_encoder(7, positions=248).save_pretrained(folder / "text_encoder")
    clip_tokenizer(248).save_pretrained(folder / "tokenizer")
    return folder


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
