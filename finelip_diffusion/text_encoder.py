"""Any CLIP text weights in, a stock text encoder out: `CLIPTextModel` and `CLIPTokenizer` for long prompts."""

import json
import logging
import tempfile
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.activations import ACT2FN

from .checkpoints import CONFIGURATION, listed, read_checkpoint, read_configuration, read_json
from .files import writing
from .layouts import POSITIONS, PROJECTION, WRITTEN, Layout, caveat, huggingface_layout
from .locations import configuration_folder, encoder_folder, locate
from .positions import KEPT_POSITIONS, find_ratio, is_only_stretched, stretch_positions, stretched_length
from .rotary import RotaryTextConfig, RotaryTextModel, rotary_settings
from .tokenizer import VOCAB_SIZE, clip_tokenizer
from .towers import TextWeights, check_weights, text_weights

MAX_LENGTH = 248
"""Tokens that a stretched encoder reads: 77 rows, 20 kept, ratio 4."""

STRETCHED_FROM = "stretched_from"
"""In the configuration of an encoder that this package stretched: the rows that it had."""

LONGCLIP_TYPES = ("longclip", "longclip_text_model")  # longclip-transformers' names of a whole CLIP and its text model

TextEncoder: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection

logger = logging.getLogger(__name__)


def load_text_encoder(
    source: str | Path,
    *,
    subfolder: str | None = None,
    max_length: int | None = MAX_LENGTH,
    keep: int = KEPT_POSITIONS,
    ratio: int | None = None,
    pad_token: str | None = None,
    projection: bool | None = None,
    dtype: torch.dtype | None = None,
    hidden_act: str | None = None,
    num_attention_heads: int | None = None,
    config: str | Path | None = None,
    tokenizer: CLIPTokenizer | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> tuple[TextEncoder, CLIPTokenizer]:
    """Loads CLIP text weights from wherever they are, for prompts of `max_length` tokens.

    A table that already has `max_length` rows is left as it is; a shorter one is stretched, which by itself trains
    nothing. Reading is strict and runs no code: see `checkpoints`.

    Args:
        source: One of
            - a folder or hub id with a CLIP text model, or a whole CLIP, in the layout of `transformers`;
            - a folder or hub id of a diffusers pipeline, or a folder of `save_text_encoder`;
            - a folder or hub id of a `rotary.RotaryTextModel`, whose window `max_length` may lengthen to any number;
            - a file (.safetensors, .pt, .pth, .bin, .ckpt), or a link to one on the hub, in any of the layouts of
              `layouts.LAYOUTS`; or a whole Stable Diffusion 1.x, 2.x, XL or 3.x, or a Flux, in one.
        subfolder: Where in a folder the encoder lies; `"text_encoder_2"` goes with `tokenizer_2`. By default the
            folder itself, or else its `text_encoder`. A whole Stable Diffusion in one file has these two as well.
        max_length: Tokens that the encoder shall read; None keeps the table's rows.
        keep: First rows that stretching leaves as they are, and that two tables take from the frozen one.
        ratio: New positions for an old one. By default what `max_length` needs; if given, both must agree.
        pad_token: `"eos"`, or a token of the vocabulary such as `"!"` (id 0, what FineLIP's and Long-CLIP's own code
            pads with). By default the source tokenizer's own, or end-of-text where the source has no tokenizer.
        projection: Whether to keep the text projection (`CLIPTextModelWithProjection`, as SDXL's second encoder).
            By default as the source's `config.json` says; a file without one gives a `CLIPTextModel`, and for
            `"text_encoder_2"` one with projection.
        dtype: Floating dtype of the result; by default the widest one among the text weights.
        hidden_act: `"quick_gelu"` or `"gelu"`, for a file; by default the rule of `TextWeights.config`. Sources with a
            `config.json` follow that.
        num_attention_heads: For a file; by default width / 64.
        config: For a file: folder or hub id of a pipeline or text model whose `config.json` and tokenizer go with it.
            A file of `save_checkpoint` has its own configuration, which is followed, but no vocabulary.
        tokenizer: In place of the source's; it is copied with the right `model_max_length`.
        revision: Branch, tag or commit of a hub id.
        token: Access token of the hub.
        local_files_only: Whether to look only into the local cache.

    Returns:
        The encoder, in evaluation mode on the CPU, and its tokenizer with `model_max_length` set to the rows of the
        position table. The start, end and padding ids in `config` are the tokenizer's.

    Raises:
        ValueError: If the source is missing or no CLIP, its text weights are not exactly those of a CLIP or not
            finite, it is a pickle that wants to run code, `max_length` cannot be reached, the hub cannot be, or
            tokenizer and weights do not fit each other. One sentence.
    """
    hub = {"revision": revision, "token": token, "local_files_only": local_files_only}
    file, folder, described = locate(source, subfolder, hub)
    if folder is not None and config is not None:
        raise ValueError(f"{folder} has a config.json of its own: config={config} goes with a checkpoint file.")
    if (described or {}).get("model_type") == RotaryTextConfig.model_type:
        options = (max_length, pad_token, projection, dtype, tokenizer)
        return _load_rotary(file, cast(Path, folder), cast("dict[str, Any]", described), *options)
    their_keep = ((described or {}).get("text_config") or described or {}).get("interpolation_keep_length", keep)
    weights = text_weights(read_checkpoint(file), str(file), their_keep, subfolder if folder is None else None)
    own = read_configuration(file) if folder is None else None
    if config is not None:
        folder = encoder_folder(configuration_folder(config, hub), weights.place)
        described = read_json(folder / "config.json")
    described = own or described
    if described is None:
        configured = weights.config(hidden_act, num_attention_heads)
        with_projection = weights.place == "text_encoder_2" if projection is None else projection
        if hidden_act is None and not weights.activation_is_known:
            logger.warning("%s does not say its activation; %s is assumed (hidden_act=).", file, configured.hidden_act)
    else:
        where = str(file if own or folder is None else folder / "config.json")
        configured, with_projection = _text_config(described, weights, projection, where)
    _check(weights, configured, with_projection)
    for note in weights.notes:
        logger.info("%s: %s.", file, note)
    if aside := (() if with_projection or PROJECTION not in weights.tensors else (PROJECTION,)) + weights.set_aside:
        named = listed(aside, 20 if weights.place else len(aside))
        logger.info("%s: %d tensors are no part of the encoder and were set aside: %s.", file, len(aside), named)

    tensors = weights.tensors
    _warn_of_untrained_rows(tensors[POSITIONS], keep, configured, weights.layout.trained is not None, str(file))
    tensors[POSITIONS] = _fit_positions(tensors[POSITIONS], max_length, keep, ratio, str(file))
    rows = tensors[POSITIONS].shape[0]
    if rows != configured.max_position_embeddings:
        setattr(configured, STRETCHED_FROM, configured.max_position_embeddings)
    configured.max_position_embeddings = rows
    pad_token_id = configured.pad_token_id if own and tokenizer is None else None
    tokenizer = _tokenizer(tokenizer, folder, rows, pad_token, configured.vocab_size, str(file), pad_token_id)
    _take_ids(configured, tokenizer)
    return _build(configured, tensors, with_projection, dtype), tokenizer


def save_text_encoder(
    text_encoder: TextEncoder,
    tokenizer: CLIPTokenizer,
    folder: str | Path,
    *,
    subfolder: str = "text_encoder",
    overwrite: bool = False,
) -> Path:
    """Saves an encoder and its tokenizer as `transformers` (4 and 5) and `diffusers` load them.

    Writes `folder/text_encoder` and `folder/tokenizer`, each renamed into place when complete.

    Args:
        text_encoder: The encoder; weights are saved in its dtype.
        tokenizer: Its tokenizer.
        folder: Made if it does not exist; what else it holds is left alone.
        subfolder: Name of the encoder's folder; the tokenizer's follows it (`text_encoder_2`, `tokenizer_2`).
        overwrite: Whether to replace either folder.

    Returns:
        `folder`.

    Raises:
        ValueError: If either folder exists and `overwrite` is false, `folder` is a file, or the disk is full.
    """
    folder = Path(folder)
    names = (subfolder, _tokenizer_name(subfolder))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder to save into.")
    taken = [str(folder / name) for name in names if (folder / name).exists()]
    if taken and not overwrite:
        raise ValueError(f"{' and '.join(taken)} would be overwritten: choose another folder, or say overwrite=True.")
    with writing(folder / names[0]) as encoder_folder, writing(folder / names[1]) as tokenizer_folder:
        _write_encoder(text_encoder, encoder_folder)
        tokenizer.save_pretrained(tokenizer_folder)
        tokenizer.backend_tokenizer.model.save(str(tokenizer_folder))  # vocab.json and merges.txt, for transformers 4
    return folder


@torch.no_grad()
def interpolate(stock: TextEncoder, trained: TextEncoder, share: float) -> TextEncoder:
    """Weights between those of two encoders (WiSE-FT, Wortsman et al., arXiv 2109.01903).

        (1 - share) * stock + share * trained

    Args:
        stock: The encoder from which the training started, as long as the trained one.
        trained: Its weights are replaced.
        share: 0 to 1.

    Returns:
        `trained`.

    Raises:
        ValueError: If the share lies outside, or the encoders are not of one shape. One sentence.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share:g}, but a share of the trained encoder lies in 0..1.")
    ours = {name.removeprefix("text_model."): weight for name, weight in trained.state_dict().items()}
    theirs = canonical_weights(stock)
    differing = [name for name in ours.keys() | theirs.keys()
                 if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape]  # fmt: skip
    if differing:
        raise ValueError(
            f"weights of {listed(sorted(differing))} differ in shape or are missing in one encoder: give the encoder "
            "from which the training started."
        )
    for name, weight in ours.items():  # tensors of `trained`, not copies
        weight.copy_(torch.lerp(theirs[name].double(), weight.double(), share))
    return trained


def save_checkpoint(
    text_encoder: TextEncoder,
    tokenizer: CLIPTokenizer,
    path: str | Path,
    *,
    layout: str,
    overwrite: bool = False,
) -> Path:
    """Saves an encoder as one .safetensors file for other programs; `load_text_encoder` reads it back bit for bit.

    Those programs bring their own tokenizer and padding, and their own idea of activation, heads and sizes; where that
    is not the encoder's, a warning says so. For `load_text_encoder` the metadata hold the configuration, but no
    vocabulary.

    Args:
        text_encoder: The encoder; weights are saved in its dtype.
        tokenizer: Its tokenizer, of which the ids for start, end and padding are saved.
        path: The file, renamed into place when complete; its folder is made if it does not exist.
        layout: `"openai"` (Long-CLIP's and FineLIP's code, open_clip) or `"comfyui"`.
        overwrite: Whether to replace the file.

    Returns:
        `path`.

    Raises:
        ValueError: If the layout is unknown, or `"openai"` and the encoder has no text projection; the encoder's
            positions are rotary, which no layout of one file says; the path is a
            folder, does not end in .safetensors, or exists and `overwrite` is false; or the disk is full.
    """
    path = Path(path)
    if layout not in WRITTEN:
        raise ValueError(f"layout={layout!r} is unknown: choose from {', '.join(WRITTEN)}.")
    if rotary_settings(text_encoder.config) is not None:
        raise ValueError(f"layout={layout!r} holds a position table, but these positions are rotary: save a folder.")
    if path.suffix != ".safetensors" or path.is_dir():
        raise ValueError(f"{path} must be a file that ends in .safetensors: layout={layout!r} is one file.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} would be overwritten: choose another file, or say overwrite=True.")
    config = _saved_config(text_encoder)
    _take_ids(config, tokenizer)
    tensors = WRITTEN[layout](canonical_weights(text_encoder))
    if (reason := caveat(layout, config)) is not None:
        logger.warning("%s: %s", path, reason)
    metadata = {"format": "pt", CONFIGURATION: json.dumps(config.to_dict())}
    with writing(path) as file:
        save_file(tensors, file, metadata=metadata)
    return path


def check_width(text_encoder: nn.Module | Sequence[nn.Module], unet: nn.Module) -> None:
    """Refuses an encoder whose states the UNet cannot attend to.

    Args:
        text_encoder: One encoder, or the encoders whose states are concatenated on channels (SDXL).
        unet: A diffusers UNet; `config.encoder_hid_dim` or else `config.cross_attention_dim` is what it reads.

    Raises:
        ValueError: If the widths differ; the sentence names both.
    """
    encoders = [text_encoder] if isinstance(text_encoder, nn.Module) else list(text_encoder)
    widths = [_config(encoder).hidden_size for encoder in encoders]
    wanted = getattr(_config(unet), "encoder_hid_dim", None) or _config(unet).cross_attention_dim
    for width in wanted if isinstance(wanted, (list, tuple)) else [wanted]:
        if width != sum(widths):
            parts = f" ({' + '.join(map(str, widths))})" if len(widths) > 1 else ""
            raise ValueError(
                f"the text encoder is {sum(widths)} wide{parts}, but the UNet reads states of width {width}: "
                f"choose an encoder of the CLIP that the UNet was trained with."
            )


def text_embeddings(text_encoder: TextEncoder) -> Any:
    """The module with `token_embedding`, `position_embedding` and `position_ids`, in transformers 4 and 5 alike."""
    return getattr(text_encoder, "text_model", text_encoder).embeddings


def text_layers(text_encoder: TextEncoder) -> nn.ModuleList:
    """The transformer's layers, in transformers 4 and 5 alike."""
    return getattr(text_encoder, "text_model", text_encoder).encoder.layers


def final_layer_norm(text_encoder: TextEncoder) -> nn.LayerNorm:
    """The norm after the last layer, in transformers 4 and 5 alike."""
    return getattr(text_encoder, "text_model", text_encoder).final_layer_norm


def canonical_weights(text_encoder: TextEncoder) -> dict[str, Tensor]:
    """The weights under canonical names, in transformers 4 and 5 alike; contiguous."""
    state = text_encoder.state_dict().items()
    return {name.removeprefix("text_model."): tensor.contiguous() for name, tensor in state}


def _text_config(
    config: dict[str, Any], weights: TextWeights, projection: bool | None, where: str
) -> tuple[CLIPTextConfig, bool]:
    """The text part of a `config.json`, read from `where`, and whether the encoder shall have a projection."""
    kind = config.get("model_type")
    if kind not in ("clip", "clip_text_model", *LONGCLIP_TYPES):
        raise ValueError(f"{where} is of a model of type {kind!r}, not of a CLIP: give a CLIP text model.")
    if kind in LONGCLIP_TYPES:  # the same numbers, under a name that transformers does not know
        text_part = config if kind == LONGCLIP_TYPES[1] else config.get("text_config") or {}
        config = {**text_part, "model_type": "clip_text_model", "architectures": config.get("architectures")}
    try:
        text = CLIPConfig.from_dict(config).text_config if kind == "clip" else CLIPTextConfig.from_dict(config)
    except Exception as error:  # transformers validates with exceptions of its own
        cause = " ".join(str(error).split())
        raise ValueError(
            f"{where} describes no CLIP text model ({cause}): correct it, or download it again."
        ) from error
    if (found := weights.tensors.get(PROJECTION)) is not None and found.ndim == 2:
        text.projection_dim = found.shape[0]
    if (positions := weights.tensors.get(POSITIONS)) is not None and positions.ndim == 2:
        text.max_position_embeddings = positions.shape[0]  # long CLIPs are about whose config.json still says 77
    if projection is None:
        projection = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
    return text, projection


def _check(weights: TextWeights, config: CLIPTextConfig, with_projection: bool) -> None:
    if config.hidden_act not in ACT2FN:
        raise ValueError(
            f"hidden_act is {config.hidden_act!r}, but CLIPs have 'quick_gelu' or 'gelu': give one of them."
        )
    if with_projection and PROJECTION not in weights.tensors:
        raise ValueError(
            f"{weights.where} lacks the text weights {weights.own_name(PROJECTION)}: leave the projection out "
            f"(projection=False, --no-projection), which the layout openai cannot, or give a source that has one."
        )
    whole = weights.layout.openai and weights.place is None  # these layouts always have the projection
    with torch.device("meta"):
        model = (CLIPTextModelWithProjection if with_projection or whole else CLIPTextModel)(config)
    check_weights(weights, {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()})


def _fit_positions(table: Tensor, max_length: int | None, keep: int, ratio: int | None, where: str) -> Tensor:
    rows = table.shape[0]
    if max_length is None or max_length == rows:
        return table
    try:
        needed = find_ratio(rows, max_length, keep)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if ratio not in (None, needed):
        raise ValueError(
            f"{where}: ratio {ratio} takes {rows} rows to {stretched_length(rows, keep, ratio)}, not to "
            f"max_length={max_length}, which needs ratio {needed}: leave one of the two out."
        )
    return stretch_positions(table, keep, needed)


def _warn_of_untrained_rows(table: Tensor, keep: int, config: CLIPTextConfig, two_tables: bool, where: str) -> None:
    """Says that a long table is one that was stretched and not trained, where that would go unseen."""
    if not is_only_stretched(table, keep):
        return
    if (rows := getattr(config, STRETCHED_FROM, None)) is not None:
        logger.info(
            "%s: its positions were stretched from %s rows, and are not trained after row %d.", where, rows, keep
        )
    elif two_tables:
        logger.warning("%s: neither of its two position tables is trained after row %d.", where, keep)
    else:
        logger.warning(
            "%s: its positions after row %d were never trained, as in conversions of Long-CLIP that kept the frozen "
            "one of its two tables: convert the file with both (longclip-L.pt, which has positional_embedding_res), "
            "unless this encoder was meant to be stretched alone.", where, keep,
        )  # fmt: skip


def _tokenizer_name(subfolder: str) -> str:
    name = Path(subfolder).name
    return name.replace("text_encoder", "tokenizer") if "text_encoder" in name else "tokenizer"


def _tokenizer(
    given: CLIPTokenizer | None,
    folder: Path | None,
    max_length: int,
    pad_token: str | None,
    vocab_size: int,
    where: str,
    pad_token_id: int | None = None,
) -> CLIPTokenizer:
    """The tokenizer that was given, or the source's own, or CLIP's.

    It pads with `pad_token`, or else `pad_token_id`, or else as it does.
    """
    with tempfile.TemporaryDirectory() as copy:
        home = _tokenizer_folder(folder)
        if given is not None:
            given.save_pretrained(copy)
            home = Path(copy)
        if home is None:
            if vocab_size != VOCAB_SIZE:
                raise ValueError(
                    f"{where} has a vocabulary of {vocab_size} tokens and no tokenizer beside it, but CLIP's own has "
                    f"{VOCAB_SIZE}: give tokenizer=, or config=."
                )
            found = clip_tokenizer(max_length)
            if pad_token is None and pad_token_id is not None:
                pad_token = found.convert_ids_to_tokens(pad_token_id)
            if pad_token not in (None, "eos", found.eos_token):
                found = clip_tokenizer(max_length, pad_token)
            return found
        try:
            found = CLIPTokenizer.from_pretrained(home, model_max_length=max_length)
        except Exception as error:  # whatever the files hold; tokenizers raises bare exceptions
            raise ValueError(
                f"{home} holds no readable CLIP tokenizer: download it again, or give tokenizer=."
            ) from error
        if pad_token is None and pad_token_id is not None:
            pad_token = found.convert_ids_to_tokens(pad_token_id)
        pad = found.eos_token if pad_token == "eos" else pad_token
        if pad is not None and pad != found.pad_token:
            if pad not in found.get_vocab():
                raise ValueError(f"pad_token={pad!r} is not in the vocabulary: give 'eos' or a token that is.")
            found = CLIPTokenizer.from_pretrained(home, model_max_length=max_length, pad_token=pad)
    if len(found) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(found)} tokens, but {where} embeds only {vocab_size}: give the tokenizer that "
            f"belongs to these weights."
        )
    return found


def _tokenizer_folder(folder: Path | None) -> Path | None:
    """Beside the encoder's folder, or in it."""
    if folder is None:
        return None
    for place in (folder.parent / _tokenizer_name(folder.name), folder):
        if (place / "tokenizer.json").is_file() or (place / "vocab.json").is_file():
            return place
    return None


def _build(
    config: CLIPTextConfig, tensors: dict[str, Tensor], with_projection: bool, dtype: torch.dtype | None
) -> TextEncoder:
    with torch.device("meta"):
        model: TextEncoder = (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)
    names = {name: name.removeprefix("text_model.") for name in model.state_dict()}
    if dtype is None:
        dtype = tensors[POSITIONS].dtype
        for name in names.values():
            dtype = torch.promote_types(dtype, tensors[name].dtype)
    model.load_state_dict({name: tensors[ours].to(dtype) for name, ours in names.items()}, assign=True)
    text_embeddings(model).position_ids = torch.arange(config.max_position_embeddings).unsqueeze(0)
    return model.eval()


def _load_rotary(
    file: Path,
    folder: Path,
    described: dict[str, Any],
    max_length: int | None,
    pad_token: str | None,
    projection: bool | None,
    dtype: torch.dtype | None,
    tokenizer: CLIPTokenizer | None,
) -> tuple[TextEncoder, CLIPTokenizer]:
    """A `RotaryTextModel` as `load_text_encoder` loads it; a window that is longer than asked for is kept."""
    if projection:
        raise ValueError(
            f"{folder} holds a text encoder with rotary positions and without text projection: it takes the place of "
            "a CLIPTextModel, not that of SDXL's second encoder."
        )
    try:
        config = RotaryTextConfig.from_dict(described)
        config.rotary = {
            "theta": float(config.rotary["theta"]),
            "trained_length": int(config.rotary["trained_length"]),
        }
        with torch.device("meta"):
            model = RotaryTextModel(config)
    except Exception as error:  # transformers validates with exceptions of its own
        cause = " ".join(str(error).split())
        raise ValueError(f"{folder / 'config.json'} describes no rotary CLIP text model ({cause}).") from error
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in read_checkpoint(file).items()}
    names = {name: name.removeprefix("text_model.") for name in model.state_dict()}
    found = TextWeights(Layout("rotary", False), tensors, (), str(file), {name: name for name in tensors})
    check_weights(found, {ours: model.state_dict()[name] for name, ours in names.items()})
    if dtype is None:
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    model.load_state_dict({name: tensors[ours].to(dtype) for name, ours in names.items()}, assign=True)
    config.max_position_embeddings = max(max_length or 0, config.max_position_embeddings)
    tokenizer = _tokenizer(tokenizer, folder, config.max_position_embeddings, pad_token, config.vocab_size, str(file))
    _take_ids(config, tokenizer)
    return model.eval(), tokenizer


def _write_encoder(text_encoder: TextEncoder, folder: Path) -> None:
    """A `save_pretrained` whose names begin with `text_model.`, which transformers 4 needs and 5 understands.

    A rotary encoder, which only this package reads, has its own names.
    """
    if isinstance(text_encoder, RotaryTextModel):
        text_encoder.save_pretrained(folder)
        return
    folder.mkdir()
    _saved_config(text_encoder).save_pretrained(folder)
    tensors = huggingface_layout(canonical_weights(text_encoder))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _saved_config(text_encoder: TextEncoder) -> CLIPTextConfig:
    config = type(text_encoder.config)(**text_encoder.config.to_dict())
    config.architectures = [type(text_encoder).__name__]
    config.dtype = text_encoder.dtype
    return config


def _take_ids(config: CLIPTextConfig, tokenizer: CLIPTokenizer) -> None:
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id


def _config(module: nn.Module) -> Any:
    return module.config
