"""Attention maps: against a plain softmax, without a trace in the images, and in the right cell of scenes."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_text_encoder

from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline
from finelip_diffusion.attention import attention_weights, record_attention
from finelip_diffusion.prompts import LONG_PROMPTS, read_prompt, sentence_spans
from finelip_diffusion.scenes import CELL_SIZE, describe, sample_scene
from finelip_diffusion.tokenizer import clip_tokenizer

FIRST = "A red cat sleeps under a green tree."
PROMPT = (
    f"{FIRST} Two blue dogs run beside it, and nobody looks at them. " + "A small bird sings above the house. " * 12
)


@pytest.fixture(scope="module")
def _pipes(_stock, _stock_xl, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("long")
    tiny_text_encoder(7, positions=248).save_pretrained(folder / "text_encoder")
    clip_tokenizer(248).save_pretrained(folder / "tokenizer")
    pipes = {
        "sd": FineLIPStableDiffusionPipeline(**_stock.components, finelip=folder, requires_safety_checker=False),
        "xl": FineLIPStableDiffusionXLPipeline(**_stock_xl.components, finelip=folder, add_watermarker=False),
    }
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture(params=["sd", "xl"])
def pipe(request, _pipes):
    return copy.copy(_pipes[request.param])


def draw(pipe, prompt=PROMPT, **options):
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), **options}
    return pipe(prompt, output_type="np", **options).images


@pytest.mark.parametrize("long_prompt", LONG_PROMPTS)
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_recording_changes_no_pixel_and_leaves_no_hook(pipe, long_prompt, guidance_scale):
    options = {"long_prompt": long_prompt, "guidance_scale": guidance_scale}
    plain = draw(pipe, **options)
    with record_attention(pipe) as maps:
        recorded = draw(pipe, **options)
    assert np.array_equal(plain, recorded)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in pipe.unet.modules())
    report = pipe.describe_prompt(PROMPT, long_prompt)
    shares = maps.of(report, 0, len(FIRST))
    assert shares.shape == recorded.shape[1:3]
    assert 0 < shares.min() <= shares.max() < 1
    everything = sum(grid.sum(1).mean().item() * grid.shape[2] * grid.shape[3] for grid in maps.sums.values())
    pixels = sum(grid.shape[2] * grid.shape[3] * maps.calls for grid in maps.sums.values()) / len(maps.sums)
    assert everything == pytest.approx(pixels, rel=1e-4)  # every point gives away a share of 1; sums of floats


def test_no_hook_is_left_behind_when_drawing_fails(pipe):
    with pytest.raises(RuntimeError, match="stop here"), record_attention(pipe):
        raise RuntimeError("stop here")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in pipe.unet.modules())


def test_weights_equal_a_plain_softmax(pipe):
    """Head by head, from the layer's own projections, one query at a time."""
    attention = next(m for name, m in pipe.unet.named_modules() if name.endswith("attn2"))
    torch.manual_seed(0)
    states = torch.randn(2, 6, attention.to_q.in_features)
    text = torch.randn(2, 5, attention.to_k.in_features)
    with torch.no_grad():
        weights = attention_weights(attention, states, text)
        queries, keys = attention.to_q(states), attention.to_k(text)
    width = queries.shape[-1] // attention.heads
    for image in range(2):
        for point in range(6):
            rows = []
            for head in range(attention.heads):
                part = slice(head * width, (head + 1) * width)
                products = [float(queries[image, point, part] @ key[part]) / math.sqrt(width) for key in keys[image]]
                powers = [math.exp(product) for product in products]
                rows.append([power / sum(powers) for power in powers])
            # float32 sums of five terms against double precision
            np.testing.assert_allclose(weights[image, point], np.mean(rows, 0), atol=1e-6)


def test_a_map_is_the_mean_over_steps_and_layers_of_the_conditional_half(pipe):
    """Every layer's inputs are written down and averaged the long way."""
    seen = []
    layers = [m for name, m in pipe.unet.named_modules() if name.endswith("attn2")]
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: seen.append((layer, args[0], kwargs["encoder_hidden_states"])),
            with_kwargs=True,
        )
    try:
        with record_attention(pipe) as maps:
            draw(pipe, guidance_scale=5.0, num_images_per_prompt=2, height=16, width=24)
    finally:
        for layer in layers:
            layer._forward_pre_hooks.clear()
            layer._forward_pre_hooks_with_kwargs.clear()
    report = pipe.describe_prompt(PROMPT)
    tokens = len(read_prompt(FIRST, pipe.tokenizer).windows[0])
    for image in range(2):
        maps_by_hand = []
        for layer, states, text in seen:
            assert len(states) == 4  # two images without the prompt, then two with it
            with torch.no_grad():
                weights = attention_weights(layer, states[2 + image : 3 + image], text[2 + image : 3 + image])
            share = weights[0, :, 1 : 1 + tokens].sum(1)
            height = round(math.sqrt(len(share) * 16 / 24))
            grid = share.view(1, 1, height, -1)
            maps_by_hand.append(F.interpolate(grid, size=(16, 24), mode="bilinear")[0, 0].numpy())
        # sums of floats in another order
        np.testing.assert_allclose(
            maps.of(report, 0, len(FIRST), image), np.mean(maps_by_hand, 0), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("long_prompt", LONG_PROMPTS)
def test_positions_are_where_the_states_of_the_tokens_are(pipe, long_prompt):
    """The states of a position change when its token does, and those in front of the token's window do not."""
    sentence = "A small bird sings above the house."
    start = PROMPT.index(sentence, 400)
    changed = PROMPT[:start] + PROMPT[start:].replace("bird", "wolf", 1)
    report = pipe.describe_prompt(PROMPT, long_prompt)
    with torch.no_grad():
        both = [
            pipe.encode_prompt(
                prompt,
                device=torch.device("cpu"),
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
                long_prompt=long_prompt,
            )[0][0]
            for prompt in (PROMPT, changed)
        ]
    differs = (both[0] - both[1]).abs().amax(1) > 1e-6
    for reading in report.readings:
        token = next(i for i, (first, _) in enumerate(reading.offsets) if first >= start + len("A small"))
        if long_prompt == "truncate":
            assert token >= len(reading.positions)
            assert not differs.any()
        else:
            assert differs.nonzero()[0].item() == reading.positions[token]


def test_what_cannot_be_said_is_one_sentence(pipe):
    with record_attention(pipe) as maps:
        pass
    report = pipe.describe_prompt(PROMPT, "truncate")
    with pytest.raises(ValueError, match="no image was drawn while attention was recorded"):
        maps.of(report, 0, 10)
    with record_attention(pipe) as maps:
        draw(pipe, long_prompt="truncate")
    with pytest.raises(ValueError, match="no encoder reads characters 500 to 520"):
        maps.of(report, 500, 520)
    with pytest.raises(ValueError, match="is of a prompt of 248 states, but one of 77 was drawn"):
        maps.of(pipe.describe_prompt(PROMPT, "stretch"), 0, 10)
    sentence = "to 154 states and to 77 in one call: .* of each length in a call of their own"
    with pytest.raises(ValueError, match=sentence), record_attention(pipe):
        draw(pipe, [PROMPT, FIRST], long_prompt="chunk")


def test_sentences_hold_every_letter_that_is_no_space():
    for prompt in (PROMPT, "  one\n\n\n two? three", "", "  ", "猫が座る。犬が走る。"):
        spans = sentence_spans(prompt)
        inside = "".join(prompt[start:stop] for start, stop in spans)
        assert "".join(inside.split()) == "".join(prompt.split())
        assert all(prompt[start:stop].strip() for start, stop in spans)


def test_on_scenes_the_peak_lies_in_the_object_s_cell():
    """Six held-out prompts under every strategy that reads them to the end; more in docs/app.md."""
    pipe = FineLIPStableDiffusionPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    captions = [describe(sample_scene(seed, "test"), seed) for seed in range(6)]
    for long_prompt in ("stretch", "segment"):
        hits = []
        reports = {caption: pipe.describe_prompt(str(caption), long_prompt) for caption in captions}
        for length in {report.readings[0].length for report in reports.values()}:
            alike = [caption for caption, report in reports.items() if report.readings[0].length == length]
            with record_attention(pipe) as maps:
                draw(pipe, [str(caption) for caption in alike], long_prompt=long_prompt, num_inference_steps=10)
            for image, caption in enumerate(alike):
                for fact in caption.facts:
                    start, stop = next(span for span in sentence_spans(caption) if span[0] <= fact.start < span[1])
                    shares = maps.of(reports[caption], start, stop, image)
                    row, column = np.unravel_index(shares.argmax(), maps.size)
                    hits.append(row // CELL_SIZE * 3 + column // CELL_SIZE == fact.object.cell)
        assert np.mean(hits) >= 0.8, (long_prompt, np.mean(hits))
