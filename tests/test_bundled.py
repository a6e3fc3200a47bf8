"""The bundled model: what its encoders hold, what its pipelines draw, and what it weighs."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from finelip_diffusion import FineLIPStableDiffusionPipeline
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.metrics import probe_text_states
from finelip_diffusion.scenes import CELL_SIZE, COLOURS, describe, findings, read, sample_scene
from finelip_diffusion.tokenizer import clip_tokenizer

NUM_PROMPTS = 16
SETTINGS = {"num_inference_steps": 20, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipe() -> FineLIPStableDiffusionPipeline:
    pipe = FineLIPStableDiffusionPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: FineLIPStableDiffusionPipeline, captions: list[str], strategy: str) -> list:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(captions))]
    return pipe(captions, long_prompt=strategy, generator=generators, **SETTINGS).images


@pytest.fixture(scope="module")
def captions() -> list:
    return [describe(sample_scene(seed, "test", (7, 9)), seed) for seed in range(NUM_PROMPTS)]


@pytest.fixture(scope="module")
def stretched(pipe, captions) -> list:
    """What the long encoder makes of them."""
    return draw(pipe, [str(caption) for caption in captions], "stretch")


def test_it_weighs_at_most_40_megabytes_in_half_precision() -> None:
    files = [file for file in BUNDLED_MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".md"}


def test_the_base_is_a_stock_stable_diffusion() -> None:
    pipe = DiffusionPipeline.from_pretrained(BUNDLED_MODEL)
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.tokenizer.model_max_length == pipe.text_encoder.config.max_position_embeddings == 77


def test_captions_get_the_tokens_of_the_full_vocabulary() -> None:
    full = clip_tokenizer(77)
    for folder in (BUNDLED_MODEL, BUNDLED_MODEL / "finelip"):
        own = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        for seed in range(300):
            caption = str(describe(sample_scene(seed, "test", (1, 9)), seed))
            assert own.tokenize(caption) == full.tokenize(caption)


@pytest.mark.parametrize("folder", [BUNDLED_MODEL, BUNDLED_MODEL / "finelip"], ids=["stock", "long"])
def test_text_states_hold_places_and_attributes(folder) -> None:
    """A UNet cannot place what the states have forgotten. The bounds leave 300 captions room to stray."""
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").float()
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    probes = probe_text_states(encoder, tokenizer, 600)
    for name, least in {"cell": 0.8, "colour": 0.6, "shape": 0.68, "size": 0.77}.items():
        assert probes[name]["mean"] >= least, (name, probes[name])


def test_the_long_encoder_draws_what_stands_after_token_77(pipe, captions, stretched) -> None:
    """Sixteen held-out prompts: the long encoder draws what the stock window cuts off, and truncate does not."""
    recall = {}
    truncated = draw(pipe, [str(caption) for caption in captions], "truncate")
    for strategy, images in {"stretch": stretched, "truncate": truncated}.items():
        late = [
            finding.found
            for caption, image in zip(captions, images, strict=True)
            for finding in findings(caption, read(image), pipe.tokenizer)
            if finding.after
        ]
        recall[strategy] = np.mean(late)
    assert recall["stretch"] >= 0.75, recall
    assert recall["truncate"] <= 0.15, recall


def test_one_word_after_token_77_changes_the_image_in_the_right_place(pipe, captions, stretched) -> None:
    """Another color in the last sentence: the cell that the sentence names changes most; under truncate, nothing."""
    changed = []
    for caption in captions:
        fact = caption.facts[-1]
        other = next(colour for colour in COLOURS if colour != fact.object.colour and colour[0] not in "aeiou")
        changed.append(caption[: fact.start] + caption[fact.start :].replace(fact.object.colour, other))
    plain = [str(caption) for caption in captions]
    pairs = zip(stretched, draw(pipe, changed, "stretch"), strict=True)
    difference = np.stack([np.abs(np.asarray(a, float) - np.asarray(b, float)) for a, b in pairs])
    cells = difference.reshape(-1, 3, CELL_SIZE, 3, CELL_SIZE, 3).mean((2, 4, 5)).reshape(-1, 9)
    right = cells.argmax(1) == [caption.facts[-1].object.cell for caption in captions]
    assert right.mean() >= 0.8, cells.round(1)
    before, after = (draw(pipe, texts[:2], "truncate") for texts in (plain, changed))
    assert [image.tobytes() for image in before] == [image.tobytes() for image in after]
