"""Conditions, noise and image files: the same noise for the same prompt, and no image taken for another."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from tiny_models import make_stable_diffusion, make_stable_diffusion_xl, tiny_unet
from transformers import CLIPConfig, CLIPImageProcessor

from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline
from finelip_diffusion.evaluation.images import (
    Condition,
    Noise,
    Prompt,
    Settings,
    batches,
    draw,
    drawn_with,
    fingerprint,
    is_drawn,
    load_pipeline,
    load_refiner,
    located,
    named,
    read_conditions,
    save_image,
)
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.prompts import LongPrompt

CPU = torch.device("cpu")
PROMPTS = [
    Prompt("long", index, f"a red cat under {number} green trees") for index, number in enumerate(("two", "six", "no"))
]


def settings(**changes: object) -> Settings:
    return Settings(**{"num_inference_steps": 2, "guidance_scale": 3.0, **changes})  # type: ignore[arg-type]


@pytest.fixture
def pipe(stable_diffusion_folder: Path, finelip_folder: Path) -> FineLIPStableDiffusionPipeline:
    own = Condition("base", "finelip", None, str(finelip_folder), "stretch", "")
    return load_pipeline(own, settings(model=str(stable_diffusion_folder)), CPU)


# --------------------------------------------------------------------------------------------------------- conditions


def test_every_unet_meets_every_encoder(stable_diffusion_folder: Path, finelip_folder: Path):
    found = read_conditions(
        str(stable_diffusion_folder),
        ["truncate", "untrained", f"ours={finelip_folder}"],
        ["base", f"own={finelip_folder}"],
    )
    assert [each.name for each in found] == [
        "base/truncate", "base/untrained", "base/ours", "own/truncate", "own/untrained", "own/ours"
    ]  # fmt: skip
    assert [each.long_prompt for each in found[:3]] == ["truncate", "stretch", "stretch"]
    assert found[0].encoder_source is None
    assert found[2].encoder_source == str(finelip_folder)


def test_the_bundled_model_has_names_of_its_own():
    assert located("bundled") == str(BUNDLED_MODEL)
    assert located("bundled/clip") == str(BUNDLED_MODEL / "clip")
    assert named("clip=bundled/clip") == ("clip", str(BUNDLED_MODEL / "clip"))
    assert named("runs/finelip") == ("finelip", "runs/finelip")
    found = read_conditions("bundled", ["finelip"], ["base"])
    assert (found[0].encoder_source, found[0].unet_source) == (str(BUNDLED_MODEL / "finelip"), None)
    with pytest.raises(ValueError, match="UNet adapted: there is no .*unet with a config.json in it"):
        read_conditions("bundled", ["finelip"], ["adapted"])


def test_blends_are_encoders_of_their_own():
    found = read_conditions("bundled", ["truncate", "finelip", "finelip@0.25", "mine=bundled/finelip@1"], ["base"])
    assert [(each.name, each.blend) for each in found] == [
        ("base/truncate", 1), ("base/finelip", 1), ("base/finelip@0.25", 0.25), ("base/mine", 1)
    ]  # fmt: skip
    assert len({drawn_with(each, settings(), "") for each in found}) == 4
    assert "blend" not in drawn_with(found[1], settings(), "")


@pytest.mark.parametrize(
    ("encoders", "unets", "says"),
    [
        (["nowhere/at-all/here"], ["base"], "nowhere/at-all/here"),
        (["truncate", "a/finelip", "truncate"], ["base"], "a/finelip"),
        (["truncate", "finelip@2"], ["base"], "encoder finelip@2: a blend is SOURCE@SHARE"),
        (["truncate"], ["nowhere"], "no nowhere/unet with a config.json"),
        (["truncate"], ["base", "base"], "one name"),
        (["truncate", "truncate"], ["base"], "one name"),
    ],
)
def test_what_is_no_condition_is_refused(stable_diffusion_folder: Path, encoders: list, unets: list, says: str):
    with pytest.raises(ValueError, match=says):
        read_conditions(str(stable_diffusion_folder), encoders, unets)


def test_the_base_unet_stays_beside_an_encoder_with_its_own(
    pipe: FineLIPStableDiffusionPipeline, stable_diffusion_folder: Path, finelip_folder: Path
):
    weight = "conv_in.weight"
    assert torch.equal(pipe.unet.state_dict()[weight], tiny_unet(2).state_dict()[weight])
    adapted = Condition("adapted", "finelip", str(finelip_folder), str(finelip_folder), "stretch", "")
    other = load_pipeline(adapted, settings(model=str(stable_diffusion_folder)), CPU)
    assert torch.equal(other.unet.state_dict()[weight], tiny_unet(8).state_dict()[weight])


def test_no_safety_checker_blackens_what_is_measured(tmp_path: Path):
    stock = make_stable_diffusion()
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=tower, vision_config=vision, projection_dim=8))
    size = {"height": 32, "width": 32}
    stock.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessor(size=size, crop_size=size))
    stock.save_pretrained(tmp_path)
    pipe = load_pipeline(Condition("base", "truncate", None, None, "truncate", ""), settings(model=str(tmp_path)), CPU)
    assert pipe.safety_checker is None


def test_a_fingerprint_is_of_the_weights(pipe: FineLIPStableDiffusionPipeline):
    before = fingerprint(pipe)
    assert fingerprint(pipe) == before
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert fingerprint(pipe) != before


# --------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("noise", ["per_prompt", "in_order"])
def test_a_prompt_has_its_noise_in_any_batch(pipe: FineLIPStableDiffusionPipeline, noise: str):
    own = settings(noise=noise, seed=1971)
    together = draw(pipe, None, PROMPTS, "stretch", own, Noise(own, pipe))
    apart = Noise(own, pipe)
    for place in (2, 0, 1):  # as after an interruption, or in another process
        (image,) = draw(pipe, None, [PROMPTS[place]], "stretch", own, apart)
        difference = torch.tensor(list(image.tobytes())).sub(torch.tensor(list(together[place].tobytes()))).abs().max()
        assert difference <= 1  # sums of a larger batch round otherwise: at most a level of 255
    first, second = (image.tobytes() for image in together[:2])
    assert first != second


@pytest.mark.parametrize("long_prompt", ["chunk", "segment", "stretch", "truncate"])
def test_an_image_does_not_depend_on_longer_neighbors(
    pipe: FineLIPStableDiffusionPipeline, text_of: Callable[[int], str], long_prompt: LongPrompt
):
    own = settings()
    noise = Noise(own, pipe)
    prompts = [Prompt("long", index, text_of(number)) for index, number in enumerate((30, 300, 90, 40))]
    dealt = list(batches(pipe, prompts, long_prompt, 3))
    assert sorted(prompt.index for batch in dealt for prompt in batch) == [0, 1, 2, 3]
    if long_prompt == "truncate":
        assert [len(batch) for batch in dealt] == [3, 1]
    else:
        assert len(dealt) > 2 or long_prompt == "stretch"
    for batch in dealt:
        for prompt, image in zip(batch, draw(pipe, None, batch, long_prompt, own, noise), strict=True):
            (alone,) = draw(pipe, None, [prompt], long_prompt, own, noise)
            assert np.abs(np.asarray(image, int) - np.asarray(alone, int)).max() <= 1


def test_noise_in_order_is_one_generator_consumed(pipe: FineLIPStableDiffusionPipeline):
    own = settings(noise="in_order", seed=1971)
    generator = torch.Generator().manual_seed(1971)
    one_by_one = [torch.randn((1, 4, 8, 8), generator=generator) for _ in PROMPTS]
    assert torch.equal(Noise(own, pipe).of(PROMPTS)["latents"], torch.cat(one_by_one))
    assert torch.equal(Noise(own, pipe).of(PROMPTS[2:])["latents"], one_by_one[2])


def test_noise_has_the_size_that_is_asked_for(pipe: FineLIPStableDiffusionPipeline):
    own = settings(noise="in_order", height=32, width=16)
    assert Noise(own, pipe).of(PROMPTS)["latents"].shape == (3, 4, 16, 8)
    (image,) = draw(pipe, None, PROMPTS[:1], "stretch", own, Noise(own, pipe))
    assert image.size == (16, 32)


def test_changed_prompts_share_the_noise_of_their_long_ones(pipe: FineLIPStableDiffusionPipeline):
    own = settings()
    (one,) = draw(pipe, None, PROMPTS[1:2], "stretch", own, Noise(own, pipe))
    (same,) = draw(pipe, None, [Prompt("changed", 1, PROMPTS[1].text)], "stretch", own, Noise(own, pipe))
    assert one.tobytes() == same.tobytes()


def test_a_refiner_goes_on_where_the_base_ends(stable_diffusion_xl_folder: Path, tmp_path: Path):
    base = make_stable_diffusion_xl()
    parts = {name: part for name, part in base.components.items() if name not in ("text_encoder", "tokenizer")}
    parts["unet"] = tiny_unet(
        5,
        32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + 32,
    )
    refiner = StableDiffusionXLImg2ImgPipeline(
        **parts, text_encoder=None, tokenizer=None, requires_aesthetics_score=True, add_watermarker=False
    )
    refiner.save_pretrained(tmp_path / "refiner")
    own = settings(
        model=str(stable_diffusion_xl_folder),
        refiner=str(tmp_path / "refiner"),
        num_inference_steps=5,
        refiner_start=0.6,
    )
    condition = Condition("base", "truncate", None, None, "truncate", "")
    pipe = load_pipeline(condition, own, CPU)
    assert isinstance(pipe, FineLIPStableDiffusionXLPipeline)
    found = draw(pipe, load_refiner(own, CPU), PROMPTS[:2], "truncate", own, Noise(own, pipe))
    texts = [prompt.text for prompt in PROMPTS[:2]]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    steps = {"num_inference_steps": 5, "guidance_scale": 3.0, "generator": generators}
    base.set_progress_bar_config(disable=True)
    half = base(texts, denoising_end=0.6, output_type="latent", **steps).images
    expected = refiner(texts, image=half, denoising_start=0.6, **steps).images
    for image, other in zip(found, expected, strict=True):
        assert image.tobytes() == other.tobytes()
    assert load_refiner(settings(), CPU) is None


# --------------------------------------------------------------------------------------------------------------- files


def test_an_image_keeps_what_it_was_drawn_from(tmp_path: Path):
    condition = Condition("base", "truncate", None, None, "truncate", "")
    prompt = Prompt("long", 3, "ein roter Würfel — 赤い立方体")
    own = drawn_with(condition, settings(), "abc")
    file = tmp_path / prompt.file(condition)
    assert not is_drawn(file, prompt, own)
    save_image(Image.new("RGB", (8, 8), "red"), file, prompt, 3, own)
    assert is_drawn(file, prompt, own)
    with Image.open(file) as image:
        assert image.info["prompt"] == prompt.text
        assert image.info["seed"] == "3"
        assert json.loads(image.info["settings"])["weights"] == "abc"
    assert [path.name for path in file.parent.iterdir()] == ["000003.png"]


@pytest.mark.parametrize("change", ["prompt", "weights", "settings"])
def test_another_image_is_not_taken_for_this_one(tmp_path: Path, change: str):
    condition = Condition("base", "truncate", None, None, "truncate", "")
    prompt, own = PROMPTS[0], drawn_with(condition, settings(), "abc")
    file = tmp_path / prompt.file(condition)
    save_image(Image.new("RGB", (8, 8)), file, prompt, 0, own)
    if change == "prompt":
        prompt = PROMPTS[1]
    elif change == "weights":
        own = drawn_with(condition, settings(), "abd")
    else:
        own = drawn_with(condition, settings(guidance_scale=4.0), "abc")
    with pytest.raises(ValueError, match="another prompt, other settings or other weights"):
        is_drawn(file, prompt, own)


def test_a_broken_image_is_named(tmp_path: Path):
    file = tmp_path / "000000.png"
    file.write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match="is not a readable image"):
        is_drawn(file, copy.copy(PROMPTS[0]), "")
