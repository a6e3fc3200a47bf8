"""What is drawn of a caption: by hand where it is certain, by its properties where it is drawn."""

import random
from collections import Counter

import pytest

from finelip_diffusion.data.captions import (
    CAPTION_KINDS,
    draw_captions,
    draw_padding,
    draw_random_prompt,
    draw_short_prompt,
    sentence_runs,
)
from finelip_diffusion.scenes import describe, sample_scene

CAPTION = "A red cat. It sleeps under a green tree. Two dogs watch it! Is it cold? Nobody knows."


@pytest.fixture
def text_of_runs(tokenizer):
    """The caption's offsets, and the words of drawn runs."""
    encoding = tokenizer(CAPTION, add_special_tokens=False, return_offsets_mapping=True)

    def words(runs):
        ids = [token for start, stop in runs for token in encoding.input_ids[start:stop]]
        return tokenizer.decode(ids).replace(" ", "")  # a decoded full stop stands apart

    return encoding.offset_mapping, words


def test_sentence_runs_cover_all_tokens(text_of_runs):
    offsets, words = text_of_runs
    runs = sentence_runs(CAPTION, offsets)
    assert [start for start, _ in runs[1:]] == [stop for _, stop in runs[:-1]]
    assert (runs[0][0], runs[-1][1]) == (0, len(offsets))
    assert words(runs[2:3]) == "twodogswatchit!"
    assert sentence_runs("", []) == [(0, 0)]


def test_first_sentence_is_the_text_in_front_of_a_full_stop(tokenizer):
    for caption in (CAPTION, "One sentence alone.", "No stop", "Is it? Yes. And more.", "At 3.5 m. High."):
        encoding = tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True)
        ((run,),) = draw_captions(caption, encoding.offset_mapping, "first_sentence", 0)
        expected = tokenizer(caption.split(". ")[0], add_special_tokens=False).input_ids
        assert encoding.input_ids[run[0] : run[1]] == expected


def test_debias_samples_behind_the_first_sentence_in_any_order(text_of_runs):
    offsets, words = text_of_runs
    rest = sentence_runs(CAPTION, offsets)[1:]
    counts, orders = Counter(), set()
    for draw in range(4000):
        (runs,) = draw_captions(CAPTION, offsets, "debias", draw)
        assert set(runs) <= set(rest) and len(set(runs)) == len(runs)
        counts[len(runs)] += 1
        orders.add(tuple(runs))
    assert len(orders) == 4 + 12 + 24 + 24  # every arrangement of 1 to 4 of the 4
    assert all(abs(counts[n] - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5 for n in (1, 2, 3, 4))  # four sigma
    assert words([rest[2], rest[0]]) == "isitcold?itsleepsunderagreentree."
    assert draw_captions("Alone here.", [(0, 5), (6, 10), (10, 11)], "debias", 3) == [[(0, 3)]]


def test_sub_captions_are_runs_of_sentences(text_of_runs):
    offsets, _ = text_of_runs
    sentence_bounds = sentence_runs(CAPTION, offsets)
    allowed = {
        (sentence_bounds[first][0], sentence_bounds[last][1])
        for first in range(5)
        for last in range(first, min(first + 2, 5))
    }
    seen = set()
    for draw in range(50):
        captions = draw_captions(CAPTION, offsets, "sub_captions", draw, number=4, longest=2)
        assert len(captions) == 4
        seen |= {run for (run,) in captions}
    assert seen == allowed
    assert draw_captions(CAPTION, offsets, "full", 0) == []
    with pytest.raises(ValueError, match="'half' is not one of full, first_sentence"):
        draw_captions(CAPTION, offsets, "half", 0)


def test_padding_is_drawn_evenly():
    counts = Counter(draw_padding(3, draw) for draw in range(4000))
    assert set(counts) == {0, 1, 2, 3}
    assert all(abs(count - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5 for count in counts.values())
    assert draw_padding(-2, 5) == draw_padding(0, 5) == 0


def test_a_short_prompt_is_as_many_whole_sentences_as_fit(tokenizer):
    for seed in range(40):
        caption = str(describe(sample_scene(seed), seed))
        offsets = tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        runs = sentence_runs(caption, offsets.offset_mapping)
        start, stop = draw_short_prompt(caption, offsets.offset_mapping, seed, 75)
        first = [run[0] for run in runs].index(start)
        last = [run[1] for run in runs].index(stop)
        assert stop - start <= 75
        assert last == len(runs) - 1 or runs[last + 1][1] - start > 75
        assert first <= last
    assert draw_short_prompt("word " * 50, [(5 * n, 5 * n + 4) for n in range(50)], 0, 20) == (0, 20)


def test_a_random_prompt_keeps_to_its_vocabulary():
    prompts = [draw_random_prompt(range(10, 60), draw, 9) for draw in range(200)]
    assert {len(prompt) for prompt in prompts} == set(range(1, 10))
    assert {token for prompt in prompts for token in prompt} == set(range(10, 60))


def test_a_draw_is_a_function_of_its_seed_alone(text_of_runs):
    offsets, _ = text_of_runs
    for kind in CAPTION_KINDS:
        random.seed(1)
        one = [draw_captions(CAPTION, offsets, kind, draw) for draw in range(5)]
        state = random.getstate()
        assert [draw_captions(CAPTION, offsets, kind, draw) for draw in range(5)] == one
        assert random.getstate() == state
