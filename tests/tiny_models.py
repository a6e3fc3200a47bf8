"""Tiny models of real classes with random weights and a fixed seed, and the pipelines that are made of them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finelip_diffusion.tokenizer import VOCAB_SIZE, clip_tokenizer

WIDTH, LAYERS = 32, 4


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


def as_published(folder: Path) -> Path:
    """Leaves a folder's tokenizers as Stable Diffusion has its own: `vocab.json` and `merges.txt`, which are read in a
    fifth of the time that `tokenizer.json` takes."""
    for file in folder.rglob("tokenizer.json"):
        Tokenizer.from_file(str(file)).model.save(str(file.parent))
        file.unlink()
    return folder


def pixels(
    pipe: Any, prompt: str | list[str] | None = None, seed: int = 0, steps: int = 2, **kwargs: Any
) -> torch.Tensor:
    """(N, H, W, 3): what a pipeline draws from the noise of a seed."""
    kwargs = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed), **kwargs}
    return torch.from_numpy(np.asarray(pipe(prompt, output_type="np", **kwargs).images))
