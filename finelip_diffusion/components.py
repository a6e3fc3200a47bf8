"""The text encoders of a pipeline, made long: what takes the place of a stock one, and `attach` for any pipeline."""

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

from .checkpoints import listed, read_checkpoint
from .layouts import embedded_encoders
from .locations import checkpoint_file, configuration_folder
from .positions import STOCK_POSITIONS, stretch_positions
from .text_encoder import TextEncoder, check_width, load_text_encoder, text_embeddings, text_layers
from .upstream import mend_clip_skip

logger = logging.getLogger(__name__)

STOCK = "stock_"
"""What the names of a pipeline's 77-token encoders and their tokenizers begin with, beside the long ones."""


def attach(pipe: DiffusionPipeline, finelip: str | Path | None = None, **options: Any) -> DiffusionPipeline:
    """Gives long text encoders to diffusers pipelines that read through CLIP; `docs/compatibility.md` has a list.

    The pipeline stays diffusers' own and reads 248 tokens by itself; strategies other than "stretch" are the business
    of this package's pipelines. All CLIP encoders become long, those behind the first stretched without training; a T5
    beside them (SD3, Flux) stays as it is. The UNet stays, too: one that was adapted to the encoder is given to the
    pipeline by `pipe.register_modules(unet=...)`.

    Args:
        pipe: The pipeline; its components are replaced, never changed, so others that share them keep theirs.
        finelip: Any source of `load_text_encoder`, for `text_encoder`; None stretches the pipeline's own without
            training.
        **options: For `load_text_encoder`, such as `pad_token`.

    Returns:
        `pipe`.

    Raises:
        ValueError: If the pipeline has a text encoder that is neither a CLIP nor a T5 beside one, no UNet or
            transformer that attends to it, or no `text_encoder` for `finelip` to replace; if it is set up for
            offloading already; if encoders and UNet or transformer do not fit each other; and whatever
            `load_text_encoder` raises.
    """
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    encoders = {name: part for name, part in parts.items() if name.startswith("text_encoder")}
    clips = {name: part for name, part in encoders.items() if isinstance(part, TextEncoder)}
    served = all(name in clips or isinstance(part, T5EncoderModel) for name, part in encoders.items())
    if not (clips and served and {"unet", "transformer"} & set(pipe.components)):
        found = ", ".join(f"{name} ({type(part).__name__})" for name, part in encoders.items()) or "no text encoder"
        raise ValueError(
            f"{type(pipe).__name__} reads prompts through {found}: attach needs CLIP text encoders, alone or beside a "
            f"T5, and a UNet or transformer that attends to their states."
        )
    if finelip is not None and "text_encoder" not in clips:
        raise ValueError(f"{type(pipe).__name__} has no text_encoder that finelip={finelip} could replace.")
    if any(hasattr(part, "_hf_hook") for part in encoders.values()):
        raise ValueError("the pipeline is set up for offloading already: attach first, then enable the offloading.")
    replaced: dict[str, Any] = {}
    first, *_ = clips
    for name, text_encoder in clips.items():
        tokenizer = name.replace("text_encoder", "tokenizer")
        source = finelip if name == "text_encoder" else None
        replaced[name], replaced[tokenizer] = long_encoder(
            text_encoder, getattr(pipe, tokenizer), source, warn=name == first, **options
        )
    check_lengths([replaced[name] for name in clips])
    check_widths([replaced[name] for name in clips], parts.get("unet"))
    if "transformer" in pipe.components:
        _check_same_width(replaced[first], clips[first])
    pipe.register_modules(**replaced)
    if hasattr(pipe, "tokenizer_max_length"):  # SD3 and Flux note at their making what CLIP reads
        pipe.tokenizer_max_length = replaced[first].config.max_position_embeddings
    mend_clip_skip(pipe)
    return pipe


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
                f"the text encoder has a LoRA ({adapters}), which would stay behind when finelip={finelip} replaces "
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
            logger.warning(
                "the text encoder is stretched from %d positions without training: prompts of more than 20 tokens "
                "are read differently, and worse than by a trained one (finelip=).",
                text_encoder.config.max_position_embeddings,
            )
        text_encoder = _stretched(text_encoder)
    if tokenizer.model_max_length != text_encoder.config.max_position_embeddings:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.model_max_length = text_encoder.config.max_position_embeddings
    return text_encoder, tokenizer


def single_file_components(
    source: str | Path,
    places: tuple[str, ...],
    given: set[str],
    *,
    config: str | Path | None,
    dtype: torch.dtype,
    hub: dict[str, Any],
) -> tuple[Path, Path, dict[str, Any]]:
    """Reads the text encoders of a Stable Diffusion in one file, whatever number of positions they have.

    diffusers would build them by the `config.json` and fail where the file has another number of positions
    (https://github.com/huggingface/diffusers/issues/11285), and tell the two of SDXL apart by their widths alone.

    Args:
        source: A file, or a link to one on the hub.
        places: Endings of the names of the pipeline's encoders: `""`, `"_2"`.
        given: Names of components that are not to be read.
        config: Folder or hub id of a pipeline of the same kind, in diffusers' layout; None is the one that diffusers
            takes for such a file.
        dtype: Of the encoders.
        hub: `token`, `local_files_only`, `cache_dir`.

    Returns:
        The file, a folder with the configurations, and the encoders and tokenizers by name; what is not in the file
        is None (the first encoder of SDXL's refiner).

    Raises:
        ValueError: If there is no such file, it holds the encoders of another kind of model, or the configurations
            cannot be had; and whatever `load_text_encoder` raises. One sentence.
    """
    file = checkpoint_file(source, hub)
    if file is None:
        raise ValueError(f"{source} is no file, and no link to one on the hub: give one, or use from_pretrained.")
    tensors = read_checkpoint(file)
    names = [f"text_encoder{place}" for place in places]
    found = list(embedded_encoders(tensors))
    if (names[-1] not in found and names[-1] not in given) or set(found) - set(names):
        held = " and ".join(found) or f"no text encoder (its names begin with {listed(sorted(tensors), 3)})"
        raise ValueError(
            f"{file} holds {held}, but the pipeline reads with {' and '.join(names)}: "
            f"give a whole Stable Diffusion {'XL' if '_2' in places else '1.x or 2.x'} in one file."
        )
    try:
        folder = configuration_folder(config or fetch_diffusers_config(tensors)["pretrained_model_name_or_path"], hub)
    except ValueError as error:
        reason = str(error).removesuffix(".")
        raise ValueError(f"{file} needs the configurations of a pipeline of its kind: {reason} as config=.") from error
    components: dict[str, Any] = {}
    for name in names:
        tokenizer = name.replace("text_encoder", "tokenizer")
        if name in given:
            continue
        components[name] = components[tokenizer] = None
        if name in found:
            components[name], components[tokenizer] = load_text_encoder(
                file, subfolder=name, config=folder, max_length=None, dtype=dtype
            )
    return file, folder, components


def _bring_embeddings(
    source: TextEncoder, its_tokenizer: CLIPTokenizer, target: TextEncoder, tokenizer: CLIPTokenizer
) -> None:
    """Copies textual inversions, the tokens that were added behind the vocabulary, from one encoder to another."""
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


def _stretched(text_encoder: TextEncoder) -> TextEncoder:
    """A copy with a longer position table."""
    text_encoder = copy.deepcopy(text_encoder)
    embeddings = text_embeddings(text_encoder)
    table = stretch_positions(embeddings.position_embedding.weight)
    embeddings.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)
    embeddings.position_ids = torch.arange(len(table), device=table.device).unsqueeze(0)
    text_encoder.config.max_position_embeddings = len(table)
    return text_encoder


def _leave_out_layers(text_encoder: TextEncoder, number: int) -> None:
    """Cuts a loaded encoder to the layers of the one whose place it takes.

    Stable Diffusion 2 reads OpenCLIP ViT-H behind its last layer but one, so its encoder is stored without the last.
    """
    layers = text_layers(text_encoder)
    if len(layers) > number:
        logger.warning(
            "the long text encoder has %d layers and the one it replaces %d: those behind layer %d are left out.",
            len(layers), number, number,
        )  # fmt: skip
        del layers[number:]
        text_encoder.config.num_hidden_layers = number


def is_stock(text_encoder: TextEncoder | None) -> bool:
    """Whether there is an encoder, of no more positions than CLIP's."""
    return text_encoder is not None and text_encoder.config.max_position_embeddings <= STOCK_POSITIONS


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


def _check_same_width(new: TextEncoder, old: TextEncoder) -> None:
    """`check_width` where a transformer reads states and pooled output, which diffusers pads and joins."""
    names = ["hidden_size", "projection_dim" if isinstance(old, CLIPTextModelWithProjection) else "hidden_size"]
    (width, pooled), (old_width, old_pooled) = ([getattr(part.config, name) for name in names] for part in (new, old))
    if (width, pooled) != (old_width, old_pooled):
        raise ValueError(
            f"the text encoder is {width} wide and pools to {pooled}, but the one it replaces is {old_width} wide and "
            f"pools to {old_pooled}: choose an encoder of the CLIP that the transformer was trained with."
        )
