"""LoRA, textual inversion, DreamBooth and compel on the long pipelines, against diffusers' own, at tiny size."""

import copy
from collections.abc import Callable
from functools import partial

import diffusers
import pytest
import tiny_models
import torch
from compel import Compel, CompelForSD, CompelForSDXL, ReturnedEmbeddingsType
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from packaging.version import Version
from PIL import Image
from safetensors.torch import save_file
from tiny_models import WIDTH
from torch import Tensor, nn
from transformers import CLIPTextModel

from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline, attach
from finelip_diffusion.prompts import LONG_PROMPTS
from finelip_diffusion.upstream import even_alphas, fit_text_encoder_names

DEVICE = torch.device("cpu")
LORA = "pytorch_lora_weights.safetensors"
# https://github.com/huggingface/diffusers/issues/13984; ours do
stock_loads_kohya = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.41"), reason="diffusers' own pipeline cannot load the reference"
)
UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj")
TEXT_LAYERS = ("q_proj", "v_proj", "out_proj", "fc1", "fc2")


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


@pytest.fixture(scope="module")
def _pipe(_stock):
    return built(FineLIPStableDiffusionPipeline, {**_stock.components, "long_prompt": "stretch"})


@pytest.fixture(scope="module")
def _pipe_xl(_stock_xl):
    stretched = {"long_prompt": "stretch", "second_encoder": "stretch"}
    return built(FineLIPStableDiffusionXLPipeline, {**_stock_xl.components, **stretched})


@pytest.fixture
def stock(_stock):
    return own(_stock)


@pytest.fixture
def pipe(_pipe):
    """The base's own encoder, stretched: for 21 positions it reads as the base does."""
    return own(_pipe)


@pytest.fixture
def stock_xl(_stock_xl):
    return own(_stock_xl)


@pytest.fixture
def pipe_xl(_pipe_xl):
    return own(_pipe_xl)


@pytest.fixture(autouse=True)
def quiet():
    """transformers prints a table of the weights that an adapter does not have, which are all but its own."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


# LoRA files, as the two families of trainers write them


def layers(model: nn.Module, endings: tuple[str, ...]) -> list[tuple[str, nn.Linear]]:
    return [(n, m) for n, m in model.named_modules() if n.endswith(endings) and isinstance(m, nn.Linear)]


def kohya_lora(
    parts: dict[str, nn.Module],
    seed: int = 0,
    rank: Callable[[int], int] = lambda layer: 4,
    alpha: Callable[[int], float] = lambda layer: 2.0,
) -> dict[str, Tensor]:
    """kohya-ss's layout: one module for each layer, named with underscores, with its alpha."""
    pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for prefix, model in parts.items():
        for i, (name, layer) in enumerate(layers(model, UNET_LAYERS if "unet" in prefix else TEXT_LAYERS)):
            key = prefix + name.removeprefix("text_model.").replace(".", "_")
            weights[f"{key}.lora_down.weight"] = torch.randn(rank(i), layer.in_features, generator=generator) * 0.3
            weights[f"{key}.lora_up.weight"] = torch.randn(layer.out_features, rank(i), generator=generator) * 0.3
            weights[f"{key}.alpha"] = torch.tensor(alpha(i))
    return weights


def kohya_parts(stock) -> dict[str, nn.Module]:
    return {"lora_unet_": stock.unet, "lora_te_text_model_": stock.text_encoder}


def peft_layers(model: nn.Module, target_modules: list[str], seed: int = 0) -> dict[str, Tensor]:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=target_modules, init_lora_weights=False))
    return peft.get_peft_model_state_dict(model, adapter_name="default")


def write_lora(folder, layout: str, stock, seed: int = 0):
    if layout == "kohya":
        save_file(kohya_lora(kohya_parts(stock), seed), folder / LORA)
    else:
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=peft_layers(stock.unet, ["to_q", "to_v"], seed),
            text_encoder_lora_layers=peft_layers(stock.text_encoder, ["q_proj", "fc1"], seed),
        )
    return folder


def merged(model: nn.Module, lora: dict[str, Tensor], prefix: str) -> nn.Module:
    """A plain loop over kohya's layout: W + alpha / rank * up down."""
    model, found = copy.deepcopy(model), 0
    for name, layer in layers(model, TEXT_LAYERS + UNET_LAYERS):
        key = prefix + name.removeprefix("text_model.").replace(".", "_")
        if f"{key}.lora_up.weight" in lora:
            up, down, alpha = (lora[f"{key}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
            layer.weight.data += alpha / len(down) * up @ down
            found += 1
    assert found
    return model


def last_states(text_encoder, tokenizer, prompt):
    input_ids = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        return text_encoder(input_ids).last_hidden_state


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


# Textual inversion


def vectors(count: int, seed: int = 0) -> Tensor:
    found = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) * 5
    return found[0] if count == 1 else found


def test_textual_inversions_in_both_prompts_through_both_encoders(stock, pipe, text_of):
    with_own_tokenizers(stock)
    with_own_tokenizers(pipe)
    plain = pixels(pipe, text_of(90))
    for each in (stock, pipe):
        each.load_textual_inversion({"<toy>": vectors(3)})
        each.load_textual_inversion(vectors(1, seed=1), token="<bad>")
    prompt, negative = "a red <toy> under a tree", "<bad>, dull, <toy>"
    ours = pixels(pipe, prompt, negative_prompt=negative, long_prompt="truncate")
    assert torch.equal(ours, pixels(stock, prompt, negative_prompt=negative))
    counts = {pipe.describe_prompt(prompt, how).tokens for how in LONG_PROMPTS}
    assert counts == {8}  # three of them are the toy's
    # windows of 248 and of 77 tokens
    states = embed(pipe, prompt, negative), embed(stock, prompt, negative)
    for long, short in zip(*states, strict=True):
        torch.testing.assert_close(long[:, :21], short[:, :21], rtol=0, atol=5e-5)
    for how in LONG_PROMPTS:  # after token 77, and alone in the negative prompt
        behind = text_of(100) + " <toy>"
        counts = how != "truncate"
        one, other = (pixels(pipe, each, long_prompt=how) for each in (behind, text_of(100) + " toy"))
        assert torch.equal(one, other) != counts
        one, other = (pixels(pipe, "a cat", negative_prompt=each, long_prompt=how) for each in ("<bad>", "bad"))
        assert not torch.equal(one, other)
    assert torch.equal(pixels(pipe, text_of(90)), plain)  # prompts without them read as before


def test_unloading_textual_inversions_undoes_them_in_both_encoders(pipe, text_of, tmp_path):
    with_own_tokenizers(pipe)
    both = [(pipe.text_encoder, pipe.tokenizer), (pipe.stock_text_encoder, pipe.stock_tokenizer)]
    before = {how: pixels(pipe, text_of(90), long_prompt=how) for how in ("stretch", "chunk")}
    spelled = pipe.tokenizer("a <toy>").input_ids
    pipe.load_textual_inversion({"<toy>": vectors(2)})
    pipe.load_textual_inversion({"<bad>": vectors(1, seed=1)})
    pipe.unload_textual_inversion(["<toy>", "<toy>_1"])
    for encoder, tokenizer in both:
        assert tokenizer("a <toy>").input_ids == spelled
        token = tokenizer("<bad>").input_ids[1]
        assert token == 49408  # the first behind the vocabulary
        assert torch.equal(encoder.get_input_embeddings().weight[token], vectors(1, seed=1))
    pipe.unload_textual_inversion()
    for encoder, tokenizer in both:
        assert len(tokenizer) == encoder.get_input_embeddings().num_embeddings == encoder.config.vocab_size == 49408
    assert (pipe.tokenizer.model_max_length, pipe.stock_tokenizer.model_max_length) == (248, 77)
    for how, image in before.items():
        assert torch.equal(pixels(pipe, text_of(90), long_prompt=how), image)
    pipe.text_encoder.save_pretrained(tmp_path)
    assert CLIPTextModel.from_pretrained(tmp_path).config.max_position_embeddings == 248


def test_diffusers_still_leaves_the_vocabulary_enlarged(stock):
    """Where this fails, diffusers has fixed it: the pipelines need not set `vocab_size` after unloading."""
    with_own_tokenizers(stock)
    stock.load_textual_inversion({"<toy>": vectors(2)})
    stock.unload_textual_inversion()
    assert stock.text_encoder.config.vocab_size == 49410


def test_textual_inversions_of_sdxl_have_a_part_for_each_encoder(stock_xl, pipe_xl, text_of):
    with_own_tokenizers(stock_xl)
    with_own_tokenizers(pipe_xl)
    embeddings = {"clip_l": vectors(2), "clip_g": vectors(2, seed=1)}
    tokens = ["<s0>", "<s1>"]
    before = pixels(pipe_xl, text_of(90))
    for each in (stock_xl, pipe_xl):
        each.load_textual_inversion(
            embeddings["clip_l"], token=tokens, text_encoder=each.text_encoder, tokenizer=each.tokenizer
        )
        each.load_textual_inversion(  # in the order of diffusers' signature
            embeddings["clip_g"], tokens, each.tokenizer_2, each.text_encoder_2
        )
    prompt, negative = "a <s0><s1> under a tree", "<s1>"
    ours = pixels(pipe_xl, prompt, negative_prompt=negative, long_prompt="truncate")
    assert torch.equal(ours, pixels(stock_xl, prompt, negative_prompt=negative))
    assert not torch.equal(pixels(pipe_xl, prompt), pixels(pipe_xl, "a cat under a tree"))
    tables = [
        getattr(pipe_xl, f"{stock}text_encoder{place}").get_input_embeddings().weight
        for place in ("", "_2")
        for stock in ("", "stock_")
    ]
    for table, part in zip(tables, ("clip_l", "clip_l", "clip_g", "clip_g"), strict=True):
        assert torch.equal(table[-2:], embeddings[part])
    pipe_xl.unload_textual_inversion(tokens)  # the first place, as in diffusers
    assert "<s0>" in pipe_xl.tokenizer_2.get_vocab()
    assert "<s0>" in pipe_xl.stock_tokenizer_2.get_vocab()
    pipe_xl.unload_textual_inversion(tokens, pipe_xl.tokenizer_2, pipe_xl.text_encoder_2)
    for name, part in pipe_xl.components.items():
        assert "tokenizer" not in name or len(part) == 49408, name
    assert torch.equal(pixels(pipe_xl, text_of(90)), before)


def test_textual_inversions_that_are_there_already_come_along(stock, finelip_folder):
    with_own_tokenizers(stock)
    stock.load_textual_inversion({"<toy>": vectors(2)})
    long = attach(copy.copy(stock), finelip_folder)
    ours = FineLIPStableDiffusionPipeline.from_pipe(stock, finelip=finelip_folder)
    for each in (long, ours):
        ids = each.tokenizer("<toy> <toy>_1").input_ids[1:-1]
        assert torch.equal(each.text_encoder.get_input_embeddings().weight[ids], vectors(2))
        assert each.text_encoder.config.vocab_size == len(each.tokenizer) == 49410
    assert ours.describe_prompt("a <toy>").tokens == 3
    assert torch.equal(embed(ours, "a <toy>", long_prompt="truncate")[0], embed(stock, "a <toy>")[0])
    assert torch.equal(embed(ours, "a <toy>")[0], embed(long, "a <toy>")[0])


# DreamBooth


def test_a_dreambooth_model_is_a_base_like_any_other(stock, pipe, tmp_path):
    """Its identifier is an ordinary rare token, and what was learned of it is in the weights, which are stretched."""
    torch.manual_seed(0)
    for parameter in stock.text_encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    stock.save_pretrained(tmp_path)
    tuned = FineLIPStableDiffusionPipeline.from_pretrained(tmp_path, long_prompt="stretch")
    tuned.set_progress_bar_config(disable=True)
    prompt = "a photo of sks dog"
    assert tuned.tokenizer(prompt).input_ids == tuned.stock_tokenizer(prompt).input_ids
    assert len(tuned.tokenizer("sks").input_ids) == 3  # with start and end
    # weights in a mapped file lie at other addresses, and the kernels for them may round the last bit otherwise
    torch.testing.assert_close(pixels(tuned, prompt, long_prompt="truncate"), pixels(stock, prompt), rtol=0, atol=1e-5)
    expected = embed(stock, prompt)[0][:, :21]
    # windows of 248 and of 77 tokens
    torch.testing.assert_close(embed(tuned, prompt)[0][:, :21], expected, rtol=0, atol=5e-5)
    assert not torch.allclose(embed(pipe, prompt)[0][:, :21], expected, atol=0.1)


# Embeddings that compel makes


@pytest.mark.parametrize("count", [0, 20, 246])
def test_compel_reads_the_long_window(pipe, text_of, count):
    prompt, negative = text_of(count), "dull, grey"
    compel = Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, truncate_long_prompts=False)
    states, negative_states = embed(pipe, prompt, negative)
    assert torch.equal(compel(prompt), states)
    image = pixels(pipe, prompt_embeds=compel(prompt), negative_prompt_embeds=compel(negative))
    assert torch.equal(image, pixels(pipe, prompt, negative_prompt=negative))
    if count == 20:
        assert not torch.equal(compel(f"({prompt})1.3"), states)
    both = CompelForSD(pipe)(prompt, negative_prompt=negative)
    torch.testing.assert_close(both.embeds, states, rtol=0, atol=2e-5)  # a batch of two against one
    torch.testing.assert_close(both.negative_embeds, negative_states, rtol=0, atol=2e-5)


def test_compel_goes_on_in_further_long_windows(pipe, text_of):
    compel = Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, truncate_long_prompts=False)
    assert compel(text_of(400)).shape == (1, 496, WIDTH)
    states, negative = compel.pad_conditioning_tensors_to_same_length([compel(text_of(400)), compel("dull")])
    assert torch.isfinite(pixels(pipe, prompt_embeds=states, negative_prompt_embeds=negative)).all()
    short = pixels(pipe, prompt_embeds=compel("a cat"), negative_prompt=text_of(400))  # ours fills up by itself
    assert torch.isfinite(short).all()


def test_compel_on_both_encoders_of_sdxl(pipe_xl, text_of):
    prompt, negative = text_of(200), "dull, grey"
    states, negative_states, pooled, _ = embed(pipe_xl, prompt, negative)
    found = CompelForSDXL(pipe_xl)(prompt, negative_prompt=negative)
    torch.testing.assert_close(found.embeds, states, rtol=0, atol=5e-5)  # a batch of two against one
    torch.testing.assert_close(found.negative_embeds, negative_states, rtol=0, atol=5e-5)
    torch.testing.assert_close(found.pooled_embeds, pooled, rtol=0, atol=5e-5)
    image = pixels(
        pipe_xl,
        prompt_embeds=found.embeds,
        pooled_prompt_embeds=found.pooled_embeds,
        negative_prompt_embeds=found.negative_embeds,
        negative_pooled_prompt_embeds=found.negative_pooled_embeds,
    )
    torch.testing.assert_close(image, pixels(pipe_xl, prompt, negative_prompt=negative), rtol=0, atol=1e-4)
    by_hand = Compel(
        tokenizer=[pipe_xl.tokenizer, pipe_xl.tokenizer_2],
        text_encoder=[pipe_xl.text_encoder, pipe_xl.text_encoder_2],
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        requires_pooled=[False, True],
        truncate_long_prompts=False,
    )
    assert torch.equal(by_hand(prompt)[0], states)
