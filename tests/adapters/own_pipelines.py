"""Pipelines over models that may be changed, and what they make of a prompt."""

import copy
from functools import partial

import tiny_models
import torch
from torch import nn

DEVICE = torch.device("cpu")
pixels = partial(tiny_models.pixels, steps=1)


def embed(pipe, prompt, negative_prompt=None, **kwargs):
    return pipe.encode_prompt(prompt, device=DEVICE, num_images_per_prompt=1, do_classifier_free_guidance=True,
                              negative_prompt=negative_prompt, **kwargs)  # fmt: skip


def own(pipe):
    """The same pipeline over models that may be changed; tokenizers take longest to copy, and are shared."""
    parts = {n: copy.deepcopy(part) if isinstance(part, nn.Module) else part for n, part in pipe.components.items()}
    mine = built(type(pipe), parts)
    if hasattr(pipe, "prompt_settings"):
        mine.prompt_settings = pipe.prompt_settings
    return mine


def with_own_tokenizers(pipe):
    pipe.register_modules(**{n: copy.deepcopy(part) for n, part in pipe.components.items() if "tokenizer" in n})
    return pipe


def built(kind, parts):
    extra = {"add_watermarker": False} if "text_encoder_2" in parts else {"requires_safety_checker": False}
    pipe = kind(**parts, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def last_states(text_encoder, tokenizer, prompt):
    input_ids = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        return text_encoder(input_ids).last_hidden_state
