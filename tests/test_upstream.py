"""Mends of what is broken upstream: that they work, and that they are still needed."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from tiny_models import make_stable_diffusion, tiny_text_encoder

from finelip_diffusion import FineLIPStableDiffusionPipeline, attach
from finelip_diffusion.upstream import name_dtype

CALL = {"image": Image.new("RGB", (16, 16), "gray"), "strength": 1.0, "num_inference_steps": 1, "output_type": "np"}

needs_the_mend = pytest.mark.skipif(
    hasattr(tiny_text_encoder(0), "text_model"), reason="CLIPTextModel is flat in transformers 5.6 and newer only"
)


@pytest.fixture(scope="module")
def _attached(_stock):
    pipe = attach(StableDiffusionImg2ImgPipeline.from_pipe(_stock), long_prompt="stretch")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(pipe, prompt, **call):
    call = {**CALL, "generator": torch.Generator().manual_seed(0), **call}
    return torch.from_numpy(np.asarray(pipe(prompt, **call).images))


@needs_the_mend
def test_clip_skip_is_still_broken_upstream(stock):
    try:
        stock("a cat", num_inference_steps=1, clip_skip=1)
    except AttributeError as error:
        assert "text_model" in str(error)
    else:
        pytest.fail("diffusers reads clip_skip again: say so in docs/compatibility.md")


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_in_an_attached_pipeline(_attached, _stock, text_of, skip):
    ours = FineLIPStableDiffusionPipeline(**_stock.components, requires_safety_checker=False, long_prompt="stretch")
    arguments = (text_of(100), torch.device("cpu"), 2, True, "dull")
    expected = ours.encode_prompt(*arguments, clip_skip=skip)
    found = _attached.encode_prompt(*arguments, clip_skip=skip)
    for theirs, own in zip(found, expected, strict=True):
        torch.testing.assert_close(theirs, own, rtol=0, atol=2e-5)  # attention with the layers' outputs kept
    assert not torch.equal(pixels(_attached, text_of(100), clip_skip=skip), pixels(_attached, text_of(100)))


@needs_the_mend
def test_clip_skip_in_a_pipeline_that_reads_far_already(_attached):
    """As after `from_pipe`, or from a folder that an attached pipeline was saved to."""
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(_attached)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(AttributeError, match="text_model"):
        pixels(pipe, "a cat", clip_skip=1)
    attach(pipe)
    assert pipe.text_encoder is _attached.text_encoder
    assert torch.equal(pixels(pipe, "a cat", clip_skip=1), pixels(_attached, "a cat", clip_skip=1))


def test_the_mend_leaves_no_trace(_attached, stock, tmp_path):
    assert type(stock) is StableDiffusionPipeline
    assert isinstance(_attached, StableDiffusionImg2ImgPipeline)
    for name in ("__name__", "__module__", "__doc__"):
        assert getattr(type(_attached), name) == getattr(StableDiffusionImg2ImgPipeline, name)
    assert hasattr(_attached.text_encoder, "text_model") == hasattr(stock.text_encoder, "text_model")
    _attached.save_pretrained(tmp_path)
    again = StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is StableDiffusionImg2ImgPipeline
    torch.testing.assert_close(pixels(again, "a cat"), pixels(_attached, "a cat"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [copy.copy, copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_the_mend_survives_copies(how):
    # Fresh parts: an encoder that was once asked for its hidden states cannot be pickled, in transformers 5.
    pipe = attach(StableDiffusionImg2ImgPipeline.from_pipe(make_stable_diffusion()))
    pipe.set_progress_bar_config(disable=True)
    other = how(pipe).to(torch.float64)
    image = pixels(other, "a cat", clip_skip=1)
    assert torch.isfinite(image).all()
    assert not torch.equal(image, pixels(other, "a cat"))


def test_the_mend_and_offloading(_stock):
    pipe = attach(StableDiffusionImg2ImgPipeline.from_pipe(copy.deepcopy(_stock)))
    pipe.set_progress_bar_config(disable=True)
    before = pixels(pipe, "a cat", clip_skip=1)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pixels(pipe, "a cat", clip_skip=1), before)


def test_the_mend_and_a_lora_of_the_nested_encoder(_stock, tmp_path):
    """diffusers takes the prefix off such names only where the encoder has no `text_model`."""
    pytest.importorskip("peft")
    pipe = attach(StableDiffusionImg2ImgPipeline.from_pipe(copy.deepcopy(_stock)))
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    lora = {}
    for name, module in pipe.text_encoder.named_modules():
        if name.endswith("q_proj"):
            prefix = f"text_encoder.text_model.{name.removeprefix('text_model.')}"
            lora[f"{prefix}.lora_A.weight"] = torch.randn(2, module.in_features)
            lora[f"{prefix}.lora_B.weight"] = torch.randn(module.out_features, 2)
    try:
        copy.deepcopy(_stock).load_lora_weights(lora)
    except IndexError:
        pytest.skip("diffusers 0.37 loads no such LoRA into a flat encoder at all")
    before = [pixels(pipe, "a cat", **call) for call in ({}, {"clip_skip": 1})]
    pipe.load_lora_weights(lora)
    after = [pixels(pipe, "a cat", **call) for call in ({}, {"clip_skip": 1})]
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_the_type_of_the_weights_goes_by_the_name_that_prints_nothing(stable_diffusion_folder):
    known = next(iter(name_dtype({"dtype": torch.bfloat16})))
    for name in ("dtype", "torch_dtype"):
        assert name_dtype({name: torch.bfloat16, "unet": None}) == {"unet": None, known: torch.bfloat16}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe = FineLIPStableDiffusionPipeline.from_pretrained(
                stable_diffusion_folder, long_prompt="truncate", **{name: torch.bfloat16}
            )
        assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert name_dtype({"dtype": None}) == name_dtype({}) == {}
    with pytest.raises(ValueError, match="dtype and torch_dtype are both given"):
        name_dtype({"dtype": torch.float16, "torch_dtype": torch.float16})
