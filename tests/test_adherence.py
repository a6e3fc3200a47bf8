"""What arrives of a prompt: figures against numpy, judges against transformers and torchmetrics, changes and drift."""

import logging
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from torchmetrics.multimodal import CLIPScore
from transformers import CLIPModel, CLIPTokenizer

from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline
from finelip_diffusion.evaluation.adherence import (
    TOKEN_EDGES,
    Judge,
    Sentences,
    change_ending,
    change_in_image,
    change_scene,
    clip_scores,
    curve,
    embed_sentences,
    figure,
    listening,
    load_judge,
    prediction_drift,
    reading,
    sentences_of,
)
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.prompts import read_prompt
from finelip_diffusion.scenes import CELL_SIZE, describe, render, sample_scene, stock_border


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge("clip", str(BUNDLED_MODEL / "clip"))


@pytest.fixture(scope="module")
def captions() -> list[str]:
    """Six captions, all but the fourth longer than 77 tokens."""
    return [str(describe(sample_scene(seed, "test", (1, 3) if seed == 3 else (6, 9)), seed)) for seed in range(6)]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [render(sample_scene(seed, "test", (1, 3) if seed == 3 else (6, 9))) for seed in range(6)]


# ------------------------------------------------------------------------------------------------------------ figures


def test_a_figure_is_a_mean_over_values_drawn_by_prompt():
    rng = np.random.default_rng(0)
    values = [rng.random(rng.integers(0, 9)).tolist() for _ in range(80)]
    baseline = [[value / 2 for value in own] for own in values]
    found = figure(values, baseline)
    flat = np.concatenate(values)
    assert found["value"] == pytest.approx(flat.mean(), abs=1e-12)
    assert found["n"] == len(flat)
    assert found["difference"]["value"] == pytest.approx(flat.mean() / 2, abs=1e-12)
    filled = [own for own in values if own]
    resampled = []
    for _ in range(2000):
        drawn = rng.integers(0, len(filled), len(filled))
        resampled.append(np.concatenate([filled[i] for i in drawn]).mean())
    # Both intervals come from 2,000 draws of their own: their ends differ by a fraction of the interval.
    low, high = np.quantile(resampled, (0.025, 0.975))
    assert abs(found["low"] - low) < 0.15 * (high - low)
    assert abs(found["high"] - high) < 0.15 * (high - low)


def test_a_paired_difference_is_narrower_than_what_its_sides_say():
    rng = np.random.default_rng(1)
    prompts = rng.normal(0, 5, 200)
    values, baseline = [[own + 0.3] for own in prompts], [[own + rng.normal(0, 0.1)] for own in prompts]
    found = figure(values, baseline)
    assert found["low"] < 0 < found["high"]
    assert found["difference"]["low"] > 0.2


def test_a_figure_without_values_or_baseline():
    assert figure([[], []])["value"] is None
    assert figure([[1.0], [2.0]])["difference"] is None
    with pytest.raises(ValueError, match="the same facts of the same prompts"):
        figure([[1.0], [2.0]], [[1.0], []])


def test_a_curve_deals_values_out_by_token():
    points = [[(0, 1.0), (39, 0.0), (40, 1.0)], [(75, 0.0), (76, 1.0), (600, 1.0)]]
    found = {(part["from"], part["to"]): (part["value"], part["n"]) for part in curve(points)}
    assert found == {(0, 40): (0.5, 2), (40, 76): (0.5, 2), (76, 110): (1.0, 1), (500, None): (1.0, 1)}
    assert TOKEN_EDGES[2] == 76  # the border of a stock encoder is one of a part
    assert curve([[], []]) == []


# ---------------------------------------------------------------------------------------------------- a CLIP as judge


def test_sentences_are_those_of_segment(judge: Judge, captions: list[str]):
    for caption in captions:
        parts = sentences_of(caption, judge.tokenizer)
        windows = read_prompt(caption, judge.tokenizer, "sentences").windows
        assert len(parts) == len(windows) > 1
        assert [part.token for part in parts] == np.cumsum([len(window) for window in windows]).tolist()
        assert " ".join(caption[part.start : part.end] for part in parts) == caption


def test_the_border_is_where_truncate_stops(judge: Judge, captions: list[str]):
    for caption in captions:
        dropped = read_prompt(caption, judge.tokenizer, "first").dropped
        border = stock_border(caption, judge.tokenizer)
        assert (caption[border:] if border is not None else "") == dropped
    assert sum(stock_border(caption, judge.tokenizer) is None for caption in captions) == 1


def test_a_judge_embeds_as_transformers_does(judge: Judge, captions: list[str], images: list[Image.Image]):
    clip = CLIPModel.from_pretrained(BUNDLED_MODEL / "clip", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED_MODEL / "tokenizer")
    with torch.no_grad():
        for caption, image in zip(captions, images, strict=True):
            ids = tokenizer(caption, verbose=False).input_ids
            ids = [*ids[: judge.max_length - 1], tokenizer.eos_token_id] if len(ids) > judge.max_length else ids
            state = clip.text_model(torch.tensor([ids])).last_hidden_state[:, -1]
            text = F.normalize(clip.text_projection(state), dim=-1)
            pixels = judge.image_processor(image, return_tensors="pt").pixel_values
            pooled = clip.vision_model(pixels).pooler_output
            picture = F.normalize(clip.visual_projection(pooled), dim=-1)
            # One caption at a time against a padded batch: the last bits of float32.
            assert torch.allclose(judge.embed_texts(captions)[captions.index(caption)], text[0], atol=1e-5)
            assert torch.allclose(judge.embed_images([image])[0], picture[0], atol=1e-5)
            assert clip_scores(picture, text).item() == pytest.approx(100 * (picture @ text.T).item(), abs=1e-4)


def test_torchmetrics_gives_the_same_score_and_by_itself_another(
    judge: Judge, captions: list[str], images: list[Image.Image]
):
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    ours = clip_scores(judge.embed_images(images), judge.embed_texts(captions)).mean().item()
    with torch.no_grad():
        theirs = CLIPScore(judge.for_torchmetrics())(pixels, captions).item()
    assert ours == pytest.approx(theirs, abs=1e-3)

    model, processor = judge.for_torchmetrics()()

    def untruncated(text: list[str] | None = None, images: object = None, **_: object) -> object:
        if text is None:
            return processor(images=images)
        return judge.tokenizer(text, padding=True, return_tensors="pt", verbose=False)

    with torch.no_grad(), pytest.warns(UserWarning, match="Will truncate"):
        cut = CLIPScore(lambda: (model, untruncated))(pixels, captions).item()
    assert cut < ours - 1  # its cut loses the end token: the score falls off a cliff


def test_listening_equals_a_plain_loop(judge: Judge, captions: list[str], images: list[Image.Image]):
    image_embeds = judge.embed_images(images)
    found = listening(image_embeds, embed_sentences(judge, captions))
    for number, caption in enumerate(captions):
        parts = sentences_of(caption, judge.tokenizer)
        assert [token for token, _ in found[number]] == [part.token for part in parts]
        for part, (_, value) in zip(parts, found[number], strict=True):
            text = judge.embed_texts([caption[part.start : part.end]])[0]
            own, other = image_embeds[number] @ text, image_embeds[(number + 3) % 6] @ text
            assert value == pytest.approx(100 * (own - other).item(), abs=1e-3)


def test_listening_hears_true_images_and_not_exchanged_ones(judge: Judge):
    scenes = [sample_scene(seed, "test") for seed in range(60)]
    sentences = embed_sentences(judge, [str(describe(scene, seed)) for seed, scene in enumerate(scenes)])
    embeds = judge.embed_images([render(scene) for scene in scenes])
    right, wrong = ([value for own in listening(which, sentences) for _, value in own] for which in (
        embeds, embeds.roll(7, 0)))  # fmt: skip
    assert np.mean(right) > 10 * abs(np.mean(wrong))


def test_listening_needs_another_image():
    with pytest.raises(ValueError, match="at least 2"):
        listening(torch.ones(1, 4), Sentences(torch.ones(1, 4), torch.tensor([0]), torch.tensor([3]), 1))


# ------------------------------------------------------------------------------------------------ scenes, and changes


def test_reading_tells_right_from_wrong(judge: Judge):
    scene, other = sample_scene(4, "test"), sample_scene(5, "test")
    caption = describe(scene, 4)
    right = reading(caption, scene, render(scene), judge.tokenizer)
    assert all(fact["found"] for fact in right["facts"])
    assert right["background"]
    assert not any(right["uncalled"])
    assert len(right["uncalled"]) == 9 - len(scene.objects)
    wrong = reading(caption, scene, render(other), judge.tokenizer)
    assert not all(fact["found"] for fact in wrong["facts"])


def test_a_changed_scene_differs_in_one_word_behind_the_border(judge: Judge):
    changes = 0
    for seed in range(40):
        scene = sample_scene(seed, "test", (5, 9))
        caption, change = str(describe(scene, seed)), change_scene(scene, seed, judge.tokenizer)
        if change is None:
            continue
        changes += 1
        start, end = change.span
        border = stock_border(caption, judge.tokenizer)
        assert border is not None
        assert start >= border
        assert change.prompt[:start] + change.old + change.prompt[end:] == caption
        assert re.fullmatch(r"((a|an|A|An) )?[a-z]+", change.old)  # "a blue", "an orange"
        assert re.fullmatch(r"((a|an|A|An) )?[a-z]+", change.prompt[start:end])
        assert change.old != change.prompt[start:end]
        before, after = (str(describe(scene, seed)), change.prompt)
        assert before[:border] == after[:border]
        assert change.cell in {item.cell for item in scene.objects}
    assert changes > 20


def test_a_short_scene_has_nothing_to_change(judge: Judge):
    assert change_scene(sample_scene(0, "test", (1, 2)), 0, judge.tokenizer) is None


def test_a_changed_ending(judge: Judge, captions: list[str]):
    long, short = captions[0], captions[3]
    change = change_ending(long, captions[1], judge.tokenizer)
    assert change is not None
    start, _ = change.span
    assert long[:start] + change.old + long[start + len(change.old) :] == long
    assert change.prompt[:start] == long[:start]
    last = sentences_of(captions[1], judge.tokenizer)[-1]
    assert change.prompt.endswith(captions[1][last.start : last.end])
    assert change.cell is None
    assert change_ending(short, long, judge.tokenizer) is None
    assert change_ending(long, long, judge.tokenizer) is None


def test_a_change_in_one_cell_is_found_there():
    before = np.zeros((3 * CELL_SIZE, 3 * CELL_SIZE, 3), np.uint8)
    after = before.copy()
    after[CELL_SIZE : 2 * CELL_SIZE, 2 * CELL_SIZE :] = 255  # cell 5
    one, other = Image.fromarray(before), Image.fromarray(after)
    assert change_in_image(one, other, 5).inside == 1
    assert change_in_image(one, other, 4).inside == 0
    assert change_in_image(one, other, 5).rms == pytest.approx((1 / 9) ** 0.5)
    assert change_in_image(one, other).inside is None
    assert change_in_image(one, one, 5) == change_in_image(other, other, 3)
    assert change_in_image(one, one, 5).inside is None
    assert change_in_image(one, Image.fromarray(before + 1), 5).inside is None  # rounding


# --------------------------------------------------------------------------------------------------------------- drift


def make_long(stock: Any) -> Any:
    """Our pipeline, with the stock encoder and its stretched copy."""
    if isinstance(stock, StableDiffusionXLPipeline):
        pipe: Any = FineLIPStableDiffusionXLPipeline(
            **stock.components, add_watermarker=False, long_prompt="stretch", second_encoder="stretch"
        )
    else:
        pipe = FineLIPStableDiffusionPipeline(**stock.components, requires_safety_checker=False, long_prompt="stretch")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def prompts() -> list[str]:
    return [
        "a red cat under a green tree",
        "two blue dogs asleep beside a tree, in the evening light of a long summer.",
    ]


def test_chunking_a_short_prompt_moves_nothing(stock: StableDiffusionPipeline, prompts: list[str]):
    pipe = make_long(stock)
    assert prediction_drift(pipe, prompts, "chunk", num_steps=2) == [0.0, 0.0]


@pytest.mark.parametrize("xl", [False, True])
def test_drift_equals_a_plain_loop(
    stock: StableDiffusionPipeline, stock_xl: StableDiffusionXLPipeline, prompts: list[str], xl: bool,
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    caplog.set_level(logging.ERROR)
    pipe = make_long(stock_xl if xl else stock)
    found = prediction_drift(pipe, prompts, "stretch", seed=5, num_steps=2)
    assert all(value > 0 for value in found)
    for number, prompt in enumerate(prompts):
        encoded = {}
        for how in ("truncate", "stretch"):
            states = pipe.encode_prompt(
                prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False, long_prompt=how
            )
            added = None
            if xl:
                size = 8 * pipe.vae_scale_factor
                times = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)
                added = {"text_embeds": states[2], "time_ids": times}
            encoded[how] = (states[0], added)
        pipe.scheduler.set_timesteps(2)
        latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5 + number))
        latents = latents * pipe.scheduler.init_noise_sigma
        moved = size = 0.0
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                predictions = {
                    how: pipe.unet(latents, t, encoder_hidden_states=states, added_cond_kwargs=added).sample
                    for how, (states, added) in encoded.items()
                }
                moved += (predictions["stretch"] - predictions["truncate"]).square().sum().item()
                size += predictions["truncate"].square().sum().item()
                latents = pipe.scheduler.step(predictions["truncate"], t, latents).prev_sample
        assert found[number] == pytest.approx((moved / size) ** 0.5, rel=1e-4)
    assert not pipe.unet._forward_hooks
