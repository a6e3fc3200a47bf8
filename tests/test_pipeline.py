"""FineLIPStableDiffusionPipeline against diffusers' own pipeline, at tiny size."""

import copy
import logging

import pytest
import torch
from compel import Compel, SplitLongTextMode
from diffusers import StableDiffusionPipeline
from tiny_models import LAYERS, WIDTH, pixels

from finelip_diffusion import FineLIPStableDiffusionPipeline
from finelip_diffusion.prompts import LONG_PROMPTS

COUNTS = [0, 1, 75, 76, 77, 78, 247, 248, 249, 2000]


@pytest.fixture(scope="module")
def _pipe(stable_diffusion_folder, finelip_folder):
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, finelip=finelip_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(_pipe):
    """A long encoder with other weights than the base's; shared weights, so to be left as they are."""
    return copy.copy(_pipe)


@pytest.fixture(scope="module")
def _untrained(_stock):
    pipe = FineLIPStableDiffusionPipeline(**_stock.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def untrained(_untrained):
    """The base's own encoder and UNet."""
    return copy.copy(_untrained)


def embed(pipe, prompt, negative_prompt=None, **kwargs):
    return pipe.encode_prompt(prompt, torch.device("cpu"), 1, True, negative_prompt, **kwargs)


# Parity with diffusers


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"negative_prompt": "blurry, dull, grey"},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2},
        {"eta": 1.0},
    ],
    ids=str,
)
def test_truncate_gives_the_pixels_of_the_stock_pipeline(stock, untrained, text_of, call):
    prompt = text_of(120)
    assert torch.equal(pixels(stock, prompt, **call), pixels(untrained, prompt, long_prompt="truncate", **call))


def test_truncate_gives_the_pixels_of_the_stock_pipeline_for_a_batch(stock, untrained, text_of):
    prompts = [text_of(n) for n in (0, 5, 300)]
    negatives = ["", "dull", text_of(90)]
    ours = pixels(untrained, prompts, negative_prompt=negatives, long_prompt="truncate")
    assert torch.equal(ours, pixels(stock, prompts, negative_prompt=negatives))


# What long prompts change


def test_a_word_after_token_77_counts_under_stretch_alone(pipe, text_of):
    ending_a, ending_b = text_of(100) + " a crown", text_of(100) + " a candle"
    for how in ("stretch", "chunk", "segment", "auto"):
        assert not torch.equal(pixels(pipe, ending_a, long_prompt=how), pixels(pipe, ending_b, long_prompt=how)), how
    assert torch.equal(pixels(pipe, ending_a, long_prompt="truncate"), pixels(pipe, ending_b, long_prompt="truncate"))


@pytest.mark.parametrize("how", LONG_PROMPTS)
def test_the_last_word_of_a_very_long_prompt_counts(pipe, text_of, how):
    first, second = embed(pipe, text_of(1999) + " crown", long_prompt=how)[0], None
    second = embed(pipe, text_of(1999) + " candle", long_prompt=how)[0]
    assert torch.equal(first, second) == (how == "truncate")


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("how", LONG_PROMPTS)
def test_every_strategy_at_every_length(pipe, text_of, how, count):
    prompt = text_of(count)
    report = pipe.describe_prompt(prompt, how)
    assert report.tokens == count
    assert sum(report.windows) == (min(count, 75) if how == "truncate" else count)
    assert bool(report.dropped) == (how == "truncate" and count > 75)
    assert prompt.endswith(report.dropped)
    expected = {
        "stretch": 248 * max(-(-count // 246), 1),
        "truncate": 77,
        "chunk": 77 * max(-(-count // 75), 1),
        "segment": 77 + count - ((count - 1) % 12 + 1 if count else 0),
    }
    expected["auto"] = expected["truncate" if count <= 75 else "stretch"]
    states, negative = embed(pipe, prompt, long_prompt=how)
    assert report.readings[0].length == expected[how]
    assert states.shape == negative.shape == (1, expected[how], WIDTH)
    assert torch.isfinite(states).all()


def test_within_the_long_window_stretch_is_the_stock_pipeline_with_the_long_encoder(pipe, text_of):
    stock = StableDiffusionPipeline(
        **{name: part for name, part in pipe.components.items() if not name.startswith("stock_")},
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    prompt, negative = text_of(246), "dull"
    assert torch.equal(pixels(pipe, prompt, negative_prompt=negative), pixels(stock, prompt, negative_prompt=negative))


def test_auto_reads_short_calls_in_the_stock_window_and_others_in_the_long_one(pipe, text_of):
    short, long = text_of(75), text_of(76)
    assert torch.equal(embed(pipe, short, long_prompt="auto")[0], embed(pipe, short, long_prompt="truncate")[0])
    assert torch.equal(embed(pipe, long, long_prompt="auto")[0], embed(pipe, long, long_prompt="stretch")[0])
    with_long_negative = embed(pipe, short, long, long_prompt="auto")  # one encoder for both sides of the guidance
    assert torch.equal(with_long_negative[0], embed(pipe, short, long_prompt="stretch")[0])


def test_windows_behind_the_first_are_read_as_prompts_of_their_own(pipe, tokenizer, text_of):
    prompt = text_of(300)
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    for how, size in (("stretch", 240), ("chunk", 75)):  # the long window ends with a sentence of twelve tokens
        states = embed(pipe, prompt, long_prompt=how)[0][0]
        last = tokenizer.decode(ids[size * (299 // size) :])
        alone = embed(pipe, last, long_prompt=how)[0][0]
        # one batch of windows against a batch of one: float32 rounding in the matrix products
        torch.testing.assert_close(states[-len(alone) :], alone, rtol=0, atol=2e-5)


def test_segment_joins_the_sentences_states(pipe, tokenizer):
    prompt, sentences = "A cat. Two red dogs run!", ["A cat.", "Two red dogs run!"]
    encoder, alone = pipe.stock_text_encoder, []
    for sentence in sentences:
        inputs = tokenizer(sentence, padding="max_length", return_tensors="pt")
        alone.append(
            (encoder(inputs.input_ids).last_hidden_state[0], len(inputs.input_ids[0][inputs.attention_mask[0] == 1]))
        )
    (first, n), (second, _) = alone
    by_hand = torch.cat([first[:1], first[1 : n - 1], second[1:]])  # start once; end and padding of the last
    states = embed(pipe, prompt, long_prompt="segment")[0][0]
    torch.testing.assert_close(states, by_hand, rtol=0, atol=2e-5)  # a batch of two against two of one


def test_segment_reads_a_single_sentence_as_diffusers_does(pipe, text_of):
    prompt = "a red cat under a green tree"
    assert torch.equal(embed(pipe, prompt, long_prompt="segment")[0], embed(pipe, prompt, long_prompt="truncate")[0])


@pytest.mark.parametrize("count", [0, 5, 75, 76, 300])
def test_chunk_equals_compel(pipe, text_of, count):
    prompt = text_of(count)
    theirs = Compel(
        tokenizer=pipe.stock_tokenizer,
        text_encoder=pipe.stock_text_encoder,
        truncate_long_prompts=False,
        split_long_text_mode=SplitLongTextMode.BRUTAL,  # at 75 tokens, wherever that is
    )(prompt)
    ours = embed(pipe, prompt, long_prompt="chunk")[0]
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)  # theirs reads window by window, ours in one batch


# Lengths, batches, ready embeddings


@pytest.mark.parametrize("how", LONG_PROMPTS)
@pytest.mark.parametrize("counts", [(5, 600), (600, 5)])
def test_positive_and_negative_come_out_at_one_length(pipe, text_of, how, counts):
    prompt, negative = map(text_of, counts)
    states, negative_states = embed(pipe, prompt, negative, long_prompt=how)
    assert states.shape == negative_states.shape
    if how != "auto":  # which decides for the call
        short, alone = (states, prompt) if counts[0] == 5 else (negative_states, negative)
        expected = pipe.encode_prompt(alone, torch.device("cpu"), 1, False, long_prompt=how)[0]
        head = expected.shape[1]
        torch.testing.assert_close(short[:, :head], expected, rtol=0, atol=2e-5)
        empty = pipe.encode_prompt("", torch.device("cpu"), 1, False, long_prompt=how)[0]
        tail = short[:, head : head + empty.shape[1]]
        torch.testing.assert_close(tail, empty[:, : tail.shape[1]], rtol=0, atol=2e-5)
    assert torch.isfinite(pixels(pipe, prompt, negative_prompt=negative, long_prompt=how)).all()


@pytest.mark.parametrize("how", LONG_PROMPTS)
def test_a_prompt_reads_the_same_alone_and_in_a_batch(pipe, text_of, how):
    prompts = [text_of(n) for n in (300, 3, 0, 299)]
    batch = embed(pipe, prompts, [""] * 4, long_prompt=how)[0]
    how = "stretch" if how == "auto" else how
    for states, prompt in zip(batch, prompts, strict=True):
        alone = embed(pipe, prompt, long_prompt=how)[0][0]
        torch.testing.assert_close(states[: len(alone)], alone, rtol=0, atol=2e-5)  # other batch size, other rounding


def test_one_negative_prompt_serves_a_batch(pipe, text_of):
    prompts = [text_of(90), "a cat"]
    assert torch.equal(
        pixels(pipe, prompts, negative_prompt="dull"), pixels(pipe, prompts, negative_prompt=["dull", "dull"])
    )
    with pytest.raises(ValueError, match="3 negative prompts for 2 prompts"):
        pipe(prompts, negative_prompt=["dull"] * 3)


def test_several_images_a_prompt(pipe, text_of):
    prompts = [text_of(90), "a cat"]
    states, negative = pipe.encode_prompt(prompts, torch.device("cpu"), 3, True)
    assert states.shape == negative.shape == (6, 248, WIDTH)
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[2], states[3])
    assert pixels(pipe, prompts, num_images_per_prompt=2).shape[0] == 4


def test_ready_embeddings_pass_through(pipe, text_of):
    prompt, negative = text_of(90), "dull"
    states, negative_states = embed(pipe, prompt, negative)
    through = embed(pipe, None, prompt_embeds=states, negative_prompt_embeds=negative_states)
    assert torch.equal(through[0], states)
    assert torch.equal(through[1], negative_states)
    ready = pixels(pipe, prompt_embeds=states, negative_prompt_embeds=negative_states)
    assert torch.equal(ready, pixels(pipe, prompt, negative_prompt=negative))
    assert torch.equal(pixels(pipe, prompt_embeds=states, negative_prompt=negative), ready)


def test_short_ready_embeddings_are_brought_to_the_length_of_a_long_negative(pipe, text_of):
    ready = embed(pipe, "a cat", long_prompt="chunk")[0]
    states, negative = embed(pipe, None, text_of(100), prompt_embeds=ready, long_prompt="chunk")
    assert states.shape == negative.shape == (1, 154, WIDTH)
    assert torch.equal(states[:, :77], ready)
    torch.testing.assert_close(states[:, 77:], embed(pipe, "", long_prompt="chunk")[0], rtol=0, atol=2e-5)


# clip_skip, callbacks, generators


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip_is_an_earlier_layer_and_the_final_norm(pipe, tokenizer, text_of, skip):
    inputs = tokenizer(text_of(20), padding="max_length", return_tensors="pt")
    output = pipe.stock_text_encoder(inputs.input_ids, output_hidden_states=True)
    by_hand = pipe.stock_text_encoder.final_layer_norm(output.hidden_states[-(skip + 1)])
    states, negative = embed(pipe, text_of(20), clip_skip=skip, long_prompt="truncate")
    assert torch.equal(states, by_hand)
    assert torch.equal(negative, embed(pipe, text_of(20), long_prompt="truncate")[1])
    if skip == 0:
        assert torch.equal(states, output.last_hidden_state)
    assert torch.isfinite(pixels(pipe, text_of(100), clip_skip=skip)).all()


@pytest.mark.parametrize("skip", [-1, LAYERS + 1])
def test_a_layer_that_does_not_exist_is_refused(pipe, skip):
    with pytest.raises(ValueError, match=f"text encoder that has {LAYERS} layers"):
        pipe("a cat", clip_skip=skip)


def test_callbacks_see_and_change_the_embeddings(pipe, text_of):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, tensors["prompt_embeds"].shape))
        return tensors

    pixels(pipe, text_of(300), callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert seen == [(0, (2, 496, WIDTH)), (1, (2, 496, WIDTH))]


def test_a_generator_for_each_image(pipe, text_of):
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    both = pixels(pipe, [text_of(90)] * 2, generator=generators)
    for image, seed in zip(both, (4, 5), strict=True):
        # a batch of two against one
        torch.testing.assert_close(image, pixels(pipe, text_of(90), seed=seed)[0], rtol=0, atol=1e-4)


# Reports and warnings


def test_dropped_text_is_warned_about_once_and_in_words(pipe, text_of, caplog):
    prompt = text_of(75) + " and the rest, Unseen."
    with caplog.at_level(logging.WARNING):
        pipe([prompt, prompt], long_prompt="truncate", num_inference_steps=1)
    assert [record.name for record in caplog.records] == ["finelip_diffusion.prompt_encoder"]
    assert caplog.messages == [
        "long_prompt='truncate' reads the first window alone; 6 of 81 tokens dropped: 'and the rest, Unseen.'"
    ]
    assert pipe.describe_prompt(prompt, "truncate").dropped == "and the rest, Unseen."


def test_reports_of_a_list(pipe, text_of):
    reports = pipe.describe_prompt([text_of(3), text_of(300)], "auto")
    assert [report.tokens for report in reports] == [3, 300]
    assert [report.long_prompt for report in reports] == ["truncate", "stretch"]  # each as it is read alone


def test_the_strategy_of_one_call_does_not_stay(pipe):
    pipe("a cat", long_prompt="chunk", num_inference_steps=1)
    assert pipe.long_prompt == "stretch"
    with pytest.raises(ValueError, match="height"):
        pipe("a cat", long_prompt="chunk", height=7, width=7)
    assert pipe.long_prompt == "stretch"
    pipe.long_prompt = "segment"
    assert pipe.describe_prompt("a cat").long_prompt == "segment"


@pytest.mark.parametrize(
    "call", [lambda pipe: pipe("a cat", long_prompt="fold"), lambda p: p.describe_prompt("", "fold")]
)
def test_an_unknown_strategy_is_refused(pipe, call):
    with pytest.raises(ValueError, match="long_prompt='fold' is unknown: choose from stretch, truncate"):
        call(pipe)
