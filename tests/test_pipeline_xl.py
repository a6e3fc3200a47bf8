"""FineLIPStableDiffusionXLPipeline against diffusers' own pipeline, at tiny size."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from tiny_models import WIDTH, pixels, tiny_text_encoder

from finelip_diffusion import FineLIPStableDiffusionXLPipeline
from finelip_diffusion.positions import stretch_positions
from finelip_diffusion.prompts import LONG_PROMPTS
from finelip_diffusion.tokenizer import clip_tokenizer

ROOT = Path(__file__).resolve().parents[1]
COUNTS = [0, 1, 76, 77, 78, 247, 248, 249, 2000]
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def _pipe(_stock_xl, encoder_folder):
    pipe = FineLIPStableDiffusionXLPipeline(
        **_stock_xl.components, finelip=encoder_folder, second_encoder="stretch", add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(_pipe):
    return copy.copy(_pipe)


@pytest.mark.parametrize(
    "call",
    [{}, {"negative_prompt": "blurry"}, {"prompt_2": "two dogs"}, {"clip_skip": 1}, {"num_images_per_prompt": 2}],
    ids=str,
)
def test_truncate_gives_the_pixels_of_the_stock_pipeline(stock_xl, pipe, text_of, call):
    prompt = text_of(120)
    assert torch.equal(pixels(stock_xl, prompt, **call), pixels(pipe, prompt, long_prompt="truncate", **call))


def test_without_forced_zeros_the_empty_negative_prompt_is_encoded(stock_xl, text_of):
    stock = StableDiffusionXLPipeline(**stock_xl.components, force_zeros_for_empty_prompt=False, add_watermarker=False)
    ours = FineLIPStableDiffusionXLPipeline(
        **stock_xl.components, force_zeros_for_empty_prompt=False, add_watermarker=False
    )
    for each in (stock, ours):
        each.set_progress_bar_config(disable=True)
    assert torch.equal(pixels(stock, text_of(9)), pixels(ours, text_of(9), long_prompt="truncate"))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("how", LONG_PROMPTS)
@pytest.mark.parametrize("second_encoder", ["stretch", "window"])
def test_every_strategy_at_every_length(pipe, text_of, how, count, second_encoder):
    pipe.second_encoder = second_encoder
    prompt = text_of(count)
    report = pipe.describe_prompt(prompt, how)
    states, zeros, pooled, _ = pipe.encode_prompt(prompt, device=DEVICE, long_prompt=how)
    assert [reading.tokens for reading in report.readings] == [count, count]
    assert len({reading.length for reading in report.readings}) == 1
    assert states.shape == zeros.shape == (1, report.readings[0].length, 2 * WIDTH)
    assert pooled.shape == (1, WIDTH)
    assert torch.isfinite(states).all()
    assert report.dropped == "" or how == "truncate"


@pytest.mark.parametrize("second_encoder", ["stretch", "window"])
def test_a_word_after_token_77_counts(pipe, text_of, second_encoder):
    pipe.second_encoder = second_encoder
    first, second = (pixels(pipe, text_of(100) + ending) for ending in (" a crown", " a candle"))
    assert not torch.equal(first, second)
    first, second = (
        pixels(pipe, text_of(100) + ending, long_prompt="truncate") for ending in (" a crown", " a candle")
    )
    assert torch.equal(first, second)


def test_both_encoders_give_their_penultimate_states(pipe, text_of):
    prompt = text_of(100)
    states, _, pooled, _ = pipe.encode_prompt(prompt, device=DEVICE)
    by_hand = []
    for encoder, tokenizer in ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)):
        ids = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        by_hand.append(output.hidden_states[-2])
    assert torch.equal(states, torch.cat(by_hand, dim=-1))
    assert torch.equal(pooled, output.text_embeds)


def test_last_norm_is_what_the_original_scripts_feed(pipe, text_of):
    prompt = text_of(100)
    pipe.hidden_state = "last_norm"
    states = pipe.encode_prompt(prompt, device=DEVICE)[0]
    ids = pipe.tokenizer_2(prompt, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(states[..., WIDTH:], pipe.text_encoder_2(ids).last_hidden_state)


def test_the_second_encoder_in_windows_stands_token_by_token_beside_the_first(pipe, tokenizer, text_of):
    pipe.second_encoder = "window"
    prompt = text_of(200)
    second = pipe.encode_prompt(prompt, device=DEVICE)[0][0, :, WIDTH:]
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    position = 1
    for start in range(0, 200, 72):  # sentences of twelve tokens
        part = ids[start : start + 72]
        inputs = pipe.stock_tokenizer_2(tokenizer.decode(part), padding="max_length", return_tensors="pt")
        window = pipe.stock_text_encoder_2(inputs.input_ids, output_hidden_states=True).hidden_states[-2][0]
        # a batch of windows against one window: float32 rounding in the matrix products
        torch.testing.assert_close(
            second[position : position + len(part)], window[1 : 1 + len(part)], rtol=0, atol=5e-5
        )
        position += len(part)
    torch.testing.assert_close(second[position], window[1 + len(part)], rtol=0, atol=5e-5)  # one end token
    assert len(second) == 248


def test_the_pooled_output_is_that_of_the_first_window(pipe, text_of):
    pooled = pipe.encode_prompt(text_of(300), device=DEVICE, long_prompt="chunk")[2]
    first = pipe.encode_prompt(text_of(300), device=DEVICE, long_prompt="truncate")[2]
    torch.testing.assert_close(pooled, first, rtol=0, atol=5e-5)  # a batch of four windows against one


def test_lengths_are_balanced_over_prompts_encoders_and_the_negative_side(pipe, text_of):
    outputs = pipe.encode_prompt(
        [text_of(3), text_of(300)],
        [text_of(600), text_of(3)],
        device=DEVICE,
        negative_prompt="dull",
        num_images_per_prompt=2,
    )
    assert outputs[0].shape == outputs[1].shape == (4, 3 * 248, 2 * WIDTH)
    assert outputs[2].shape == outputs[3].shape == (4, WIDTH)


def test_ready_embeddings_pass_through(pipe, text_of):
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    ready = dict(zip(names, pipe.encode_prompt(text_of(90), device=DEVICE, negative_prompt="dull"), strict=True))
    assert torch.equal(pixels(pipe, **ready), pixels(pipe, text_of(90), negative_prompt="dull"))


def test_a_stock_base_is_stretched_in_both_places(pipe, stock_xl):
    table = stock_xl.text_encoder_2.text_model.embeddings.position_embedding.weight
    long = pipe.text_encoder_2.text_model.embeddings.position_embedding.weight
    assert torch.equal(long, stretch_positions(table))
    assert pipe.stock_text_encoder_2 is stock_xl.text_encoder_2
    assert pipe.tokenizer_2.pad_token == "!"  # as SDXL's second tokenizer has it


def test_a_saved_pipeline_gives_the_same_pixels_in_plain_diffusers(pipe, text_of, tmp_path):
    pipe.save_pretrained(tmp_path)
    plain = DiffusionPipeline.from_pretrained(tmp_path, add_watermarker=False)
    stretched = {"long_prompt": "stretch", "second_encoder": "stretch"}
    again = FineLIPStableDiffusionXLPipeline.from_pretrained(tmp_path, add_watermarker=False, **stretched)
    assert type(plain) is StableDiffusionXLPipeline
    for each in (plain, again):
        each.set_progress_bar_config(disable=True)
    # weights in a mapped file lie at other addresses, and the kernels for them may round the last bit otherwise
    torch.testing.assert_close(pixels(plain, text_of(240)), pixels(again, text_of(240)), rtol=0, atol=1e-5)
    for how in ("stretch", "truncate", "chunk"):
        ours, theirs = (pixels(each, text_of(240), long_prompt=how) for each in (pipe, again))
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_custom_pipeline(stable_diffusion_xl_folder, encoder_folder, pipe, text_of, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    custom = DiffusionPipeline.from_pretrained(
        stable_diffusion_xl_folder,
        custom_pipeline=str(ROOT / "pipelines" / "finelip_stable_diffusion_xl.py"),
        trust_remote_code=True,
        finelip=encoder_folder,
        second_encoder="window",
        add_watermarker=False,
    )
    custom.set_progress_bar_config(disable=True)
    pipe.second_encoder = "window"
    assert type(custom).__name__ == "FineLIPStableDiffusionXLPipeline"
    # weights in a mapped file lie at other addresses, and the kernels for them may round the last bit otherwise
    torch.testing.assert_close(pixels(custom, text_of(120)), pixels(pipe, text_of(120)), rtol=0, atol=1e-5)


def test_wrong_widths_and_unknown_names_are_refused(stock_xl, tmp_path):
    tiny_text_encoder(1, width=WIDTH // 2, positions=248).save_pretrained(tmp_path / "text_encoder")
    clip_tokenizer(248).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"48 wide \(16 \+ 32\).* 64"):
        FineLIPStableDiffusionXLPipeline(**stock_xl.components, finelip=tmp_path, add_watermarker=False)
    for wrong in ({"second_encoder": "fold"}, {"hidden_state": "first"}):
        with pytest.raises(ValueError, match="is unknown: choose from"):
            FineLIPStableDiffusionXLPipeline(**stock_xl.components, add_watermarker=False, **wrong)


def test_dropped_text_is_warned_about_once(pipe, text_of, caplog):
    with caplog.at_level(logging.WARNING):
        pixels(pipe, text_of(75) + " and the rest", long_prompt="truncate")
    assert [message.split("; ")[1] for message in caplog.messages] == ["3 of 78 tokens dropped: 'and the rest'"]
