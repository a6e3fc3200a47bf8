"""CLIP's tokenizer: a stock `CLIPTokenizer` from CLIP's own merges, and the cleaning of text that CLIP learned on."""

import gzip
import html
import importlib.util
from pathlib import Path

from transformers import CLIPTokenizer

BOS_TOKEN, EOS_TOKEN = "<|startoftext|>", "<|endoftext|>"
VOCAB_SIZE = 49408


def clip_tokenizer(model_max_length: int, pad_token: str = EOS_TOKEN) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, from the merges that open_clip ships.

    Args:
        model_max_length: Tokens that a prompt may have, start and end included.
        pad_token: What fills up a batch: end-of-text, as Stable Diffusion 1.x was trained, or `"!"` (id 0), as
            FineLIP's and Long-CLIP's own code does.

    Returns:
        A tokenizer of 49,408 tokens.

    Raises:
        ValueError: If open_clip is not installed, or the padding token is not in the vocabulary.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ValueError(
            "the source has no tokenizer of its own, and CLIP's merges come with open_clip, which is not installed: "
            "pip install open_clip_torch, or give tokenizer=."
        )
    merges_file = Path(package.origin).with_name(
        "bpe_simple_vocab_16e6.txt.gz"
    )  # found, not imported: that takes seconds
    lines = gzip.decompress(merges_file.read_bytes()).decode("utf-8").split("\n")
    merges = [(left, right) for left, right in map(str.split, lines[1 : VOCAB_SIZE - 2 * 256 - 2 + 1])]
    characters = _byte_characters()
    words = [
        *characters,
        *(character + "</w>" for character in characters),
        *map("".join, merges),
        BOS_TOKEN,
        EOS_TOKEN,
    ]
    vocab = {word: index for index, word in enumerate(words)}
    if pad_token not in vocab:
        raise ValueError(f"pad_token={pad_token!r} is not in the vocabulary: give '!' (id 0) or {EOS_TOKEN!r}.")
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=model_max_length, pad_token=pad_token)


def clean_text(text: str) -> str:
    """The cleaning that CLIP's training code does before it splits a text, and that `CLIPTokenizer` does not do.

    Mends mojibake, ligatures, curly quotes and control characters (ftfy), resolves HTML entities twice, joins runs of
    white space, lowercases. Plain ASCII prose comes out with the same token ids either way.

    Args:
        text: A prompt.

    Raises:
        ValueError: If ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise ValueError("clean_text needs ftfy, which is not installed: pip install ftfy.") from error
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def _byte_characters() -> list[str]:
    """A visible character for each byte (GPT-2's table), in the order of CLIP's first 256 tokens."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in visible] + [chr(256 + n) for n in range(256 - len(visible))]
