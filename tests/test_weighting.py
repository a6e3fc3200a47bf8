"""Weights of words: their syntax, and compel's arithmetic for them in windows of ours."""

import copy
import logging
import random
import sys

import pytest
import torch
from compel import Compel, ReturnedEmbeddingsType, SplitLongTextMode
from tiny_models import WIDTH

from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline
from finelip_diffusion.prompts import LONG_PROMPTS
from finelip_diffusion.weighting import parse_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def _pipe(stable_diffusion_folder, finelip_folder):
    return FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, finelip=finelip_folder)


@pytest.fixture
def pipe(_pipe):
    return copy.copy(_pipe)


@pytest.fixture(scope="module")
def pipe_xl(_stock_xl, encoder_folder):
    return FineLIPStableDiffusionXLPipeline(
        **_stock_xl.components, finelip=encoder_folder, second_encoder="stretch", add_watermarker=False
    )


def embed(pipe, prompt, **kwargs):
    return pipe.encode_prompt(prompt, CPU, 1, False, **kwargs)[0]


def compel_of(pipe, **kwargs):
    mode = SplitLongTextMode.BRUTAL
    return Compel(pipe.tokenizer, pipe.text_encoder, truncate_long_prompts=False, split_long_text_mode=mode, **kwargs)


# Syntax


def read(prompt, weighting="a1111"):
    ((_, weighted),) = parse_weights(prompt, weighting)
    return weighted.text, [(weighted.text[start:stop], weight) for start, stop, weight in weighted.weights]


@pytest.mark.parametrize(
    ("prompt", "text", "weights"),
    [
        ("a (cat:1.3) here", "a cat here", [("cat", 1.3)]),
        ("a ((cat)) here", "a cat here", [("cat", 1.21)]),
        ("a [cat] here", "a cat here", [("cat", 0.909090909)]),
        ("a ([cat]) here", "a cat here", []),
        ("(a (cat:1.2):1.5)", "a cat", [("a ", 1.5), ("cat", 1.8)]),
        ("((cat:1.2))", "cat", [("cat", 1.32)]),
        ("(a cat:.5)", "a cat", [("a cat", 0.5)]),
        ("(a cat:0)", "a cat", [("a cat", 0)]),
        ("(a: cat)", "a: cat", [("a: cat", 1.1)]),
        ("[cat:1.2]", "cat:1.2", [("cat:1.2", 0.909090909)]),
        ("((a)(cat):1.2)", "acat", [("acat", 1.32)]),
        (r"a \(cat\) \[b\] (c \) d:1.2)", "a (cat) [b] c ) d", [("c ) d", 1.2)]),
        (r"a \\(cat)", "a \\cat", [("cat", 1.1)]),
        (r"a\b", r"a\b", []),
        ("(cat:1)", "cat", []),
        ("BREAKFAST", "BREAKFAST", []),
        ("", "", []),
    ],
)
def test_the_syntax_of_a1111(prompt, text, weights):
    assert read(prompt) == (text, weights)


@pytest.mark.parametrize(
    ("prompt", "text", "weights", "unmatched"),
    [
        ("a (cat", "a (cat", [], "("),
        ("a cat) (b:1.2)", "a cat) b", [("b", 1.2)], ")"),
        ("(a [b) c]", "a [b c]", [("a [b", 1.1)], "[]"),
        ("(a:1.2", "(a:1.2", [], "("),
        (":-) and :-(", ":-) and :-(", [], ")("),
    ],
)
def test_brackets_without_a_partner_are_text(prompt, text, weights, unmatched):
    assert read(prompt) == (text, weights)
    assert parse_weights(prompt, "a1111")[0][1].unmatched == unmatched


def test_break_begins_a_part():
    ((_, weighted),) = parse_weights("a cat BREAK two (dogs BREAK asleep:1.2)", "a1111")
    assert weighted.text == "a cat two dogs asleep"
    assert [weighted.text[start:] for start, _ in weighted.parts] == [weighted.text, "two dogs asleep", "asleep"]
    assert [weighted.text[start:stop] for start, stop, _ in weighted.weights] == ["dogs", "asleep"]


def test_any_text_can_be_read():
    """Nothing but syntax disappears, and runs lie in order inside the text."""
    draw = random.Random(0)
    for _ in range(2000):
        prompt = "".join(draw.choices("aab  ()[]:\\\\.12", k=draw.randint(0, 40)))
        ((_, weighted),) = parse_weights(prompt, "a1111")
        letters = [character for character in prompt if character in "ab"]
        assert [character for character in weighted.text if character in "ab"] == letters, prompt
        bounds = [bound for run in weighted.weights for bound in run[:2]]
        assert bounds == sorted(bounds), prompt
        assert all(0 <= bound <= len(weighted.text) for bound in bounds), prompt


@pytest.mark.parametrize(
    ("prompt", "text", "weights"),
    [
        ("a (red cat)1.3 here", "a red cat here", [("red cat", 1.3)]),
        ("a cat++ here", "a cat here", [("cat", 1.21)]),
        ("a (b (c)1.2 d)0.5", "a b c d", [("b", 0.5), ("c", 0.6), ("d", 0.5)]),
        ('("a cat", "a dog").and()', "a cat a dog", []),
    ],
)
def test_the_syntax_of_compel(prompt, text, weights):
    assert read(prompt, "compel") == (text, weights)


@pytest.mark.parametrize(
    ("prompt", "weighting", "message"),
    [
        ("a (cat:-1)", "a1111", "weight -1 of 'cat': weights are at least 0"),
        ("a cat.swap(dog)", "compel", "swap.* cross-attention control"),
        ("a cat withLora(style, 0.5)", "compel", "load_lora_weights"),
        ('("a", "b").blend(1, -1)', "compel", "add up to nothing"),
    ],
)
def test_what_cannot_be_read_is_refused(prompt, weighting, message):
    with pytest.raises(ValueError, match=message):
        parse_weights(prompt, weighting)


def test_without_compel_a_sentence_says_so(pipe, monkeypatch):
    for module in ("compel", "compel.embeddings_provider"):
        monkeypatch.setitem(sys.modules, module, None)
    assert torch.equal(embed(pipe, "a (cat:1)", weighting="a1111"), embed(pipe, "a cat"))  # nothing to weigh
    for prompt, weighting in (("a (cat:1.3)", "a1111"), ("a cat++ never parsed before", "compel")):
        with pytest.raises(ValueError, match="need compel, which is not installed: pip install compel"):
            embed(pipe, prompt, weighting=weighting)


# States


@pytest.mark.parametrize("how", LONG_PROMPTS)
@pytest.mark.parametrize("weighting", ["a1111", "compel"])
def test_weights_of_one_change_no_bit(pipe, text_of, how, weighting):
    plain = text_of(40) + " a tall crown. " + text_of(220)
    marked = plain.replace("a tall crown", "a (tall:1.0) ([crown])" if weighting == "a1111" else "a (tall)1.0 (crown)")
    assert marked != plain
    assert torch.equal(embed(pipe, marked, weighting=weighting, long_prompt=how), embed(pipe, plain, long_prompt=how))


def test_by_default_brackets_are_text(pipe):
    assert pipe.weighting == "plain"
    assert (
        pipe.describe_prompt("a (cat:1.3)").tokens > pipe.describe_prompt("a (cat:1.3)", weighting="a1111").tokens == 2
    )


WEIGHTED = [
    ("a (red:1.5) cat under a tree", "a (red)1.5 cat under a tree"),
    ("a (red:1.5) cat under a ((tall)) tree", "a (red)1.5 cat under a (tall)1.21 tree"),
    ("a (red:0.4) cat under a tree", "a (red)0.4 cat under a tree"),
    ("a (red:0) cat (under:0.7) a (tree:1.3)", "a (red)0 cat (under)0.7 a (tree)1.3"),
    ("(a red cat:1.2)", "(a red cat)1.2"),
]


@pytest.mark.parametrize(("a1111", "compel"), WEIGHTED)
def test_both_syntaxes_give_what_compel_gives(pipe, a1111, compel):
    """Compel itself on the same encoder; to rounding, since other batches go through the encoder."""
    theirs = compel_of(pipe)(compel)
    for prompt, weighting in ((a1111, "a1111"), (compel, "compel")):
        ours = embed(pipe, prompt, weighting=weighting)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
        assert not torch.allclose(
            ours, embed(pipe, pipe.describe_prompt(prompt, weighting=weighting).readings[0].prompt.text)
        )


@pytest.mark.parametrize("how", LONG_PROMPTS)
def test_weights_reach_behind_the_first_window(pipe, text_of, how):
    plain = text_of(300) + " a crown."
    marked = plain.replace("a crown", "a (crown:1.4)")
    before, after = embed(pipe, plain, long_prompt=how), embed(pipe, marked, long_prompt=how, weighting="a1111")
    changed = (before != after).any(-1)[0].nonzero().flatten().tolist()
    reading = pipe.describe_prompt(marked, how, "a1111").readings[0]
    if how == "truncate":
        assert changed == []
    else:
        assert changed == [reading.positions[301]]


def test_a_weighted_run_goes_on_over_the_border_of_a_window(pipe, text_of):
    prompt = text_of(74) + " (tall tall tall tall:1.5) " + text_of(10)
    ours = embed(pipe, prompt, long_prompt="chunk", weighting="a1111")
    mode = SplitLongTextMode.BRUTAL
    theirs = Compel(
        pipe.stock_tokenizer, pipe.stock_text_encoder, truncate_long_prompts=False, split_long_text_mode=mode
    )(text_of(74) + " (tall tall tall tall)1.5 " + text_of(10))
    assert ours.shape == theirs.shape == (1, 154, WIDTH)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_parts_have_windows_of_their_own(pipe):
    parts = embed(pipe, "a red cat BREAK two dogs", weighting="a1111")
    assert parts.shape[1] == 2 * 248
    alone = torch.cat([embed(pipe, "a red cat"), embed(pipe, "two dogs")], dim=1)
    torch.testing.assert_close(parts, alone, rtol=0, atol=2e-5)  # a batch of two windows against one
    assert pipe.describe_prompt("a red cat BREAK two dogs", "truncate", "a1111").dropped == "two dogs"


@pytest.mark.parametrize(
    "prompt",
    [
        '("a red cat", "two dogs").and()',
        '("a (red)1.3 cat", "two dogs").and(1, 0.5)',
        '("a red cat", "two (big)1.2 dogs").blend(0.7, 0.3)',
        '("a cat", "a dog").blend(2, 1)',
        '("a cat", "a dog").blend(1, -0.5, no_normalize)',
    ],
)
def test_conjunctions_and_blends_are_compels(pipe, prompt):
    ours = embed(pipe, prompt, weighting="compel")
    torch.testing.assert_close(ours, compel_of(pipe)(prompt), rtol=0, atol=2e-5)


def test_both_encoders_of_sdxl(pipe_xl):
    marked, compel = WEIGHTED[1]
    states, _, pooled, _ = pipe_xl.encode_prompt(marked, device=CPU, weighting="a1111")
    kind = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
    places = ((pipe_xl.tokenizer, pipe_xl.text_encoder), (pipe_xl.tokenizer_2, pipe_xl.text_encoder_2))
    theirs = [Compel(*place, returned_embeddings_type=kind)(compel) for place in places]
    torch.testing.assert_close(states, torch.cat(theirs, -1), rtol=0, atol=2e-5)
    plain = pipe_xl.encode_prompt("a red cat under a tall tree", device=CPU)
    assert torch.equal(pooled, plain[2])  # weights change no pooled output
    pipe_xl.second_encoder = "window"
    second = pipe_xl.encode_prompt(marked, device=CPU, weighting="a1111")[0]
    pipe_xl.second_encoder = "stretch"
    assert torch.equal(second[..., :WIDTH], states[..., :WIDTH])
    assert not torch.equal(second[..., WIDTH:], states[..., WIDTH:])


def test_clip_skip_and_weights(pipe):
    skipped = embed(pipe, "a (red:1.5) cat", weighting="a1111", clip_skip=1)
    plain, usual = embed(pipe, "a red cat", clip_skip=1), embed(pipe, "", clip_skip=1)
    expected = usual[0, 2] + 1.5 * (plain[0, 2] - usual[0, 2])
    torch.testing.assert_close(skipped[0, 2], expected, rtol=0, atol=2e-5)
    assert torch.equal(skipped[0, 1], plain[0, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe, dtype):
    half = FineLIPStableDiffusionPipeline(
        **{name: copy.deepcopy(part) for name, part in pipe.components.items()}, requires_safety_checker=False
    ).to(dtype=dtype)
    states = embed(half, WEIGHTED[3][0], weighting="a1111")
    assert states.dtype == dtype
    full = embed(pipe, WEIGHTED[3][0], weighting="a1111")
    # states are of order 1, and a layer rounds many times
    assert (states.float() - full).square().mean().sqrt() < 4 * torch.finfo(dtype).eps


def test_negative_prompts_and_batches_have_weights_too(pipe, text_of):
    prompts = ["a (red:1.5) cat", text_of(300)]
    states, negative = pipe.encode_prompt(prompts, CPU, 1, True, "([dull]:1.3)", weighting="a1111")
    assert states.shape == negative.shape == (2, 496, WIDTH)
    torch.testing.assert_close(states[:1, :248], embed(pipe, prompts[0], weighting="a1111"), rtol=0, atol=2e-5)
    torch.testing.assert_close(
        negative[:1, :248], embed(pipe, "(dull:1.181818182)", weighting="a1111"), rtol=0, atol=2e-5
    )


def test_the_setting_of_the_pipeline_and_of_a_call(pipe, caplog):
    pipe.weighting = "a1111"
    assert torch.equal(embed(pipe, "a (cat:1)"), embed(pipe, "a cat", weighting="plain"))
    with pytest.raises(ValueError, match="weighting='comfy' is unknown: choose from plain, a1111, compel"):
        pipe.weighting = "comfy"
    with caplog.at_level(logging.WARNING):
        pipe("a (cat under a tree", num_inference_steps=1)
    assert caplog.messages == ["brackets without a partner are text: ( in 'a (cat under a tree'"]


def test_textual_inversions_can_be_weighted(stable_diffusion_folder):
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder)
    pipe.load_textual_inversion({"<toy>": torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))})
    reading = pipe.describe_prompt("a (<toy>:1.5) here", weighting="a1111").readings[0]
    assert reading.weights == ((1, 4, 1.5),)
