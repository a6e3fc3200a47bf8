"""How a pipeline runs changes nothing of what it draws: offloading, compiling, dtypes, layouts, attention, VAE."""

import copy
from functools import partial

import pytest
import tiny_models
import torch
from accelerate import cpu_offload, dispatch_model
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from packaging.version import Version
from tiny_models import WIDTH, tiny_unet
from torch import nn

from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline
from finelip_diffusion.prompts import LONG_PROMPTS

STRATEGIES = [how for how in LONG_PROMPTS if how != "auto"]  # which is one of two others


pixels = partial(tiny_models.pixels, steps=1)


def models(pipe) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def built(kind, parts):
    extra = {"add_watermarker": False} if "text_encoder_2" in parts else {"requires_safety_checker": False}
    if kind is FineLIPStableDiffusionXLPipeline:
        extra["second_encoder"] = "stretch"  # so that every encoder reads under some strategy
    pipe = kind(**parts, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def _pipes(_stock, _stock_xl, finelip_folder):
    return {
        "sd": built(FineLIPStableDiffusionPipeline, {**_stock.components, "finelip": finelip_folder}),
        "xl": built(FineLIPStableDiffusionXLPipeline, {**_stock_xl.components, "finelip": finelip_folder}),
    }


@pytest.fixture(scope="module")
def plain(_pipes, text_of):
    """What the pipelines draw as they are, on a prompt of 300 tokens."""
    return {(kind, how): pixels(pipe, text_of(300), long_prompt=how)
            for kind, pipe in _pipes.items() for how in STRATEGIES}  # fmt: skip


@pytest.fixture(params=["sd", "xl"])
def kind(request):
    return request.param


@pytest.fixture
def pipe(_pipes, kind):
    """Over models of its own; tokenizers are shared."""
    pipe = _pipes[kind]
    return built(type(pipe), {**pipe.components, **copy.deepcopy(models(pipe))})


@pytest.fixture
def check(pipe, kind, plain, text_of):
    """Draws again, in every strategy, and compares."""

    def check(atol=0.0):
        for how in STRATEGIES:
            image = pixels(pipe, text_of(300), long_prompt=how)
            torch.testing.assert_close(
                image, plain[kind, how], rtol=0, atol=atol, msg=lambda text, how=how: f"{how}: {text}"
            )

    return check


# Offloading and devices


def test_every_encoder_moves_with_the_pipeline(pipe):
    pipe.to(torch.float64)
    assert {part.dtype for part in models(pipe).values()} == {torch.float64}
    pipe.to("meta")
    assert {part.device.type for part in models(pipe).values()} == {"meta"}


def test_model_offload(pipe, check):
    pipe.enable_model_cpu_offload(device="cpu")
    for name, part in models(pipe).items():
        assert hasattr(part, "_hf_hook"), name
    assert set(models(pipe)) <= {*pipe.model_cpu_offload_seq.split("->"), *pipe._exclude_from_cpu_offload}
    check()
    pipe.remove_all_hooks()
    check()


def test_sequential_offload(pipe, check):
    """With the hooks that `enable_sequential_cpu_offload` sets, which itself insists on a device with an index: on
    "cpu:0", accelerate fails for diffusers' own pipelines, too."""
    for part in models(pipe).values():
        cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    for name, part in models(pipe).items():
        assert {parameter.device.type for parameter in part.parameters()} == {"meta"}, name
    assert pipe._execution_device == torch.device("cpu")
    check()
    for name, part in models(pipe).items():
        assert {parameter.device.type for parameter in part.parameters()} == {"meta"}, name


def test_textual_inversion_on_an_offloaded_pipeline(_stock):
    pipe = built(FineLIPStableDiffusionPipeline, {**copy.deepcopy(_stock.components), "long_prompt": "stretch"})
    pipe.enable_model_cpu_offload(device="cpu")
    embedding = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion({"<toy>": embedding})
    for name in ("text_encoder", "stock_text_encoder"):
        assert hasattr(getattr(pipe, name), "_hf_hook")
        assert torch.equal(getattr(pipe, name).get_input_embeddings().weight[-2:], embedding)
    for how in STRATEGIES:
        one, other = (pixels(pipe, prompt, long_prompt=how) for prompt in ("a <toy>", "a toy"))
        assert not torch.equal(one, other)


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_map(_pipes, stable_diffusion_folder, finelip_folder, text_of, device_map):
    """Where there is no GPU, "balanced" has nothing to balance: that it loads and draws is all one can see."""
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(
        stable_diffusion_folder, finelip=finelip_folder, device_map=device_map
    )
    pipe.set_progress_bar_config(disable=True)
    plain = built(type(pipe), {**_pipes["sd"].components, "unet": tiny_unet(8)})  # the one that was adapted
    for how in STRATEGIES:
        # weights in a mapped file lie at other addresses, and the kernels for them may round the last bit otherwise
        images = (pixels(each, text_of(300), long_prompt=how) for each in (pipe, plain))
        torch.testing.assert_close(*images, rtol=0, atol=1e-5)


def test_an_encoder_with_hooks_is_stretched_with_them(_stock, text_of):
    """As `device_map` leaves one that lies on another device than the rest."""
    parts = {**_stock.components, "text_encoder": copy.deepcopy(_stock.text_encoder), "long_prompt": "stretch"}
    expected = pixels(built(FineLIPStableDiffusionPipeline, parts), text_of(90))
    dispatch_model(parts["text_encoder"], {"": "cpu"}, force_hooks=True)
    pipe = built(FineLIPStableDiffusionPipeline, parts)
    assert pipe.text_encoder._hf_hook.execution_device == pipe.stock_text_encoder._hf_hook.execution_device
    assert torch.equal(pixels(pipe, text_of(90)), expected)


# Compiling


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"), reason="dynamo of torch 2.6 fails in transformers' own CLIPTextModel"
)
@pytest.mark.parametrize("kind", ["sd"], indirect=True)
def test_compiled_models(pipe, kind, plain, text_of):
    """Traced whole by dynamo, run as they are; a compiler behind it would round otherwise."""
    torch.compiler.reset()
    encoders = ("text_encoder", "stock_text_encoder")
    pipe.register_modules(**{name: torch.compile(getattr(pipe, name), backend="eager") for name in encoders})
    assert torch.equal(pixels(pipe, text_of(300), long_prompt="chunk"), plain[kind, "chunk"])
    pipe.register_modules(unet=torch.compile(pipe.unet, backend="eager"))
    assert torch.equal(pixels(pipe, text_of(300)), plain[kind, "stretch"])


# Dtypes and memory layouts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_has_no_hidden_upcasts(pipe, text_of, dtype):
    """In text encoders and UNet; diffusers decodes SDXL's VAE in float32 unless told not to (`force_upcast`)."""
    pipe.to(dtype)
    dtypes: dict[str, set[torch.dtype]] = {}

    def watch(name, module):
        def hook(module, args, output):
            tensors = output if isinstance(output, tuple) else (output,)
            dtypes.setdefault(name, set()).update(t.dtype for t in tensors if isinstance(t, torch.Tensor))

        module.register_forward_hook(hook)

    parts = {name: part for name, part in models(pipe).items() if name != "vae"}
    for part, model in parts.items():
        for name, module in model.named_modules():
            watch(f"{part}.{name}", module)
    for how in STRATEGIES:
        assert torch.isfinite(pixels(pipe, text_of(300), long_prompt=how)).all()
        states = pipe.encode_prompt(
            text_of(300),
            device=pipe.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            long_prompt=how,
        )
        assert {each.dtype for each in states if each is not None} == {dtype}
    assert {name.split(".")[0] for name in dtypes} == set(parts)
    upcast = {name for name, found in dtypes.items() if found - {dtype}}
    # sinusoids of the time step and of SDXL's sizes, which diffusers casts before the first weight
    assert upcast <= {"unet.time_proj", "unet.add_time_proj"}


def test_half_precision_draws_as_the_stock_pipeline_does(stable_diffusion_folder, text_of):
    stock = StableDiffusionPipeline.from_pretrained(stable_diffusion_folder, torch_dtype=torch.bfloat16)
    ours = FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, torch_dtype=torch.bfloat16)
    assert {part.dtype for part in models(ours).values()} == {torch.bfloat16}
    assert torch.equal(pixels(stock, text_of(90)), pixels(ours, text_of(90), long_prompt="truncate"))


def test_channels_last(pipe, check):
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    check(atol=1e-5)  # convolutions add up in another order


# Attention and VAE


def test_attention_processors(pipe, check):
    pipe.unet.set_attn_processor(AttnProcessor())
    assert {type(processor) for processor in pipe.unet.attn_processors.values()} == {AttnProcessor}
    check(atol=1e-5)  # softmax and product in two steps, or in one kernel
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    check()
    pipe.enable_attention_slicing(1)
    check(atol=1e-5)  # one head after the other


def test_vae_slicing_and_tiling(pipe, _stock, _stock_xl, kind, text_of, check):
    pipe.vae.enable_slicing()
    check()
    prompts = [text_of(300), "a cat"]
    sliced = pixels(pipe, prompts)
    pipe.vae.disable_slicing()
    torch.testing.assert_close(sliced, pixels(pipe, prompts), rtol=0, atol=1e-5)  # one image after the other
    stock = {"sd": _stock, "xl": _stock_xl}[kind]
    stock = built(type(stock), {**stock.components, "vae": pipe.vae})
    untiled = pixels(pipe, text_of(90), long_prompt="truncate")
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 8  # of the 8 x 8 latents
    tiled = pixels(pipe, text_of(90), long_prompt="truncate")
    assert not torch.equal(tiled, untiled)
    assert torch.equal(tiled, pixels(stock, text_of(90)))
    assert torch.isfinite(pixels(pipe, text_of(300))).all()
