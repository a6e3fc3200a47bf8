"""LoRA on the long pipelines, against diffusers' own, at tiny size."""

import copy

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from lora_files import LORA, kohya_lora, kohya_parts, merged, peft_layers, write_lora
from own_pipelines import built, embed, last_states, own, pixels
from packaging.version import Version
from PIL import Image

from finelip_diffusion import attach
from finelip_diffusion.prompts import LONG_PROMPTS
from finelip_diffusion.upstream import even_alphas, fit_text_encoder_names

# https://github.com/huggingface/diffusers/issues/13984; ours do
stock_loads_kohya = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.41"), reason="diffusers' own pipeline cannot load the reference"
)


# LoRA on Stable Diffusion


@pytest.mark.parametrize("layout", ["peft", pytest.param("kohya", marks=stock_loads_kohya)])
def test_a_lora_of_the_77_token_model_works_in_every_strategy_and_leaves_no_trace(
    stock, pipe, text_of, tmp_path, layout
):
    prompt = text_of(100)
    lora = write_lora(tmp_path, layout, stock)
    weights = {name: copy.deepcopy(part.state_dict()) for name, part in pipe.components.items() if "text_e" in name}
    before = {how: pixels(pipe, prompt, long_prompt=how) for how in LONG_PROMPTS}
    states = {how: embed(pipe, prompt, long_prompt=how)[0] for how in LONG_PROMPTS}
    for each in (stock, pipe):
        each.load_lora_weights(lora, weight_name=LORA, adapter_name="style")
    for how in LONG_PROMPTS:
        assert not torch.equal(embed(pipe, prompt, long_prompt=how)[0], states[how])
        assert not torch.equal(pixels(pipe, prompt, long_prompt=how), before[how])
    assert torch.equal(pixels(pipe, prompt, long_prompt="truncate"), pixels(stock, prompt))
    pipe.unload_lora_weights()
    for how in LONG_PROMPTS:
        assert torch.equal(pixels(pipe, prompt, long_prompt=how), before[how])
    assert set(weights) == {"text_encoder", "stock_text_encoder"}
    for name, was in weights.items():
        now = getattr(pipe, name).state_dict()
        assert now.keys() == was.keys()
        assert all(torch.equal(now[key], was[key]) for key in was)


@stock_loads_kohya
def test_a_trigger_word_moves_the_long_encoder_as_it_moves_the_stock_one(stock, pipe, text_of):
    """The first 21 rows of both position tables are the same, and attention is causal: so are the states."""
    prompt = "a photo of sks cat under a tree"
    lora = kohya_lora({"lora_te_text_model_": stock.text_encoder})
    behind = text_of(100) + " sks cat"
    plain, plain_behind = embed(pipe, prompt)[0], embed(pipe, behind)[0]
    plain_stock = embed(stock, prompt)[0]
    for each in (stock, pipe):
        each.load_lora_weights(dict(lora))
    moved = embed(pipe, prompt)[0] - plain
    expected = embed(stock, prompt)[0] - plain_stock
    # windows of 248 and of 77 tokens: float32 rounding in the matrix products
    torch.testing.assert_close(moved[:, :21], expected[:, :21], rtol=0, atol=5e-5)
    trigger = pipe.tokenizer(prompt).input_ids.index(pipe.tokenizer("sks").input_ids[1])
    assert moved[0, trigger].norm() > 0.1 * plain[0, trigger].norm()
    moved_behind = (embed(pipe, behind)[0] - plain_behind)[0, 101]
    assert moved_behind.norm() > 0.1 * plain_behind[0, 101].norm()


def test_the_long_encoder_with_a_lora_is_the_long_encoder_with_merged_weights(pipe, text_of):
    """On all 248 positions: a LoRA adds to weights, whose shapes are those of the 77-token encoder."""
    lora = kohya_lora({"lora_te_text_model_": pipe.stock_text_encoder})
    expected = last_states(merged(pipe.text_encoder, lora, "lora_te_text_model_"), pipe.tokenizer, text_of(200))
    pipe.load_lora_weights(lora)
    # W x + up(down(x)) against (W + up down) x
    torch.testing.assert_close(embed(pipe, text_of(200))[0], expected, rtol=0, atol=1e-4)


@stock_loads_kohya
def test_several_loras_with_weights_and_scale(stock, pipe, text_of, tmp_path):
    prompt = text_of(100)
    for seed, name in enumerate(("style", "face")):
        folder = tmp_path / name
        folder.mkdir()
        lora = write_lora(folder, ("peft", "kohya")[seed], stock, seed)
        for each in (stock, pipe):
            each.load_lora_weights(lora, weight_name=LORA, adapter_name=name)

    def check(**call):
        image = pixels(pipe, prompt, long_prompt="truncate", **call)
        assert torch.equal(image, pixels(stock, prompt, **call))
        return image, pixels(pipe, prompt, **call)

    def both(name, *args):
        for each in (stock, pipe):
            getattr(each, name)(*args)

    seen = []
    for names, weights in [
        (["style", "face"], [0.7, 0.3]),
        ("style", {"text_encoder": 0.3, "unet": 1.0}),
    ]:
        both("set_adapters", names, weights)
        seen += [check(), check(cross_attention_kwargs={"scale": 0.5})]
        assert torch.equal(check()[1], seen[-2][1])  # the scale of one call does not stay
    both("disable_lora")
    seen.append(check())
    both("enable_lora")
    both("delete_adapters", "style")
    both("set_adapters", "face")
    seen.append(check())
    for at in range(2):  # of the stock encoder, of the long one
        assert len({image[at].numpy().tobytes() for image in seen}) == len(seen)


@stock_loads_kohya
@pytest.mark.parametrize("components", [None, ["text_encoder"]], ids=["all", "text encoder"])
def test_fused_loras_stay_in_both_encoders_when_they_are_unloaded(stock, pipe, text_of, tmp_path, components):
    prompt, lora = text_of(100), write_lora(tmp_path, "kohya", stock)
    which = {} if components is None else {"components": components}
    plain = embed(pipe, prompt)[0], embed(pipe, prompt, long_prompt="truncate")[0]
    for each in (stock, pipe):
        each.load_lora_weights(lora, weight_name=LORA)
    loaded = embed(pipe, prompt)[0], embed(pipe, prompt, long_prompt="truncate")[0]
    for each in (stock, pipe):
        each.fuse_lora(**which)
    assert pipe.num_fused_loras == 1
    assert torch.equal(pixels(pipe, prompt, long_prompt="truncate"), pixels(stock, prompt))
    again = own(pipe)

    pipe.unload_lora_weights()
    fused = embed(pipe, prompt)[0], embed(pipe, prompt, long_prompt="truncate")[0]
    for now, was in zip(fused, loaded, strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=1e-4)  # (W + up down) x against W x + up(down(x))
    again.unfuse_lora(**which)
    again.unload_lora_weights()
    unfused = embed(again, prompt)[0], embed(again, prompt, long_prompt="truncate")[0]
    for now, was in zip(unfused, plain, strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=1e-4)  # W + d - d


# LoRA on SDXL, and on pipelines treated by attach


@stock_loads_kohya
def test_lora_on_sdxl_reaches_all_four_encoders(stock_xl, pipe_xl, text_of):
    prompt = text_of(100)
    encoders = [name for name in pipe_xl.components if "text_encoder" in name]
    lora = kohya_lora({"lora_te1_text_model_": stock_xl.text_encoder, "lora_te2_text_model_": stock_xl.text_encoder_2})
    attention = kohya_lora({"lora_unet_": stock_xl.unet}, seed=1)
    # kohya trains SDXL on the original UNet, whose blocks have other names
    lora |= {
        name.replace("down_blocks_1_attentions_0_", "input_blocks_3_1_"): value
        for name, value in attention.items()
        if "down_blocks_1_attentions_0_transformer" in name
    }
    call = {"negative_prompt": "dull"}
    before = {how: pixels(pipe_xl, prompt, long_prompt=how, **call) for how in ("stretch", "chunk")}
    states = {name: last_states(getattr(pipe_xl, name), pipe_xl.stock_tokenizer, "a cat") for name in encoders}
    for each in (stock_xl, pipe_xl):
        each.load_lora_weights(dict(lora), adapter_name="style")
    for name in encoders:
        assert not torch.equal(last_states(getattr(pipe_xl, name), pipe_xl.stock_tokenizer, "a cat"), states[name])
    assert any("lora" in name for name, _ in pipe_xl.unet.named_parameters())
    for weights in (1.0, {"text_encoder_2": 0.3, "text_encoder": 0.8, "unet": 0.6}):
        for each in (stock_xl, pipe_xl):
            each.set_adapters("style", weights)
        for scaled in ({}, {"cross_attention_kwargs": {"scale": 0.4}}):
            ours = pixels(pipe_xl, prompt, long_prompt="truncate", **call, **scaled)
            assert torch.equal(ours, pixels(stock_xl, prompt, **call, **scaled))
    for how, image in before.items():
        assert not torch.equal(pixels(pipe_xl, prompt, long_prompt=how, **call), image)
    pipe_xl.second_encoder = "window"
    windows = pixels(pipe_xl, prompt, **call)
    pipe_xl.unload_lora_weights()
    assert not torch.equal(pixels(pipe_xl, prompt, **call), windows)
    pipe_xl.second_encoder = "stretch"
    for how, image in before.items():
        assert torch.equal(pixels(pipe_xl, prompt, long_prompt=how, **call), image)


def test_lora_on_sdxl_in_the_peft_layout_fused(stock_xl, pipe_xl, text_of, tmp_path):
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft_layers(stock_xl.unet, ["to_k"]),
        text_encoder_lora_layers=peft_layers(stock_xl.text_encoder, ["v_proj"]),
        text_encoder_2_lora_layers=peft_layers(stock_xl.text_encoder_2, ["v_proj"]),
    )
    for each in (stock_xl, pipe_xl):
        each.load_lora_weights(tmp_path, weight_name=LORA)
        each.fuse_lora(lora_scale=0.7)
        each.unload_lora_weights()
    assert torch.equal(pixels(pipe_xl, text_of(90), long_prompt="truncate"), pixels(stock_xl, text_of(90)))


@stock_loads_kohya
def test_lora_on_an_attached_pipeline(_stock, finelip_folder, text_of):
    pipe = attach(built(StableDiffusionImg2ImgPipeline, own(_stock).components), finelip_folder)
    lora, prompt = kohya_lora(kohya_parts(_stock)), text_of(200)
    expected = last_states(merged(pipe.text_encoder, lora, "lora_te_text_model_"), pipe.tokenizer, prompt)
    call = {"image": Image.new("RGB", (16, 16), "gray"), "strength": 1.0}
    before = pixels(pipe, prompt, **call)
    pipe.load_lora_weights(lora)
    torch.testing.assert_close(embed(pipe, prompt)[0], expected, rtol=0, atol=1e-4)  # merged against added, as above
    assert not torch.equal(pixels(pipe, prompt, **call), before)
    pipe.unload_lora_weights()
    assert torch.equal(pixels(pipe, prompt, **call), before)


@stock_loads_kohya
def test_a_lora_that_is_there_already_is_kept_or_the_swap_refused(stock, finelip_folder, text_of):
    stock.load_lora_weights(kohya_lora(kohya_parts(stock)), adapter_name="style")
    expected = embed(stock, "a cat")[0]
    with pytest.raises(ValueError, match=r"has a LoRA \(style\).*unload_lora_weights\(\) first"):
        attach(stock, finelip_folder)
    assert stock.tokenizer.model_max_length == 77
    long = attach(copy.copy(stock), long_prompt="stretch")  # a stretched copy of the encoder with its LoRA
    # windows of 248 and of 77 tokens
    torch.testing.assert_close(embed(long, "a cat")[0][:, :21], expected[:, :21], rtol=0, atol=5e-5)


# What diffusers loses of a LoRA: `upstream.py`

MIXED = {"rank": lambda layer: 2 + layer % 3, "alpha": lambda layer: (1.0, 1.0, 3.0)[layer % 3]}


def test_differing_alphas_count(stock, pipe):
    lora = kohya_lora(kohya_parts(stock), **MIXED)
    expected = last_states(merged(stock.text_encoder, lora, "lora_te_text_model_"), stock.tokenizer, "a cat")
    unet = merged(stock.unet, lora, "lora_unet_")
    pipe.load_lora_weights(dict(lora))
    ours = embed(pipe, "a cat", long_prompt="truncate")[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)  # merged against added, as above
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            pipe.unet(noise, 10, ours).sample, unet(noise, 10, ours).sample, rtol=0, atol=1e-5
        )  # merged against added


@stock_loads_kohya
def test_diffusers_still_loses_differing_alphas(stock):
    """Where this fails, diffusers has fixed it: delete `even_alphas` and `lora_state_dict` of the pipelines."""
    lora = kohya_lora(kohya_parts(stock), **MIXED)
    expected = last_states(merged(stock.text_encoder, lora, "lora_te_text_model_"), stock.tokenizer, "a cat")
    unet = merged(stock.unet, lora, "lora_unet_")
    stock.load_lora_weights(dict(lora))
    theirs = embed(stock, "a cat")[0]
    assert (theirs - expected).abs().max() > 0.1
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (stock.unet(noise, 10, theirs).sample - unet(noise, 10, theirs).sample).abs().max() > 0.01


def test_even_alphas_touches_nothing_else(stock):
    weights, alphas = StableDiffusionPipeline.lora_state_dict(kohya_lora(kohya_parts(stock)))
    even, same = even_alphas(weights, alphas)
    assert same == alphas
    assert all(even[name] is weights[name] for name in weights)
    assert even_alphas(weights, None) == (weights, None)
    layer = "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer"
    del alphas[f"{layer}.down.weight.alpha"]  # counts as its rank, 4, where the others have 2
    even, same = even_alphas(weights, alphas)
    changed = [name for name in weights if even[name] is not weights[name]]
    assert changed == [f"{layer}.up.weight"]
    assert torch.equal(even[changed[0]], weights[changed[0]] * 2)
    assert set(same.values()) == {2.0}


def test_names_of_a_lora_are_those_of_its_encoder(stock_xl):
    """Which diffusers before 0.41 needs; later ones do the same by themselves."""
    weights, _ = StableDiffusionXLPipeline.lora_state_dict(
        kohya_lora({"lora_te1_text_model_": stock_xl.text_encoder, "lora_te2_text_model_": stock_xl.text_encoder_2}),
    )
    for prefix in ("text_encoder", "text_encoder_2"):
        encoder = getattr(stock_xl, prefix)
        modules = {name for name, _ in encoder.named_modules()}
        fitting = fit_text_encoder_names(weights, encoder, prefix)
        names = [name.removeprefix(f"{prefix}.") for name in fitting if name.startswith(f"{prefix}.")]
        assert names
        assert {name.rsplit(".self_attn", 1)[0].rsplit(".mlp", 1)[0] for name in names} <= modules
