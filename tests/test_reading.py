"""What long prompts add to a pipeline: windows of whole sentences, blends of two encoders, prompts encoded once."""

import copy
import itertools
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import WIDTH, pixels

from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline, PromptEmbeds
from finelip_diffusion.prompts import LONG_PROMPTS, read_prompt
from finelip_diffusion.text_encoder import save_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def _pipe(_stock, finelip_folder):
    """A long encoder with other weights than the base's, beside the base's own UNet."""
    pipe = FineLIPStableDiffusionPipeline(**_stock.components, finelip=finelip_folder, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(_pipe):
    return copy.copy(_pipe)


@pytest.fixture(scope="module")
def _pipe_xl(_stock_xl, encoder_folder):
    pipe = FineLIPStableDiffusionXLPipeline(
        **_stock_xl.components, finelip=encoder_folder, second_encoder="stretch", add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe_xl(_pipe_xl):
    return copy.copy(_pipe_xl)


def embed(pipe, prompt, **kwargs):
    return pipe.encode_prompt(prompt, CPU, 1, False, **kwargs)[0]


# Windows of whole sentences


def windows_of(prompt, tokenizer, **kwargs):
    reading = read_prompt(prompt, tokenizer, "packed", **kwargs)
    assert reading.dropped == ""
    assert reading.tokens_read == reading.tokens
    bounds = itertools.accumulate((len(window) for window in reading.windows), initial=0)
    return [prompt[reading.offsets[a][0] : reading.offsets[b - 1][1]] for a, b in itertools.pairwise(bounds)], reading


def test_windows_end_with_sentences(tokenizer):
    sentences = [f"There are {n} red cats under a tree, and {n} dogs asleep." for n in range(40)]
    windows, _ = windows_of(" ".join(sentences), tokenizer)
    assert " ".join(windows).split() == " ".join(sentences).split()
    assert all(window.startswith("There are") and window.endswith("asleep.") for window in windows)
    first, second = windows[0].count("."), windows[1].count(".")
    assert len(tokenizer(" ".join(sentences[: first + 1])).input_ids) > 77  # no further sentence would have fitted
    assert first >= 4
    assert second >= 4


def test_a_sentence_longer_than_a_window_is_cut_behind_a_comma(tokenizer):
    tags = [f"a very tall tree number {n}" for n in range(100)]
    windows, _ = windows_of(", ".join(tags), tokenizer)
    assert all(window.endswith(",") for window in windows[:-1])
    assert all(window.startswith("a very") for window in windows)


def test_without_commas_words_stay_whole(tokenizer):
    words = ["antidisestablishmentarianism", "otorhinolaryngologist", "2024", "don't", "well-known"] * 60
    windows, reading = windows_of(" ".join(words), tokenizer)
    assert [word for window in windows for word in window.split()] == words
    assert all(len(window) > 60 for window in reading.windows[:-1])


@pytest.mark.parametrize(
    "prompt",
    ["antidisestablishmentarianism" * 40, "猫が座る犬が走る" * 60, "🐱‍👓" * 80, "a" * 3000, ". " * 300, "\n" * 500],
)
def test_what_has_no_words_is_cut_where_it_must(prompt, tokenizer):
    reading = read_prompt(prompt, tokenizer, "packed")
    assert reading.tokens_read == reading.tokens
    assert all(len(window) <= 75 for window in reading.windows)


def test_the_second_encoder_stands_beside_windows_of_sentences(pipe_xl, text_of):
    pipe_xl.second_encoder = "window"
    first, second = pipe_xl.describe_prompt(text_of(1000)).readings
    assert [len(window) for window in first.windows] == [sum(map(len, span)) for span in second.spans]
    assert first.positions == second.positions
    assert first.length == second.length


@pytest.mark.parametrize("how", LONG_PROMPTS)
def test_five_thousand_tokens(pipe, text_of, how):
    states, negative = pipe.encode_prompt(text_of(5000), CPU, 1, True, text_of(500), long_prompt=how)
    assert states.shape == negative.shape
    assert torch.isfinite(states).all()
    assert states.shape[1] == {"truncate": 77, "stretch": 21 * 248, "auto": 21 * 248, "chunk": 67 * 77}.get(how, 5069)


# Blends


def test_a_blend_of_0_is_the_stock_pipeline_and_of_1_the_long_encoder(pipe, stock, text_of):
    prompt, negative = text_of(75), "dull"
    assert torch.equal(
        pixels(pipe, prompt, negative_prompt=negative, blend=0), pixels(stock, prompt, negative_prompt=negative)
    )
    for count in (75, 300):
        assert torch.equal(pixels(pipe, text_of(count), blend=1), pixels(pipe, text_of(count)))


def test_a_short_prompt_is_blended_in_the_stock_window(pipe, text_of):
    prompt = text_of(60)
    blended, stock, long = (embed(pipe, prompt, **how) for how in ({"blend": 0.3}, {"long_prompt": "truncate"}, {}))
    assert blended.shape == stock.shape == (1, 77, WIDTH)
    torch.testing.assert_close(
        blended, 0.7 * stock + 0.3 * long[:, :77], rtol=0, atol=1e-6
    )  # a rounding of states of order 1


def test_a_long_prompt_is_blended_token_by_token(pipe, text_of):
    prompt = text_of(300)
    blended, long = embed(pipe, prompt, blend=0.25), embed(pipe, prompt)
    stock = embed(pipe, prompt, blend=0)
    assert blended.shape == stock.shape == long.shape == (1, 496, WIDTH)
    torch.testing.assert_close(blended, 0.75 * stock + 0.25 * long, rtol=0, atol=1e-6)
    # The stock side is read sentence by sentence in windows of its own: 72 tokens, six sentences.
    reading = pipe.describe_prompt(prompt, blend=0.25)
    ours, beside = reading.readings
    assert ours.positions == beside.positions
    window = embed(pipe, text_of(72), long_prompt="truncate")
    torch.testing.assert_close(stock[:, :73], window[:, :73], rtol=0, atol=2e-5)  # other batches, other rounding


def test_a_blend_decides_for_the_whole_call(pipe, text_of):
    states, negative = pipe.encode_prompt("a cat", CPU, 1, True, text_of(100), blend=0.5)
    assert states.shape == negative.shape == (1, 248, WIDTH)


def test_both_places_of_sdxl_are_blended(pipe_xl, stock_xl, text_of):
    assert torch.equal(pixels(pipe_xl, text_of(40), blend=0), pixels(stock_xl, text_of(40)))
    how = {"device": CPU, "do_classifier_free_guidance": False}
    half, stock, long = (
        pipe_xl.encode_prompt(text_of(40), **how, **kind) for kind in ({"blend": 0.5}, {"long_prompt": "truncate"}, {})
    )
    torch.testing.assert_close(half[0], (stock[0] + long[0][:, :77]) / 2, rtol=0, atol=1e-6)
    torch.testing.assert_close(half[2], (stock[2] + long[2]) / 2, rtol=0, atol=1e-6)


def test_blends_that_cannot_be_are_refused(pipe, finelip_folder, _stock):
    with pytest.raises(ValueError, match="blend=1.5 is not a share"):
        pipe("a cat", blend=1.5)
    with pytest.raises(ValueError, match="blend=0.5 .* long_prompt='chunk' reads with the stock encoder alone"):
        pipe("a cat", blend=0.5, long_prompt="chunk")
    assert pipe.blend == 1
    pipe.register_modules(stock_text_encoder=None, stock_tokenizer=None)
    with pytest.raises(ValueError, match="blend=0.5 reads with stock_text_encoder, which this pipeline does not have"):
        pipe("a cat", blend=0.5)


def test_the_blend_of_a_pipeline(stable_diffusion_folder, finelip_folder):
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, finelip_folder, blend=0.5)
    assert pipe.blend == 0.5
    assert not torch.equal(embed(pipe, "a cat"), embed(pipe, "a cat", blend=0.6))
    with pytest.raises(ValueError, match="blend=0.5 .* long_prompt='chunk' reads with the stock encoder alone"):
        embed(pipe, "a cat", long_prompt="chunk")  # as in a call
    with pytest.raises(ValueError, match="blend=0.5 .* long_prompt='chunk' reads with the stock encoder alone"):
        pipe.long_prompt = "chunk"
    assert torch.equal(embed(pipe, "a cat", long_prompt="chunk", blend=1), embed(pipe, "a cat", blend=0))


def test_what_another_thread_describes_changes_no_drawing(pipe, text_of):
    """As on a page, where people type while others draw: the settings of a call are its own."""
    prompt, seen = text_of(300), []

    def describe(pipe, step, timestep, tensors):
        with ThreadPoolExecutor() as threads:
            seen.append(threads.submit(pipe.describe_prompt, prompt, "truncate").result().long_prompt)
        seen.append(pipe.long_prompt)
        return tensors

    inside = pixels(pipe, prompt, long_prompt="chunk", callback_on_step_end=describe)
    assert seen == ["truncate", "stretch"] * 2  # the pipeline's own setting, which no call touches
    assert torch.equal(inside, pixels(pipe, prompt, long_prompt="chunk"))
    assert pipe.long_prompt == "stretch"


# Prompts encoded once


def test_encoding_once_draws_the_same_pixels(pipe, text_of, tmp_path):
    prompt, negative = text_of(300), "dull"
    embeds = pipe.encode(prompt, negative)
    expected = pixels(pipe, prompt, negative_prompt=negative)
    assert torch.equal(pixels(pipe, **embeds), expected)
    embeds.save(tmp_path / "prompt.safetensors")
    again = PromptEmbeds.load(tmp_path / "prompt.safetensors")
    assert dict(again).keys() == {"prompt_embeds", "negative_prompt_embeds"}
    assert again.metadata == embeds.metadata
    assert "dull" in again.metadata["encoded"]
    assert torch.equal(pixels(pipe, **again), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["prompt.safetensors"]


def test_drawing_from_ready_states_runs_no_encoder(pipe, text_of):
    embeds = pipe.encode([text_of(100), "a cat"], weighting="a1111", clip_skip=1)
    calls = []
    hooks = [
        encoder.register_forward_hook(lambda *args: calls.append(1))
        for encoder in (pipe.text_encoder, pipe.stock_text_encoder)
    ]
    assert len(pixels(pipe, **embeds, num_images_per_prompt=2)) == 4
    assert not calls
    pixels(pipe, "a cat")
    assert calls
    for hook in hooks:
        hook.remove()


def test_encoding_once_for_sdxl(pipe_xl, text_of, tmp_path):
    how = {"prompt_2": "two dogs", "negative_prompt": "dull"}
    embeds = pipe_xl.encode(text_of(100), **how, blend=0.5)
    assert len(embeds) == 4
    embeds.save(tmp_path / "prompt.safetensors")
    again = PromptEmbeds.load(tmp_path / "prompt.safetensors")
    assert torch.equal(pixels(pipe_xl, **again), pixels(pipe_xl, text_of(100), **how, blend=0.5))


def test_files_that_hold_no_prompts_are_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("a cat")
    save_file({"prompt": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other"):
        with pytest.raises(ValueError, match=f"{name}.safetensors holds no encoded prompts"):
            PromptEmbeds.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match="missing"):
        PromptEmbeds.load(tmp_path / "missing.safetensors")


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(pipe, tmp_path):
    """A limit on the size of files stands for the disk."""
    sentence = "cannot be written .*: free some space or choose another folder"
    path, usual = tmp_path / "prompt.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    pipe.encode("a cat").save(path)
    before, embeds = path.read_bytes(), pipe.encode("two dogs")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, usual[1]))
    try:
        with pytest.raises(ValueError, match=sentence):
            embeds.save(path)
        with pytest.raises(ValueError, match=sentence):
            save_checkpoint(pipe.text_encoder, pipe.tokenizer, tmp_path / "encoder.safetensors", layout="comfyui")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["prompt.safetensors"]
