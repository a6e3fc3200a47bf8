"""CLIP's tokenizer against open_clip's own, on text that nobody tidied."""

import random
import sys
import unicodedata

import pytest
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTokenizer

from finelip_diffusion.tokenizer import clean_text, clip_tokenizer

SENTENCE = "a red Fox's den, near the OLD mill -- 3,141 steps away; it's 10% off & don't you'll we've I'm he'd they're"
WORDS = SENTENCE.split()
PLAIN = [
    *(
        "",
        " ",
        "\n\t\r\n",
        "a",
        "A  photo\n\nof\ta   cat",
        "hello!!! wow?! ...",
        "x" * 3000,
        "1234567890",
        "C3PO & R2-D2",
    ),
    *(
        "it's IT'S It'S don't DON'T",
        "'s 's' ''s",
        "e-mail@example.org",
        "https://example.org/?q=a+b#c",
        "C:\\path\\*.txt",
    ),
    *("snake_case CamelCase", "(a:1.3), [b|c], {d}", "<lora:detail:0.8>", "50°F ±2 µm × 3 ≠ 4 √2 ∑", "$5 €6 £7 ¥8"),
    *(
        "日本語のテキスト",
        "中文 描述 一只猫",
        "한국어 텍스트",
        "ภาษาไทย",
        "हिन्दी पाठ",
        "русский ТЕКСТ",
        "Ελληνικά",
        "עברית וערבית",
    ),
    *(
        "العربية مع ١٢٣",
        "a עברית b العربية c",
        "naïve café Ångström",
        "cafe\u0301 A\u030a",
        "Straße ẞ",
        "İstanbul ıI",
        "ﷺ",
    ),
    *("😀", "👨‍👩‍👧‍👦 family", "🏳️‍🌈🇩🇪", "👍🏽👍🏿", "a😀b🎉c", "☃️❄", "🧑🏻‍🚀 on 🌙", "①②③", "½ ⅓", "ⅷ Ⅷ", "x²y³"),
    *("a\u00a0b\u2003c\u3000d", "a\u200bb", "a\u200db", "a\u00adb", "a\u2060b", "\u202eabc\u202c", "z̸̢̛a̷l̴g̶o̵"),
    *("𝓯𝓪𝓷𝓬𝔂", "𝕏", "𐍈 𓀀", "\U0001f9ff", "\ufffd", "a|b||c", "`code`", '"quoted"', "—–-‐", "~!@#$%^&*()_+"),
    *(SENTENCE, " ".join(WORDS * 20), "tab\tfeed\fend", "end with space ", " start with space"),
]
NEED_CLEANING = {  # text -> what CLIP's training code does to it and CLIPTokenizer does not
    "Tom &amp; Jerry": "HTML entities",
    "&lt;b&gt;bold&lt;/b&gt;": "HTML entities",
    "&amp;amp;lt; twice": "HTML entities, twice",
    "&#233;&#x1F600;": "numeric HTML entities",
    "\u201cquoted\u201d": "curly quotes",
    "don\u2019t": "curly apostrophe",
    "\ufb01ne o\ufb03ce": "Latin ligatures",
    "\uff21\uff22\uff23 \uff11": "full-width forms",
    "\x00a\x00b\x00": "NUL",
    "a\x01b\x08c": "control characters",
    "\x1b[31mred\x1b[0m": "terminal escapes",
    "a\vb": "vertical tabs, which it drops",
    "a\x1cb\x1fc": "separators that Python splits at",
    "a\x85b": "C1 control characters",
    "\x93quoted\x94": "C1 control characters",
    "\ufeffmark": "byte order mark",
    "caf\u00c3\u00a9": "mojibake",
    "\u00e2\u20ac\u0153quoted\u00e2\u20ac": "mojibake",
    "\u03a3\u0391\u03a3": "final sigma",
    "\u01c5": "digraphs",
    "\ud83d\ude00": "surrogate pairs",
    "lone \ud800 half": "lone surrogates",
}
REMAINING = {  # text -> why its ids differ from open_clip's even after cleaning
    "<start_of_text>": "open_clip 3 respells the special tokens; OpenAI's own code and transformers share theirs",
    "<|endoftext|>": "the same, the other way round",
    "\u03aa\u0301": "a letter and an accent that compose only after lowercasing; CLIPTokenizer composes them",
    "< e&#x301;": "a combining accent out of an entity, in a text where ftfy leaves entities alone; the same",
}


def random_strings(count, seed):
    """Strings of characters from all of Unicode's assigned letters, marks, numbers, symbols, separators, controls."""
    generator = random.Random(seed)
    blocks = [(0x20, 0x7F), (0x20, 0x250), (0x370, 0x600), (0x590, 0x700), (0x900, 0xE80), (0x2000, 0x2C00)]
    blocks += [
        (0x3000, 0x3400),
        (0x4E00, 0xA000),
        (0xAC00, 0xD7A4),
        (0x1F300, 0x1FA00),
        (0x0, 0xD800),
        (0x10000, 0x1F000),
    ]
    for _ in range(count):
        chosen = generator.sample(blocks, 2)
        text: list[str] = []
        while len(text) < generator.randint(1, 60):
            character = chr(generator.randrange(*generator.choice(chosen)))
            if unicodedata.category(character) not in ("Cn", "Co"):
                text.append(character)
        yield "".join(text)


@pytest.fixture(scope="module")
def theirs():
    return SimpleTokenizer()


@pytest.fixture(scope="module")
def ours():
    return clip_tokenizer(10**9)


def ids(tokenizer, text):
    start, *inner, end = tokenizer(text).input_ids
    assert (start, end) == (49406, 49407)
    return inner


def test_every_token_has_the_id_that_open_clip_gives_it(ours, theirs):
    mine = ours.get_vocab()
    assert len(ours) == len(mine) == theirs.vocab_size == 49408
    respelled = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    assert mine == {respelled.get(word, word): index for word, index in theirs.encoder.items()}


@pytest.mark.parametrize("text", PLAIN, ids=lambda text: ascii(text)[:40])
def test_ids_equal_open_clips(ours, theirs, text):
    assert ids(ours, text) == theirs.encode(text)
    assert ids(ours, clean_text(text)) == theirs.encode(text)


@pytest.mark.parametrize("seed", range(4))
def test_ids_of_cleaned_random_text_equal_open_clips(ours, theirs, seed):
    for text in random_strings(200, seed):
        assert ids(ours, clean_text(text)) == theirs.encode(text), ascii(text)


@pytest.mark.parametrize("seed", range(3))
def test_ids_of_5000_words_equal_open_clips(ours, theirs, seed):
    generator = random.Random(seed)
    words = generator.choices([*WORDS, *(text for text in PLAIN if 0 < len(text) < 40)], k=5000)
    text = generator.choice(" \n").join(words)
    assert len(text.split()) >= 5000
    assert ids(ours, text) == theirs.encode(text)


@pytest.mark.parametrize("text", NEED_CLEANING, ids=lambda text: ascii(text)[:40])
def test_cleaning_closes_the_difference(ours, theirs, text):
    assert ids(ours, clean_text(text)) == theirs.encode(text), NEED_CLEANING[text]
    if not any("\ud800" <= character < "\ue000" for character in text):  # those CLIPTokenizer does not take at all
        assert ids(ours, text) != theirs.encode(text), f"{NEED_CLEANING[text]} need no cleaning any more"


@pytest.mark.parametrize("text", REMAINING, ids=lambda text: ascii(text)[:40])
def test_what_remains_different(ours, theirs, text):
    assert ids(ours, clean_text(text)) != theirs.encode(text), f"no longer so: {REMAINING[text]}"


@pytest.mark.parametrize(("pad_token", "pad_id"), [("<|endoftext|>", 49407), ("!", 0)])
def test_padding_and_truncation_survive_saving(tmp_path, pad_token, pad_id):
    tokenizer = clip_tokenizer(248, pad_token)
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, CLIPTokenizer.from_pretrained(tmp_path)):
        assert each.model_max_length == 248 and each.pad_token_id == pad_id
        padded = each(["a dog"], padding="max_length").input_ids[0]
        assert padded == [49406, 320, 1929, 49407] + [pad_id] * 244
        cut = each("dog " * 300, truncation=True).input_ids
        assert len(cut) == 248 and cut[-1] == 49407


def test_padding_with_an_exclamation_mark_changes_those_in_the_text(theirs):
    """As in SDXL's second tokenizer: a stock tokenizer takes its padding token out of the text wherever it stands."""
    text = "wow!!! a !"
    assert ids(clip_tokenizer(77), text) == theirs.encode(text) == [2781, 995, 320, 256]
    assert ids(clip_tokenizer(77, "!"), text) == [2781, 0, 0, 0, 320, 0]


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="pad_token='no token' is not in the vocabulary"):
        clip_tokenizer(77, "no token")
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ValueError, match="needs ftfy, which is not installed"):
        clean_text("a")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="open_clip, which is not installed"):
        clip_tokenizer(77)
