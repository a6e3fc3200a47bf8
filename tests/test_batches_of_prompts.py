"""The batch decides nothing: a picture is the one that its prompt gets alone, from the same noise."""

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from tiny_models import pixels

from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline
from finelip_diffusion.prompts import LONG_PROMPTS


@pytest.fixture(scope="module")
def pipes(_stock, _stock_xl, encoder_folder):
    sd = FineLIPStableDiffusionPipeline(**_stock.components, finelip=encoder_folder, requires_safety_checker=False)
    xl = FineLIPStableDiffusionXLPipeline(**_stock_xl.components, finelip=encoder_folder, add_watermarker=False)
    for pipe in (sd, xl):
        pipe.set_progress_bar_config(disable=True)
    return {"sd": sd, "xl": xl}


def noise(seed, rows=1):
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize("call", [{"long_prompt": how} for how in LONG_PROMPTS] + [{"blend": 0.5}], ids=str)
def test_alone_and_beside_longer_prompts(pipes, text_of, kind, call):
    pipe, latents = pipes[kind], noise(0, 4)
    prompts, negatives = [text_of(n) for n in (100, 3, 400, 30)], ["", text_of(90), "dull", "dull"]
    batch = pixels(pipe, prompts, negative_prompt=negatives, latents=latents, **call)
    for row, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = pixels(pipe, prompt, negative_prompt=negative, latents=latents[row : row + 1], **call)
        # where two prompts have one length they are drawn together: another batch size rounds otherwise
        torch.testing.assert_close(batch[row], alone[0], rtol=0, atol=1e-4)


def test_the_noise_is_that_of_the_whole_batch(pipes, text_of):
    """One generator for all or one for each, several images a prompt, and a sampler that draws noise, too."""
    pipe, prompts = pipes["sd"], [text_of(100), "a cat", text_of(300)]
    how = {"long_prompt": "chunk", "num_images_per_prompt": 2}
    batch = pixels(pipe, prompts, seed=7, **how)
    latents = noise(7, 6)
    for row, prompt in enumerate(prompts):
        assert torch.equal(
            batch[2 * row : 2 * row + 2], pixels(pipe, prompt, latents=latents[2 * row : 2 * row + 2], **how)
        )
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    ancestral = FineLIPStableDiffusionPipeline.from_pipe(
        pipe, scheduler=EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    )
    ancestral.set_progress_bar_config(disable=True)
    batch = pixels(ancestral, prompts, generator=generators, **how)
    own = [torch.Generator().manual_seed(seed) for seed in (2, 3)]
    assert torch.equal(batch[2:4], pixels(ancestral, "a cat", generator=own, **how))


def test_sizes_outputs_and_callbacks(pipes, text_of):
    pipe, prompts, seen = pipes["xl"], [text_of(100), "a cat"], []
    how = {"long_prompt": "chunk", "num_inference_steps": 2}

    def callback(pipe, step, timestep, tensors):
        seen.append(len(tensors["latents"]))
        return tensors

    images = pipe(prompts, height=24, **how, output_type="pil", callback_on_step_end=callback).images
    assert [image.size for image in images] == [(16, 24)] * 2
    assert seen == [1] * 4  # one group after the other; under guidance the latents are not doubled here
    (latents,) = pipe(prompts, **how, output_type="latent", return_dict=False)
    assert latents.shape == (2, 4, 8, 8)
    assert pipe(prompts, **how, output_type="pt").images.shape == (2, 3, 16, 16)


def test_one_length_is_one_batch(pipes, text_of):
    pipe, calls = pipes["sd"], []
    hook = pipe.unet.register_forward_pre_hook(lambda unet, args: calls.append(len(args[0])))
    pixels(pipe, [text_of(100), text_of(120)], long_prompt="chunk")
    hook.remove()
    assert calls == [4, 4]  # two prompts under guidance, two steps
