"""Prompts as text encoders read them."""

import dataclasses

import pytest

from finelip_diffusion.prompts import PromptReport, read_prompt
from finelip_diffusion.tokenizer import clip_tokenizer

COUNTS = [0, 1, 75, 76, 77, 78, 247, 248, 249, 2000]

AWKWARD = [
    "",
    "   ",
    "A cat. A dog! Is it raining? Yes… no.",
    "  Dr. Smith paid 3.50 dollars at 5 p.m. for it.  ",
    "猫が座る。犬が走る。鳥が飛ぶ。" * 20,
    "cafe\u0301 ﬁne 🐱‍👓 " * 40,
    "line one\nline two\n\n\tparagraph \x00 two " * 20,
    "<|startoftext|> odd <|endoftext|> ones " * 30,
    "antidisestablishmentarianism" * 40,
]


def content(prompt: str, tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("cut", ["first", "windows", "sentences"])
def test_counts_windows_and_lengths(count, cut, tokenizer, text_of):
    prompt = text_of(count)
    reading = read_prompt(prompt, tokenizer, cut)
    ids = content(prompt, tokenizer)
    read = tuple(token for window in reading.windows for token in window)
    assert reading.tokens == count
    assert all(len(window) <= 75 for window in reading.windows)
    if cut == "first":
        assert read == ids[:75]
        assert reading.length == 77
        assert bool(reading.dropped) == (count > 75)
    else:
        assert read == ids
        assert reading.dropped == ""
    if cut == "windows":
        assert len(reading.windows) == max(-(-count // 75), 1)
        assert reading.length == 77 * len(reading.windows)
    if cut == "sentences":
        assert len(reading.windows) == max(-(-count // 12), 1)  # text_of makes sentences of twelve tokens
        assert reading.length == count - len(reading.windows[-1]) + 77


@pytest.mark.parametrize("prompt", AWKWARD)
@pytest.mark.parametrize("cut", ["first", "windows", "sentences"])
def test_awkward_text_is_dealt_out_token_by_token(prompt, cut, tokenizer):
    reading = read_prompt(prompt, tokenizer, cut)
    ids = content(prompt, tokenizer)
    read = tuple(token for window in reading.windows for token in window)
    assert read == (ids[:75] if cut == "first" else ids)
    assert reading.tokens_read == len(read)


@pytest.mark.parametrize("prompt", AWKWARD)
def test_the_first_window_is_what_the_tokenizer_itself_truncates_to(prompt, tokenizer):
    ids = tokenizer(prompt, truncation=True, max_length=77).input_ids
    assert tuple(ids[1:-1]) == read_prompt(prompt, tokenizer, "first").windows[0]


def test_dropped_text_is_the_end_of_the_prompt_letter_by_letter(tokenizer):
    prompt = "CAPITALS  and   spaces, " + "word " * 80 + "THE\n\nLast Wörds 🐱, kept as they are.  "
    reading = read_prompt(prompt, tokenizer, "first")
    assert prompt.rstrip().endswith(reading.dropped)
    assert reading.dropped.endswith("THE\n\nLast Wörds 🐱, kept as they are.")
    kept = prompt[: prompt.rindex(reading.dropped)]
    assert content(kept, tokenizer) == reading.windows[0]
    assert content(reading.dropped, tokenizer) == content(prompt, tokenizer)[75:]


def test_sentences_have_windows_of_their_own(tokenizer):
    prompt = "Dr. Smith has a cat. Is it red? Yes, " + "very " * 100 + "red! 犬が走る。鳥が飛ぶ。"
    windows = [tokenizer.decode(window).strip() for window in read_prompt(prompt, tokenizer, "sentences").windows]
    assert windows[:2] == ["dr . smith has a cat .", "is it red ?"]
    assert windows[2] == "yes , " + " ".join(["very"] * 73)  # a long sentence goes on in a second window
    assert windows[3].endswith("red !")
    assert len(windows) == 6


def test_spans_lie_beside_those_of_a_long_window(tokenizer, text_of):
    beside = read_prompt(text_of(500), tokenizer, "windows", span_length=248)
    long = read_prompt(text_of(500), clip_tokenizer(248), "windows")
    assert [sum(map(len, span)) for span in beside.spans] == [len(window) for window in long.windows]
    assert beside.length == long.length == 3 * 248


def test_a_span_without_room_is_refused(tokenizer):
    with pytest.raises(ValueError, match="span_length=2"):
        read_prompt("a cat", tokenizer, span_length=2)


def test_the_report_says_what_a_person_wants_to_know(tokenizer):
    prompt = "cat " * 80 + "END"
    reading = read_prompt(prompt, tokenizer, "first", encoder="stock_text_encoder")
    whole = read_prompt(prompt, clip_tokenizer(248))
    report = PromptReport(prompt, "truncate", (whole, reading))
    assert (report.tokens, report.windows, report.dropped) == (81, (81,), "cat cat cat cat cat END")
    assert str(report).splitlines() == [
        "81 tokens, long_prompt='truncate'",
        "  text_encoder: 1 window of 248 positions (81 tokens), 248 states, nothing dropped",
        "  stock_text_encoder: 1 window of 77 positions (75 tokens), 77 states, "
        "6 of 81 tokens dropped: 'cat cat cat cat cat END'",
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.prompt = "other"
