"""A tiny encoder in a pipeline's folder, as published."""

import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
)

from finelip_diffusion.tokenizer import clip_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer(77)


@pytest.fixture(scope="module")
def stock(tmp_path_factory, tokenizer):
    """A tiny text encoder in a pipeline's folder, as published: 77 rows, eos id 2."""
    folder = tmp_path_factory.mktemp("stock")
    config = CLIPTextConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=64,
        bos_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder
