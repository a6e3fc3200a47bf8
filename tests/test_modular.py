"""The modular block against the pipeline of the same kind, at tiny size."""

from pathlib import Path

import pytest
import torch
from diffusers import ClassifierFreeGuidance, ModularPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks

from finelip_diffusion import FineLIPStableDiffusionXLPipeline
from finelip_diffusion.modular import FineLIPStableDiffusionXLTextEncoderStep
from finelip_diffusion.prompts import LONG_PROMPTS

ROOT = Path(__file__).resolve().parents[1]
GUIDANCE = 5.0


@pytest.fixture(scope="module")
def pipe(_stock_xl, encoder_folder):
    pipe = FineLIPStableDiffusionXLPipeline(**_stock_xl.components, finelip=encoder_folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modular(pipe, block):
    blocks = StableDiffusionXLAutoBlocks()
    blocks.sub_blocks["text_encoder"] = block
    made = blocks.init_pipeline()
    parts = {name: part for name, part in pipe.components.items() if part is not None and name in made.component_names}
    made.update_components(**parts, guider=ClassifierFreeGuidance(guidance_scale=GUIDANCE))
    made.set_progress_bar_config(disable=True)
    return made


def draw(made, prompt, **call):
    call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np", **call}
    return torch.from_numpy(made(prompt=prompt, **call))


def expected(pipe, prompt, **call):
    call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np", **call}
    return torch.from_numpy(pipe(prompt, guidance_scale=GUIDANCE, **call).images)


@pytest.fixture(scope="module")
def made(pipe):
    return modular(pipe, FineLIPStableDiffusionXLTextEncoderStep())


CALLS = [{"long_prompt": how} for how in LONG_PROMPTS]
CALLS += [{}, {"weighting": "a1111", "negative_prompt": "(dull:1.3)"}, {"blend": 0.5}, {"clip_skip": 1}]
CALLS += [{"prompt_2": "two dogs"}]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_modular_pipeline_draws_what_the_pipeline_draws(made, pipe, text_of, call):
    prompt = text_of(100) + " a (crown:1.4)"
    # the guider asks the UNet for one side after the other, the pipeline for both at once
    torch.testing.assert_close(
        draw(made, prompt, output="images", **call), expected(pipe, prompt, **call), rtol=0, atol=1e-5
    )


def test_a_word_after_token_77_counts(made, text_of):
    images = [draw(made, text_of(100) + ending, output="images") for ending in (" a crown", " a candle")]
    assert not torch.equal(*images)


def test_the_block_comes_out_of_its_folder(pipe, made, text_of, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    folder = ROOT / "pipelines" / "finelip_sdxl_text_encoder"
    block = ModularPipelineBlocks.from_pretrained(str(folder), trust_remote_code=True)
    assert type(block).__name__ == "FineLIPStableDiffusionXLTextEncoderStep"
    again = modular(pipe, block)
    assert torch.equal(draw(again, text_of(120), output="images"), draw(made, text_of(120), output="images"))
