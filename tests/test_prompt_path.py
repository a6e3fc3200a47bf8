"""Encode first, then draw: signatures, threads, the default strategy, and what is parsed how often."""

import copy
import inspect
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from tiny_models import WIDTH, pixels, tiny_text_encoder

from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline, attach, prompt_encoder
from finelip_diffusion.prompts import LONG_PROMPTS, PromptSettings
from finelip_diffusion.tokenizer import clip_tokenizer

CPU = torch.device("cpu")
OURS = {"long_prompt", "weighting", "blend"}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def _pipe(_stock, finelip_folder):
    return quiet(
        FineLIPStableDiffusionPipeline(**_stock.components, finelip=finelip_folder, requires_safety_checker=False)
    )


@pytest.fixture
def pipe(_pipe):
    return copy.copy(_pipe)


@pytest.fixture(scope="module")
def pipe_xl(_stock_xl, encoder_folder):
    return quiet(
        FineLIPStableDiffusionXLPipeline(**_stock_xl.components, finelip=encoder_folder, add_watermarker=False)
    )


def encode(pipe, prompt, **kwargs):
    return pipe.encode_prompt(prompt, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False, **kwargs)


# Settings


def test_settings_are_frozen_and_checked_where_they_are_made():
    settings = PromptSettings()
    with pytest.raises(FrozenInstanceError):
        settings.blend = 0.5
    assert settings.but(blend=None, weighting=None) is settings
    assert settings.but(weighting="a1111") == PromptSettings(weighting="a1111")
    for wrong in (
        {"long_prompt": "fold"},
        {"weighting": "comfy"},
        {"second_encoder": "fold"},
        {"hidden_state": "first"},
    ):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name}='{wrong[name]}' is unknown: choose from"):
            PromptSettings(**wrong)
    with pytest.raises(ValueError, match="blend=-0.1 is not a share"):
        settings.but(blend=-0.1)


@pytest.mark.parametrize("how", ["truncate", "chunk", "segment"])
def test_a_blend_is_refused_by_one_rule(_stock, finelip_folder, stable_diffusion_folder, how):
    """In a call, as an attribute, at loading, and through `attach`."""
    message = f"blend=0.5 mixes .* but long_prompt='{how}' reads with the stock encoder alone: set blend=1"
    with pytest.raises(ValueError, match=message):
        FineLIPStableDiffusionPipeline.from_pretrained(
            stable_diffusion_folder, finelip_folder, long_prompt=how, blend=0.5
        )
    with pytest.raises(ValueError, match=message):
        attach(StableDiffusionImg2ImgPipeline.from_pipe(_stock), finelip_folder, long_prompt=how, blend=0.5)
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, finelip_folder, blend=0.5)
    for act in (
        lambda: pipe("a cat", long_prompt=how),
        lambda: pipe.encode("a cat", long_prompt=how),
        lambda: pipe.describe_prompt("a cat", how),
        lambda: setattr(pipe, "long_prompt", how),
    ):
        with pytest.raises(ValueError, match=message):
            act()
    pipe.blend = 1
    pipe.long_prompt = how
    with pytest.raises(ValueError, match=message):
        pipe.blend = 0.5
    assert (pipe.long_prompt, pipe.blend) == (how, 1)


# The default is the best that the loaded parts can do


def test_without_a_trained_encoder_prompts_are_read_in_chunks(stable_diffusion_folder, stock, text_of, caplog):
    with caplog.at_level(logging.WARNING, logger="finelip_diffusion"):
        pipe = quiet(FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder))
        image = pixels(pipe, text_of(120))
    assert not caplog.messages
    assert pipe.long_prompt == "chunk"
    assert pipe.text_encoder.config.max_position_embeddings == pipe.tokenizer.model_max_length == 77
    assert pipe.stock_text_encoder is None  # nothing twice in memory
    assert torch.equal(image, pixels(pipe, text_of(120), long_prompt="chunk"))
    assert not torch.equal(image, pixels(pipe, text_of(120), long_prompt="truncate"))
    assert "long_prompt='chunk' (the default without a trained long encoder)" in str(pipe.describe_prompt("a cat"))
    assert torch.equal(pixels(pipe, "a cat", long_prompt="auto"), pixels(pipe, "a cat", long_prompt="truncate"))
    assert torch.equal(pixels(pipe, text_of(120), long_prompt="auto"), image)


def test_a_call_may_ask_for_stretching_without_training(stable_diffusion_folder, text_of, caplog):
    plain = quiet(FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder))
    asked = quiet(FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, long_prompt="stretch"))
    assert asked.text_encoder.config.max_position_embeddings == 248
    for call in ({}, {"weighting": "a1111"}, {"blend": 0.5}):
        prompt = text_of(120) + " a (crown:1.3)"
        with caplog.at_level(logging.WARNING, logger="finelip_diffusion"):
            image = pixels(plain, prompt, long_prompt="stretch", **call)
        assert "without training" in caplog.text
        # weights in a mapped file lie at other addresses, and the kernels for them may round the last bit otherwise
        torch.testing.assert_close(image, pixels(asked, prompt, **call), rtol=0, atol=1e-5)
    assert plain.text_encoder.config.max_position_embeddings == 77  # a copy, for that call
    plain.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="which is offloaded: load the pipeline with long_prompt='stretch'"):
        plain("a cat", long_prompt="stretch")


def test_an_encoder_that_was_saved_untrained_is_still_untrained(stable_diffusion_folder, tmp_path):
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, long_prompt="stretch")
    pipe.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.float16):
        again = FineLIPStableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
        assert again.text_encoder.config.max_position_embeddings == 248
        assert again.long_prompt == "chunk"
    trained = copy.deepcopy(pipe.text_encoder)
    trained.encoder.layers[-1].mlp.fc1.weight.data *= 1.01  # the table alone may stay what it was
    again = FineLIPStableDiffusionPipeline.from_pretrained(tmp_path, text_encoder=trained)
    assert again.long_prompt == "stretch"


def test_with_a_trained_encoder_prompts_are_stretched(pipe, pipe_xl, text_of):
    report = pipe.describe_prompt(text_of(120))
    assert report.long_prompt == "stretch"
    assert str(report).startswith("120 tokens, long_prompt='stretch' (the default with a trained long encoder)\n")
    assert pipe.describe_prompt("a cat", "stretch").why == ""  # somebody chose
    # Nobody trained SDXL's second encoder: it reads windows of its own, unless it is asked to stretch.
    first, second = pipe_xl.describe_prompt(text_of(120)).readings
    assert (first.encoder, second.encoder) == ("text_encoder", "stock_text_encoder_2")
    pipe_xl.second_encoder = "stretch"
    assert pipe_xl.describe_prompt("a cat").readings[1].encoder == "text_encoder_2"
    pipe_xl.second_encoder = "window"


def test_without_a_stock_encoder_in_memory(
    stable_diffusion_folder, stable_diffusion_xl_folder, finelip_folder, encoder_folder, text_of
):
    both = quiet(FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, finelip_folder))
    alone = quiet(
        FineLIPStableDiffusionPipeline.from_pretrained(
            stable_diffusion_folder, finelip_folder, stock_text_encoder=None
        )
    )
    assert alone.stock_text_encoder is alone.stock_tokenizer is None
    torch.testing.assert_close(pixels(alone, text_of(120)), pixels(both, text_of(120)), rtol=0, atol=1e-5)  # as above
    with pytest.raises(ValueError, match="reads with stock_text_encoder, which this pipeline does not have"):
        alone("a cat", long_prompt="chunk")
    xl = FineLIPStableDiffusionXLPipeline.from_pretrained(
        stable_diffusion_xl_folder, encoder_folder, stock_text_encoder=None, stock_text_encoder_2=None
    )
    assert (xl.second_encoder, xl.long_prompt) == ("stretch", "stretch")
    assert encode(xl, text_of(120))[0].shape == (1, 248, 2 * WIDTH)


# Signatures


@pytest.mark.parametrize("method", ["__call__", "encode_prompt"])
def test_signatures_show_every_parameter(pipe, pipe_xl, _stock, method):
    attached = attach(StableDiffusionPipeline(**_stock.components, requires_safety_checker=False))
    pairs = [(pipe, StableDiffusionPipeline), (pipe_xl, StableDiffusionXLPipeline)]
    for ours, theirs in [*pairs, *([(attached, StableDiffusionPipeline)] if method == "encode_prompt" else [])]:
        found = inspect.signature(getattr(ours, method)).parameters
        own = dict(inspect.signature(getattr(theirs, method)).parameters)
        own.pop("self")
        assert [name for name in found if name not in OURS] == list(own)
        assert {name: each.default for name, each in found.items() if name in own} == {
            name: each.default for name, each in own.items()
        }
        assert set(found) - set(own) == OURS
        assert all(found[name].kind is inspect.Parameter.KEYWORD_ONLY for name in OURS)
    assert {"guidance_scale", "ip_adapter_image"} <= inspect.signature(pipe.__call__).parameters.keys()


def test_arguments_are_diffusers_own(pipe, stock, text_of):
    """By position, left out, or wrong: what they mean is what diffusers means by them."""
    positional = (text_of(60), 16, 24, 2, None, None, 6.0, "dull")
    call = {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
    expected = stock(*positional, **call).images
    call["generator"] = torch.Generator().manual_seed(0)
    assert (pipe(*positional, **call, long_prompt="truncate").images == expected).all()
    ready = pipe.encode("a cat")
    for wrong, message in (
        ({"prompt": "a cat", **ready}, "Cannot forward both"),
        ({}, "neither prompt nor prompt_embeds"),
        (
            {"prompt": "a cat", "negative_prompt": "b", "negative_prompt_embeds": ready["prompt_embeds"]},
            "Cannot forward",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**wrong)
    with pytest.raises(TypeError, match="multiple values for argument 'prompt'"):
        pipe("a cat", prompt="a dog")


# What is parsed, and who may ask at the same time


@pytest.mark.parametrize("call", [{}, {"long_prompt": "auto"}, {"blend": 0.5}, {"long_prompt": "chunk"}], ids=str)
def test_a_prompt_is_parsed_once(pipe, pipe_xl, text_of, monkeypatch, call):
    parsed = []

    def parse(text, *args):
        parsed.append(text)
        return original(text, *args)

    original = prompt_encoder.parse_weights
    monkeypatch.setattr(prompt_encoder, "parse_weights", parse)
    prompt, negative = text_of(100), text_of(300)
    for each in (pipe, pipe_xl):
        each.encode(prompt, negative, weighting="a1111", **call)
        assert sorted(parsed) == sorted([prompt, negative])
        parsed.clear()


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_threads_share_a_pipeline(pipe, pipe_xl, text_of, kind):
    """Each with settings of its own, all at once, as often as it takes to meet."""
    pipe = {"sd": pipe, "xl": pipe_xl}[kind]
    prompt = text_of(100) + " a (crown:1.4)"
    settings = [{"long_prompt": how} for how in LONG_PROMPTS]
    settings += [{"weighting": "a1111"}, {"blend": 0.3}, {"blend": 0.7, "weighting": "a1111"}]
    alone = [dict(pipe.encode(prompt, "dull", **own)) for own in settings]
    with ThreadPoolExecutor(len(settings)) as threads:
        every = list(threads.map(lambda own: dict(pipe.encode(prompt, "dull", **own)), settings * 4))
    for found, expected in zip(every, alone * 4, strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (pipe.long_prompt, pipe.weighting, pipe.blend) == ("stretch", "plain", 1)


# Any pipeline of diffusers


@pytest.fixture(scope="module")
def img2img(_stock, finelip_folder):
    """diffusers' own over the parts of a pipeline of ours, unattached."""
    return quiet(StableDiffusionImg2ImgPipeline.from_pipe(_stock))


IMAGE = {"image": torch.zeros(1, 3, 16, 16), "strength": 1.0}


@pytest.mark.parametrize("how", LONG_PROMPTS)
@pytest.mark.parametrize("call", [{}, {"weighting": "a1111"}], ids=str)
def test_attached_pipelines_read_as_ours_do(img2img, pipe, finelip_folder, text_of, how, call):
    attached = attach(copy.copy(img2img), finelip_folder, long_prompt=how, **call)
    prompts, negative = [text_of(100) + " a (crown:1.4)", "a cat"], text_of(90)
    expected = pipe.encode_prompt(prompts, CPU, 2, True, negative, clip_skip=1, long_prompt=how, **call)
    found = attached.encode_prompt(prompts, CPU, 2, True, negative, clip_skip=1)
    assert all(map(torch.equal, found, expected))
    ready = pipe.encode(prompts, negative, long_prompt=how, **call)
    assert torch.equal(
        pixels(attached, prompts, negative_prompt=[negative] * 2, **IMAGE), pixels(attached, **ready, **IMAGE)
    )
    assert str(attached.describe_prompt(prompts[0])) == str(pipe.describe_prompt(prompts[0], how, **call))


def test_attached_pipelines_blend(img2img, pipe, finelip_folder, text_of):
    attached = attach(copy.copy(img2img), finelip_folder, blend=0.5)
    for count in (20, 120):
        assert torch.equal(encode(attached, text_of(count))[0], encode(pipe, text_of(count), blend=0.5)[0])
    assert dict(attached.encode("a cat", blend=0.3)).keys() == {"prompt_embeds", "negative_prompt_embeds"}


def test_attach_without_a_trained_encoder_replaces_nothing(img2img, text_of):
    attached = attach(copy.copy(img2img))
    assert attached.components == img2img.components  # the very same objects
    assert attached.describe_prompt("a cat").long_prompt == "chunk"
    assert type(attached) is StableDiffusionImg2ImgPipeline
    first, second = (pixels(attached, text_of(100) + ending, **IMAGE) for ending in (" a crown", " a candle"))
    assert not torch.equal(first, second)
    attach(attached, long_prompt="segment", weighting="a1111")  # chosen again
    assert attached.describe_prompt("a cat").long_prompt == "segment"


def test_a_lora_in_one_of_two_attached_encoders_is_refused(_stock, finelip_folder):
    peft = pytest.importorskip("peft")
    attached = attach(StableDiffusionImg2ImgPipeline.from_pipe(_stock), finelip_folder, blend=0.5)
    attached.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), "style")
    with pytest.raises(ValueError, match="the LoRA style was loaded into the long encoder alone"):
        attached("a cat", **IMAGE)
    encode(attached, "a cat", blend=1)  # which does not read with the other one


def test_attached_pipelines_follow_to_another_dtype(_stock, finelip_folder):
    attached = attach(copy.deepcopy(StableDiffusionImg2ImgPipeline.from_pipe(_stock)), finelip_folder, blend=0.5)
    attached.to(torch.float64)
    assert encode(attached, "a cat")[0].dtype == torch.float64


def test_pipelines_that_read_in_a_way_of_their_own(tmp_path, _stock):
    class Deaf(StableDiffusionPipeline):
        """As pipelines whose `encode_prompt` takes no ready states."""

        def encode_prompt(self, prompt, device):
            return None

    pipe = Deaf(**_stock.components, requires_safety_checker=False)
    for wrong in ({}, {"long_prompt": "chunk"}, {"long_prompt": "stretch", "blend": 0.5}):
        with pytest.raises(ValueError, match="Deaf encodes prompts in a way of its own"):
            attach(pipe, **wrong)
    assert pipe.tokenizer.model_max_length == 77
    long = tiny_text_encoder(5, positions=248)
    long.save_pretrained(tmp_path / "text_encoder")
    clip_tokenizer(248).save_pretrained(tmp_path / "tokenizer")
    assert attach(pipe, tmp_path).tokenizer.model_max_length == 248
