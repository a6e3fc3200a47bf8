"""diffusers' other pipelines with long prompts: through `attach`, and through `from_pipe` from this package's own."""

import copy
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from PIL import Image
from tiny_models import WIDTH, tiny_scheduler, tiny_text_encoder, tiny_unet, tiny_vae
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline, attach
from finelip_diffusion.tokenizer import clip_tokenizer

CPU = torch.device("cpu")
GRAY, WHITE = (Image.new("RGB", (16, 16), color) for color in ("gray", "white"))


def pixels(pipe, prompt, **call):
    """(N, H, W, 3), the frames of a video as N."""
    call = {"num_inference_steps": 1, "generator": torch.Generator().manual_seed(0), **call}
    output = pipe(prompt, output_type="np", **call)
    images = output.images if hasattr(output, "images") else output.frames[0]
    return torch.from_numpy(np.asarray(images))


def states(pipe, prompt):
    return pipe.encode_prompt(prompt, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False)[0]


@pytest.fixture
def endings(text_of):
    """Two prompts of 102 tokens that differ after token 77."""
    return [text_of(100) + " a crown", text_of(100) + " a candle"]


def reads_to_the_end(pipe, endings, **call):
    first, second = (pixels(pipe, prompt, **call) for prompt in endings)
    return not torch.equal(first, second)


class Kind(NamedTuple):
    """A pipeline of diffusers: what it needs beside the parts of a Stable Diffusion, and how it is called."""

    pipeline: type[DiffusionPipeline]
    call: dict[str, Any]
    extra: Any = lambda unet: {}


def controlnet(unet):
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)).eval()
    with torch.no_grad():
        for block in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
            block.weight.normal_()  # zeros before training
    return {"controlnet": net}


def t2i_adapter(unet):
    """With a UNet whose blocks are in the order of the real ones: attention above, none below."""
    torch.manual_seed(0)
    adapter = T2IAdapter(3, channels=unet.config.block_out_channels, num_res_blocks=1, downscale_factor=2)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return {"adapter": adapter.eval(), "unet": UNet2DConditionModel.from_config({**unet.config, **blocks}).eval()}


def motion_adapter(unet):
    torch.manual_seed(0)
    return {
        "motion_adapter": MotionAdapter(
            unet.config.block_out_channels,
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
        ).eval()
    }


def consistency_unet(unet):
    return {"unet": tiny_unet(2, time_cond_proj_dim=8), "scheduler": LCMScheduler.from_config(tiny_scheduler().config)}


IMAGE = {"image": GRAY, "strength": 1.0}
MASKED = {**IMAGE, "mask_image": WHITE, "height": 16, "width": 16}
KINDS = {
    "img2img": Kind(StableDiffusionImg2ImgPipeline, IMAGE),
    "inpaint": Kind(StableDiffusionInpaintPipeline, MASKED),
    "controlnet": Kind(StableDiffusionControlNetPipeline, {"image": GRAY}, controlnet),
    "t2i_adapter": Kind(StableDiffusionAdapterPipeline, {"image": GRAY}, t2i_adapter),
    "lcm": Kind(LatentConsistencyModelPipeline, {}, consistency_unet),
    "animatediff": Kind(AnimateDiffPipeline, {"num_frames": 2}, motion_adapter),
    "xl_img2img": Kind(StableDiffusionXLImg2ImgPipeline, IMAGE),
    "xl_inpaint": Kind(StableDiffusionXLInpaintPipeline, MASKED),
    "xl_controlnet": Kind(StableDiffusionXLControlNetPipeline, {"image": GRAY}, controlnet),
    "xl_t2i_adapter": Kind(StableDiffusionXLAdapterPipeline, {"image": GRAY}, t2i_adapter),
}


@pytest.fixture(scope="module")
def bases(_stock, _stock_xl):
    """diffusers' own pipeline and this package's, over the same parts."""
    return {
        "sd": (
            _stock,
            FineLIPStableDiffusionPipeline(**_stock.components, requires_safety_checker=False, long_prompt="stretch"),
        ),
        "xl": (
            _stock_xl,
            FineLIPStableDiffusionXLPipeline(
                **_stock_xl.components, add_watermarker=False, long_prompt="stretch", second_encoder="stretch"
            ),
        ),
    }


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", KINDS)
def test_long_prompts(bases, name, endings, text_of):
    kind = KINDS[name]
    base, ours = bases["xl" if name.startswith("xl") else "sd"]
    extra = kind.extra(base.unet)
    stock, attached = (quiet(kind.pipeline.from_pipe(base, **extra)) for _ in range(2))
    before = stock.components
    encoders = torch.nn.ModuleList([part for key, part in before.items() if key.startswith("text_encoder")])
    weights = {key: tensor.clone() for key, tensor in encoders.state_dict().items()}
    assert attach(attached, long_prompt="stretch", second_encoder="stretch") is attached  # its own encoders, stretched
    piped = quiet(kind.pipeline.from_pipe(ours, **extra))

    places = [place for place in ("tokenizer", "tokenizer_2") if place in stock.components]
    for pipe in (attached, piped):
        assert type(pipe).__name__ == kind.pipeline.__name__
        assert [pipe.components[place].model_max_length for place in places] == [248] * len(places)
    assert not reads_to_the_end(stock, endings, **kind.call)
    first, second = (pixels(attached, prompt, **kind.call) for prompt in endings)
    assert not torch.equal(first, second)
    assert torch.equal(first, pixels(piped, endings[0], **kind.call))

    # Attention is causal, and the first 20 rows of the table, and row 20, stay: a short prompt moves in its padding
    # alone. 248 positions against 77 round otherwise.
    short = text_of(20)
    torch.testing.assert_close(states(attached, short)[:, :21], states(stock, short)[:, :21], rtol=0, atol=2e-5)

    assert stock.components == before  # the very same objects
    assert [stock.components[place].model_max_length for place in places] == [77] * len(places)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in encoders.state_dict().items())


def test_what_from_pipe_made_of_ours_is_saved_and_loaded(bases, tmp_path):
    _, ours = bases["sd"]
    pipe = quiet(StableDiffusionImg2ImgPipeline.from_pipe(ours))
    pipe.save_pretrained(tmp_path)
    again = quiet(StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path))
    # rounding, where weights lie elsewhere in memory
    torch.testing.assert_close(pixels(again, "a cat", **IMAGE), pixels(pipe, "a cat", **IMAGE), rtol=0, atol=1e-5)
    back = FineLIPStableDiffusionPipeline.from_pretrained(tmp_path)
    assert back.tokenizer.model_max_length == 248
    with pytest.raises(ValueError, match="stock_text_encoder, which this pipeline does not have"):
        back.describe_prompt("a cat", "truncate")


# IP-Adapter: in the pipelines of this package, too


@pytest.fixture(scope="module")
def ip_adapter():
    """An image encoder, its processor, and makers of the adapter's weights for a UNet."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(config).eval()

    def weights(unet):
        torch.manual_seed(0)
        layers, number = {}, 1
        for name in unet.attn_processors:
            if "attn2" in name:
                attention = unet.get_submodule(name.removesuffix(".processor"))
                for part in ("k", "v"):
                    layers[f"{number}.to_{part}_ip.weight"] = torch.randn_like(getattr(attention, f"to_{part}").weight)
                number += 2
        read = unet.config.cross_attention_dim
        projection = {
            "proj.weight": torch.randn(4 * read, 16),
            "proj.bias": torch.randn(4 * read),
            "norm.weight": torch.ones(read),
            "norm.bias": torch.zeros(read),
        }
        return {"image_proj": projection, "ip_adapter": layers}

    def load(pipe):
        pipe.load_ip_adapter(weights(pipe.unet), subfolder="", weight_name="")
        return quiet(pipe)

    parts = {"image_encoder": encoder, "feature_extractor": CLIPImageProcessor(size=16, crop_size=16)}
    return parts, load


@pytest.mark.parametrize(
    ("family", "stock_class", "our_class"),
    [
        ("sd", StableDiffusionPipeline, FineLIPStableDiffusionPipeline),
        ("xl", StableDiffusionXLPipeline, FineLIPStableDiffusionXLPipeline),
    ],
)
def test_ip_adapter(bases, ip_adapter, family, stock_class, our_class, endings, finelip_folder):
    base, _ = bases[family]
    parts, load = ip_adapter
    parts = {**parts, "unet": copy.deepcopy(base.unet)}
    stock = load(stock_class.from_pipe(base, **parts))
    attached = attach(quiet(stock_class.from_pipe(stock)), finelip_folder)
    parts["unet"] = copy.deepcopy(base.unet)
    ours = load(our_class.from_pipe(base, finelip=finelip_folder, **parts))
    gray, white = ({"ip_adapter_image": image} for image in (GRAY, WHITE))

    assert not reads_to_the_end(stock, endings, **gray)
    first, second = (pixels(ours, prompt, **gray) for prompt in endings)
    assert not torch.equal(first, second)
    assert torch.equal(first, pixels(attached, endings[0], **gray))
    assert not torch.equal(first, pixels(ours, endings[0], **white))  # the image counts beside 248 tokens
    truncated = pixels(ours, endings[0], long_prompt="truncate", **gray)
    assert torch.equal(truncated, pixels(stock, endings[0], **gray))


# Few steps


@pytest.mark.parametrize("family", ["sd", "xl"])
@pytest.mark.parametrize(
    ("scheduler", "call"),
    [
        (LCMScheduler(), {"num_inference_steps": 2, "guidance_scale": 1.0}),
        (
            EulerAncestralDiscreteScheduler(timestep_spacing="trailing"),
            {"guidance_scale": 0},
        ),
    ],
    ids=["lcm", "turbo"],
)
def test_few_steps(bases, family, scheduler, call, endings):
    second = {"second_encoder": "stretch"} if family == "xl" else {}
    base, ours = bases[family]
    stock, attached = (quiet(type(base).from_pipe(base, scheduler=scheduler)) for _ in range(2))
    attach(attached, long_prompt="stretch", **second)
    ours = quiet(type(ours).from_pipe(ours, scheduler=scheduler, long_prompt="stretch", **second))
    first, second = (pixels(ours, prompt, **call) for prompt in endings)
    assert not torch.equal(first, second)
    assert torch.equal(first, pixels(attached, endings[0], **call))
    truncated = pixels(ours, endings[0], long_prompt="truncate", **call)
    assert torch.equal(truncated, pixels(stock, endings[0], **call))


# SDXL with refiner


def refiner():
    unet = tiny_unet(
        4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + WIDTH,  # five numbers, the aesthetic score among them
    )
    return quiet(
        StableDiffusionXLImg2ImgPipeline(
            vae=tiny_vae(0),
            text_encoder=None,
            text_encoder_2=tiny_text_encoder(3, projection=True),
            tokenizer=None,
            tokenizer_2=clip_tokenizer(77, pad_token="!"),
            unet=unet,
            scheduler=tiny_scheduler(),
            requires_aesthetics_score=True,
            add_watermarker=False,
        )
    )


def test_refiner(bases, endings):
    _, ours = bases["xl"]
    stock, attached = refiner(), attach(refiner(), long_prompt="stretch")
    assert attached.tokenizer is attached.text_encoder is None
    assert attached.tokenizer_2.model_max_length == 248
    latents = quiet(ours)(
        endings[0],
        num_inference_steps=5,
        denoising_end=0.8,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images
    rest = {"image": latents, "num_inference_steps": 5, "denoising_start": 0.8}
    assert not reads_to_the_end(stock, endings, **rest)
    assert reads_to_the_end(attached, endings, **rest)


def test_a_refiner_that_shares_the_base_s_encoder_reads_as_far(bases):
    _, ours = bases["xl"]
    pipe = refiner()
    pipe.register_modules(text_encoder_2=ours.text_encoder_2)
    attach(pipe)
    assert pipe.text_encoder_2 is ours.text_encoder_2  # long already
    assert pipe.tokenizer_2.model_max_length == 248


def test_a_refiner_has_nothing_for_finelip(finelip_folder):
    with pytest.raises(ValueError, match="has no text_encoder that finelip"):
        attach(refiner(), finelip_folder)
