"""Text encoders made long: what takes the place of a stock one in a pipeline, whichever way it comes there."""

import copy
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from .positions import STOCK_POSITIONS, stretch_positions
from .prompts import LongPrompt, PromptSettings
from .rotary import rotary_settings
from .text_encoder import TextEncoder, check_width, load_text_encoder, text_embeddings, text_layers

logger = logging.getLogger(__name__)

STOCK = "stock_"
"""What the names of a pipeline's 77-token encoders and their tokenizers begin with, beside the long ones."""

UNTRAINED = (
    "the text encoder is stretched from %d positions without training: prompts of more than 20 tokens are read "
    "differently, and worse than by a trained one (finelip=)."
)


class Place(NamedTuple):
    """The text encoders of one place of a pipeline; `chosen` says whether somebody chose the long one."""

    text_encoder: TextEncoder | None
    tokenizer: CLIPTokenizer | None
    stock_text_encoder: TextEncoder | None
    stock_tokenizer: CLIPTokenizer | None
    chosen: bool


def in_place(
    text_encoder: TextEncoder | None,
    tokenizer: CLIPTokenizer | None,
    stock_text_encoder: TextEncoder | None = None,
    stock_tokenizer: CLIPTokenizer | None = None,
    finelip: str | Path | None = None,
    *,
    stretch: bool = False,
    warn: bool = True,
    **options: Any,
) -> Place:
    """The long and the stock encoder of one place of a pipeline.

    Args:
        text_encoder: What the place holds: a long encoder or a stock one, or None where it is empty.
        tokenizer: Its tokenizer.
        stock_text_encoder: The stock encoder beside a long one.
        stock_tokenizer: Its tokenizer.
        finelip: Any source of `load_text_encoder` for the long one.
        stretch: Whether a stock encoder is stretched where there is no `finelip`; else it stays alone.
        warn: Whether stretching without training is said.
        **options: For `load_text_encoder`.

    Returns:
        The encoders, and a tokenizer for each.

    Raises:
        ValueError: As for `long_encoder`.
    """
    if is_stock(text_encoder):
        if finelip is None and not stretch:
            return Place(text_encoder, tokenizer, stock_text_encoder, stock_tokenizer, False)
        stock_text_encoder, stock_tokenizer = text_encoder, tokenizer
    long, its_tokenizer = long_encoder(text_encoder, tokenizer, finelip, warn=warn, **options)
    return Place(long, its_tokenizer, stock_text_encoder, stock_tokenizer, finelip is not None)


def default_settings(long_prompt: LongPrompt | None, first: Place, second: Place | None = None) -> PromptSettings:
    """The strategy that was asked for, or the best that the encoders can do: a trained long encoder reads prompts
    best, then come windows of a stock one, and last an encoder that was stretched and never trained."""
    why = ""
    if long_prompt is None:
        untrained = not first.chosen and nobody_trained(first.text_encoder, first.stock_text_encoder)
        long_prompt = "chunk" if untrained or is_stock(first.text_encoder) else "stretch"
        why = f"the default {'with' if long_prompt == 'stretch' else 'without'} a trained long encoder"
    if second is None:
        return PromptSettings(long_prompt, why=why)
    trained = not is_stock(second.text_encoder) and not nobody_trained(second.text_encoder, second.stock_text_encoder)
    return PromptSettings(long_prompt, second_encoder="stretch" if trained else "window", why=why)


def long_encoder(
    text_encoder: TextEncoder | None,
    tokenizer: CLIPTokenizer | None,
    finelip: str | Path | None = None,
    *,
    warn: bool = True,
    **options: Any,
) -> tuple[TextEncoder | None, CLIPTokenizer | None]:
    """Finds the encoder that takes the place of `text_encoder`, in its dtype and on its device, and its tokenizer.

    Args:
        text_encoder: What the place holds; None where it is empty.
        tokenizer: Its tokenizer.
        finelip: Any source of `load_text_encoder`; None stretches `text_encoder` if it is a stock one.
        warn: Whether stretching without training is said.
        **options: For `load_text_encoder`.

    Returns:
        The encoder and a tokenizer of its length. What was given is never changed: copies are.

    Raises:
        ValueError: If `text_encoder` has a LoRA that its replacement would lack; and whatever `load_text_encoder`
            raises.
    """
    if finelip is not None:
        if text_encoder is None:
            return load_text_encoder(finelip, **options)
        adapters = ", ".join(getattr(text_encoder, "peft_config", ()))
        if adapters:
            raise ValueError(
                f"the text encoder has a LoRA ({adapters}), which would be lost when finelip={finelip} replaces "
                "it: unload_lora_weights() first, and load it again afterwards."
            )
        projection = isinstance(text_encoder, CLIPTextModelWithProjection)
        options = {"projection": projection, "dtype": text_encoder.dtype, **options}
        found, its_tokenizer = load_text_encoder(finelip, **options)
        if not (Path(finelip) / "unet").is_dir():  # a UNet beside it was adapted to the whole encoder
            _leave_out_layers(found, text_encoder.config.num_hidden_layers)
        if tokenizer is not None:
            _bring_embeddings(text_encoder, tokenizer, found, its_tokenizer)
        return found.to(text_encoder.device), its_tokenizer
    if text_encoder is None or tokenizer is None:
        return text_encoder, tokenizer
    if is_stock(text_encoder):
        if warn:
            logger.warning(UNTRAINED, text_encoder.config.max_position_embeddings)
        text_encoder = stretched(text_encoder)
    return text_encoder, widened(tokenizer, text_encoder.config.max_position_embeddings)


def second_source(finelip: str | Path | None) -> tuple[str | Path | None, dict[str, Any]]:
    """Where the long encoder of SDXL's second place is, if it lies beside the first, and how it is asked for."""
    there = finelip is not None and (Path(finelip) / "text_encoder_2").is_dir()
    return (finelip, {"subfolder": "text_encoder_2"}) if there else (None, {})


def without_stock(
    base: str | Path, finelip: str | Path | None, places: list[str], given: dict[str, Any]
) -> dict[str, Any]:
    """Long encoders for places in which no stock one is wanted, so that it is never in memory.

    Args:
        base: Folder or hub id of a pipeline.
        finelip: Any source of `load_text_encoder` for the first place; None leaves all to the loader.
        places: Endings of their names.
        given: Arguments of the loader.

    Returns:
        Encoders and tokenizers by name. A place whose stock encoder has tokens of its own (textual inversion) is left
        to the loader, which brings them along.

    Raises:
        ValueError: Whatever `load_text_encoder` raises.
    """
    if finelip is None or given.keys() & {"device_map", "quantization_config", "text_encoder", "text_encoder_2"}:
        return {}
    hub = {name: given[name] for name in ("revision", "token", "local_files_only", "cache_dir") if name in given}
    found: dict[str, Any] = {}
    for place in places:
        name, dtype = f"text_encoder{place}", given.get("dtype", given.get("torch_dtype")) or torch.float32
        source, options = (finelip, {}) if not place else second_source(finelip)
        if source is None:
            source, options = base, {"subfolder": name, **{key: hub[key] for key in hub if key != "cache_dir"}}
        config = CLIPTextConfig.from_pretrained(str(base), subfolder=name, **hub)
        dtype = dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
        text_encoder, tokenizer = load_text_encoder(source, projection=bool(place), dtype=dtype, **options)
        if text_encoder.config.vocab_size == config.vocab_size:
            if not (Path(finelip) / "unet").is_dir():  # a UNet beside it was adapted to the whole encoder
                _leave_out_layers(text_encoder, config.num_hidden_layers)
            found |= {name: text_encoder, f"tokenizer{place}": tokenizer}
    return found


def _bring_embeddings(
    source: TextEncoder, its_tokenizer: CLIPTokenizer, target: TextEncoder, tokenizer: CLIPTokenizer
) -> None:
    """Copies textual inversions, the tokens that were added after the vocabulary, from one encoder to another."""
    known = tokenizer.get_vocab()
    new = {place: token for place, token in its_tokenizer.added_tokens_decoder.items() if token.content not in known}
    table = source.get_input_embeddings().weight.data
    if not new or table.shape[1] != target.get_input_embeddings().embedding_dim:  # which `check_width` is going to say
        return
    tokenizer.add_tokens(list(new.values()))
    target.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = target.get_input_embeddings().weight.data
    for place, token in new.items():
        rows[tokenizer.convert_tokens_to_ids(token.content)] = table[place].to(rows)


def stretched(text_encoder: TextEncoder) -> TextEncoder:
    """A copy with a longer position table, which nobody has trained."""
    text_encoder = copy.deepcopy(text_encoder)
    embeddings = text_embeddings(text_encoder)
    table = stretch_positions(embeddings.position_embedding.weight)
    embeddings.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)
    embeddings.position_ids = torch.arange(len(table), device=table.device).unsqueeze(0)
    text_encoder.config.max_position_embeddings = len(table)
    return text_encoder


def widened(tokenizer: CLIPTokenizer, length: int) -> CLIPTokenizer:
    """A tokenizer for an encoder of `length` positions: the same one, or a copy."""
    if tokenizer.model_max_length == length:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = length
    return tokenizer


def nobody_trained(text_encoder: TextEncoder | None, stock: TextEncoder | None) -> bool:
    """Whether a long encoder is the stock one beside it, stretched: its table follows from the stock one's, and its
    last layer, which every training changes, is the same."""
    if text_encoder is None or stock is None or "meta" in (text_encoder.device.type, stock.device.type):
        return False
    if rotary_settings(text_encoder.config) is not None:
        return False
    old, new = (text_embeddings(each).position_embedding.weight.detach() for each in (stock, text_encoder))
    expected = stretch_positions(old)
    if expected.shape != new.shape:
        return False
    rounding = 4 * torch.finfo(new.dtype).eps * float(new.abs().max())  # stretched in one dtype, kept in another
    layers: list[Any] = [text_layers(each)[-1] for each in (stock, text_encoder)]
    last, its_last = (layer.mlp.fc1.weight for layer in layers)
    return torch.allclose(expected.to(new), new, rtol=0, atol=rounding) and torch.equal(last.to(its_last), its_last)


def _leave_out_layers(text_encoder: TextEncoder, number: int) -> None:
    """Cuts a loaded encoder to the layers of the one whose place it takes.

    Stable Diffusion 2 reads OpenCLIP ViT-H after its last layer but one, so its encoder is stored without the last.
    """
    layers = text_layers(text_encoder)
    if len(layers) > number:
        logger.warning(
            "the long text encoder has %d layers and the one it replaces %d: those after layer %d are left out.",
            len(layers), number, number,
        )  # fmt: skip
        del layers[number:]
        text_encoder.config.num_hidden_layers = number


def is_stock(text_encoder: TextEncoder | None) -> bool:
    """Whether there is an encoder, with a table of no more positions than CLIP's."""
    if text_encoder is None or rotary_settings(text_encoder.config) is not None:
        return False
    return text_encoder.config.max_position_embeddings <= STOCK_POSITIONS


def check_widths(text_encoders: list[TextEncoder | None], unet: UNet2DConditionModel | None) -> None:
    """`check_width` for the encoders there are; the SDXL refiner has only one, diffusers allows none at all."""
    there = [text_encoder for text_encoder in text_encoders if text_encoder is not None]
    if there and unet is not None:
        check_width(there, unet)


def check_lengths(text_encoders: list[TextEncoder]) -> None:
    """Refuses encoders whose states cannot be joined position by position."""
    lengths = [text_encoder.config.max_position_embeddings for text_encoder in text_encoders]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"the text encoders read {' and '.join(map(str, lengths))} tokens, but their states are joined position "
            f"by position: give a long encoder of {lengths[-1]}."
        )
