"""FineLIP's model: a CLIP whose text tower reads 248 tokens, with token refinement for both towers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from .checkpoints import read_checkpoint
from .files import writing
from .finelip_layout import finelip_layout, refinement_weights
from .layouts import HEAD_WIDTH, POSITIONS
from .locations import locate
from .positions import KEPT_POSITIONS
from .refinement import TokenRefinement, adaptive_mask
from .rotary import THETA, RotaryTextConfig, RotaryTextModel, make_rotary, rotary_settings
from .scores import late_interaction
from .text_encoder import MAX_LENGTH, _tokenizer, load_text_encoder
from .towers import image_tower

REFINED_SHARE = 0.2
"""Refined tokens for a patch: 39 of 196, 51 of 256."""
GLOBAL_SHARE = 0.8
"""Of the global cosine in FineLIP*, the score for retrieval; the rest is the token score."""


class FineLIPConfig(PreTrainedConfig):
    """Configuration of `FineLIPModel`.

    Args:
        clip_config: of the two towers (`CLIPConfig`, or a dictionary of one); its text tower has the stretched length.
        keep: first rows of the position table that are not trained.
        refine_image: whether the image's tokens are refined.
        refine_text: whether the caption's are.
        num_refined_tokens: tokens that refinement leaves of each, CLS and end token aside; by default 20% of the
            patches.
        num_refined_text_tokens: the same of the caption alone; by default as many as of the image.
        adaptive_share: how many of them count, for a token that the refinement looks at (`refinement.adaptive_mask`);
            by default all count.
        global_tokens: whether CLS and end token stand beside the refined tokens in the token score.
        score: by what the model was trained to compare images and captions, if it is not the global cosine or
            FineLIP's: `"laps"`, `"flair"`, `"filip"` (`heads.own_score`).
        score_settings: of that score.
    """

    model_type = "finelip"
    sub_configs = {"clip_config": CLIPConfig}  # noqa: RUF012

    def __init__(
        self,
        clip_config: CLIPConfig | dict[str, Any] | None = None,
        keep: int = KEPT_POSITIONS,
        refine_image: bool = True,
        refine_text: bool = True,
        num_refined_tokens: int | None = None,
        num_refined_text_tokens: int | None = None,
        adaptive_share: float | None = None,
        global_tokens: bool = True,
        score: str | None = None,
        score_settings: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        clip: Any = clip_config or {"text_config": {"max_position_embeddings": MAX_LENGTH}}
        self.clip_config = clip if isinstance(clip, CLIPConfig) else CLIPConfig(**clip)
        self.keep = keep
        self.refine_image = refine_image
        self.refine_text = refine_text
        self.score, self.score_settings = score, score_settings
        self.num_refined_tokens = num_refined_tokens or refined_number(REFINED_SHARE, self.clip_config)
        self.num_refined_text_tokens = num_refined_text_tokens or self.num_refined_tokens
        self.adaptive_share, self.global_tokens = adaptive_share, global_tokens
        super().__init__(**kwargs)


def refined_number(share: float, config: CLIPConfig) -> int:
    """A share of the patches of an image as a number of refined tokens, rounded down, at least 1."""
    vision = config.vision_config
    return max(1, int(share * (vision.image_size // vision.patch_size) ** 2))


def refinement_settings(
    given: Mapping[str, Any], config: CLIPConfig, own: Mapping[str, int], where: str
) -> dict[str, Any]:
    """Shares of the patches as numbers of tokens, for `FineLIPConfig`.

    Args:
        given: see `FineLIPModel.from_clip`; a share that is None is the default.
        config: of the towers.
        own: numbers of refined tokens of the source's weights, by their names in `FineLIPConfig`; empty where it
            has no refinement.
        where: What to call the source in error messages.

    Raises:
        ValueError: If a share asks for another number than the source has.
    """
    settings: dict[str, Any] = dict(own)
    shares = {"num_refined_tokens": "refined_share", "num_refined_text_tokens": "refined_text_share"}
    for name, key in shares.items():
        if (share := given.get(key)) is None:
            continue
        settings[name] = refined_number(share, config)
        if settings[name] != own.get(name, settings[name]):
            raise ValueError(
                f"{where} has a refinement to {own[name]} tokens, and {key}={share:g} asks for {settings[name]}: "
                "leave the share out, or take a CLIP without refinement."
            )
    return settings | {key: value for key, value in given.items() if key not in shares.values()}


@dataclass
class FineLIPOutput(ModelOutput):
    """What the model makes of B images and B captions; losses name these fields.

    Attributes:
        image_embeds, text_embeds: (B, E), of length 1.
        image_tokens: (B, 1 + P, E), CLS first, normed and projected, not of length 1.
        text_tokens: (B, T, E), likewise.
        text_mask: (B, T), True from the start token to the end token.
        local_image_tokens, local_image_mask: (B, M, E), of length 1, and (B, M): what the token score reads.
        local_text_tokens, local_text_mask: (B, N, E) and (B, N), likewise.
        logit_scale: (), the factor itself, not its logarithm.
    """

    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    image_tokens: Tensor | None = None
    text_tokens: Tensor | None = None
    text_mask: Tensor | None = None
    local_image_tokens: Tensor | None = None
    local_image_mask: Tensor | None = None
    local_text_tokens: Tensor | None = None
    local_text_mask: Tensor | None = None
    logit_scale: Tensor | None = None

    def scores(self, global_share: float = GLOBAL_SHARE) -> Tensor:
        """FineLIP*: 0.8 global cosine + 0.2 token score, (B_image, B_text)."""
        own: Any = self  # its fields are optional, as those of every `ModelOutput`
        tokens = late_interaction(
            own.local_image_tokens, own.local_text_tokens, own.local_image_mask, own.local_text_mask
        )
        return global_share * own.image_embeds @ own.text_embeds.T + (1 - global_share) * tokens


def last_tokens(tokens: Tensor, mask: Tensor) -> Tensor:
    """The last token that the mask (B, T) keeps, in front of padding: (B, T, E) -> (B, E)."""
    return tokens[torch.arange(len(tokens), device=tokens.device), mask.sum(1) - 1]


class StretchedPositions(nn.Embedding):
    """A position table whose first rows are not trained: they get no gradient, on any device or shard.

    Name and shape of the weight are the stock ones. An optimizer must not decay it, or the kept rows would shrink.
    """

    keep = 0

    def forward(self, position_ids: Tensor) -> Tensor:
        return F.embedding(position_ids, torch.cat([self.weight[: self.keep].detach(), self.weight[self.keep :]]))


class FineLIPModel(PreTrainedModel):
    """A CLIP for long captions and FineLIP's token refinement (arXiv 2504.01916, section 3).

    `clip` is a stock `CLIPModel`; `text_encoder()` takes its text tower out for Stable Diffusion, which uses neither
    the refinement nor the token score.
    """

    config_class = FineLIPConfig
    base_model_prefix = "finelip"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", "CLIPVisionEmbeddings"]  # noqa: RUF012

    def __init__(self, config: FineLIPConfig):
        super().__init__(config)
        self.clip = CLIPModel._from_config(config.clip_config)
        embeddings = self.clip.text_model.embeddings
        if rotary_settings(config.clip_config.text_config) is not None:
            make_rotary(self.clip.text_model, config.clip_config.text_config)
        else:
            positions = StretchedPositions(*embeddings.position_embedding.weight.shape)
            positions.keep = config.keep
            positions.weight = embeddings.position_embedding.weight  # drawn by CLIP; transformers 5.6 draws it once
            embeddings.position_embedding = positions
        width = config.clip_config.projection_dim
        self.image_refinement = TokenRefinement(width, config.num_refined_tokens) if config.refine_image else None
        self.text_refinement = TokenRefinement(width, config.num_refined_text_tokens) if config.refine_text else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """CLIP's modules are drawn by their own class, the others as PyTorch draws them."""
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.reset_parameters()
        elif isinstance(module, TokenRefinement):
            nn.init.ones_(module.scale)

    @classmethod
    def from_clip(
        cls,
        source: str | Path,
        *,
        max_length: int | None = MAX_LENGTH,
        keep: int = KEPT_POSITIONS,
        position: Literal["kps", "rotary"] = "kps",
        refine_image: bool | None = True,
        refine_text: bool | None = True,
        refinement: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = torch.float32,
        hidden_act: str | None = None,
        attn_implementation: str | None = None,
        **hub: Any,
    ) -> "FineLIPModel":
        """Makes the model of a CLIP: its text positions are stretched; refinement that it does not have is drawn anew.

        Args:
            source: A folder or hub id of a CLIP in the layout of `transformers`, or a file (.safetensors, .pt, …) in
                the layout of `transformers`, OpenAI, open_clip (vision transformers), FineLIP or Long-CLIP.
            max_length: Tokens that the text tower shall read; None keeps the table's rows.
            keep: First position rows that stretching leaves as they are, and that are not trained.
            position: `"kps"` stretches the table; `"rotary"` drops it, and turns queries and keys instead, which by
                itself makes an encoder that understands nothing: it is to be trained.
            refine_image: Whether the image's tokens are refined: as a file of FineLIP does (`cross_net.…`), else by
                weights that are drawn anew. None: only where the source has the weights.
            refine_text: The same for the caption's tokens.
            refinement: Of `FineLIPConfig`, how tokens are refined and compared: `refined_share` and
                `refined_text_share` of the patches (a number of tokens follows), `adaptive_share`, `global_tokens`.
            dtype: Of the result; None keeps the widest of the text weights.
            hidden_act: `"quick_gelu"` or `"gelu"`, of both towers of a file; by default the rule of
                `TextWeights.config`. Folders and hub ids have a `config.json`, which is followed.
            attn_implementation: `"eager"`, `"sdpa"`, …; by default transformers' choice.
            hub: `revision`, `token`, `local_files_only`, `subfolder`.

        Returns:
            The model, in evaluation mode on the CPU.

        Raises:
            ValueError: If the source is missing, is not a CLIP, has no image tower, or has a part of FineLIP's
                refinement but not all of it. One sentence.
        """
        subfolder = hub.pop("subfolder", None)
        file, folder, config = locate(source, subfolder, hub)
        if config is not None and config.get("model_type") != "clip":
            raise ValueError(
                f"{folder} holds a {config.get('model_type')!r}, which has no image tower: give a whole CLIP."
            )
        text, _ = load_text_encoder(
            source, subfolder=subfolder, max_length=max_length if position == "kps" else None, keep=keep,
            projection=True, dtype=dtype, hidden_act=hidden_act, **hub
        )  # fmt: skip
        if position == "rotary":
            trained_length = text.config.max_position_embeddings
            text.config.rotary = {"theta": THETA, "trained_length": trained_length}
            text.config.max_position_embeddings = max_length or trained_length
        checkpoint = read_checkpoint(file)
        tensors, vision = image_tower(checkpoint, str(file), text.config.hidden_act)
        left_out = refine_image is False and refine_text is False
        found_weights = {} if left_out else refinement_weights(checkpoint, str(file))
        refine_image, refine_text = (
            bool(found_weights) if flag is None else flag for flag in (refine_image, refine_text)
        )
        if config is not None:  # what shapes cannot say, too
            vision = CLIPConfig.from_dict(config).vision_config.to_dict()
        elif vision["hidden_size"] % HEAD_WIDTH:
            raise ValueError(
                f"{file} has an image tower {vision['hidden_size']} wide, which attention heads of {HEAD_WIDTH} do "
                "not divide: give a folder in the layout of transformers, whose config.json says the heads."
            )
        clip_config = CLIPConfig(
            text_config=text.config.to_dict(), vision_config=vision, projection_dim=text.config.projection_dim
        )
        numbers = {
            f"num_refined_{name}tokens": len(found_weights[f"{side}_refinement.weigh.3.bias"])
            for name, side in (("", "image"), ("text_", "text"))
            if found_weights
        }
        settings = refinement_settings(refinement or {}, clip_config, numbers, str(file))
        model = cls._from_config(
            FineLIPConfig(clip_config, keep, refine_image, refine_text, **settings),
            attn_implementation=attn_implementation,
        ).to(text.dtype)
        own = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text.state_dict().items()}
        own["text_projection.weight"] = own.pop("text_model.text_projection.weight")
        if position == "rotary":
            del own[f"text_model.{POSITIONS}"]
        wanted = model.clip.state_dict()
        found = own | tensors
        if missing := sorted(wanted.keys() - found.keys()):
            raise ValueError(f"{file} lacks the weights {', '.join(missing[:5])}: give a whole CLIP.")
        if extra := sorted(found.keys() - wanted.keys()):
            raise ValueError(f"{file} holds image weights that a CLIP does not have: {', '.join(extra[:5])}.")
        wrong = [name for name, tensor in found.items() if tensor.shape != wanted[name].shape]
        if wrong:
            raise ValueError(f"{file} holds weights of the wrong shape: {', '.join(wrong[:5])}.")
        model.clip.load_state_dict(found)
        for side in ("image_refinement", "text_refinement"):
            if found_weights and (module := getattr(model, side)) is not None:
                own = {name: found_weights[f"{side}.{name}"] for name in module.state_dict()}
                if wrong := [name for name, tensor in module.state_dict().items() if tensor.shape != own[name].shape]:
                    raise ValueError(
                        f"{file} holds a token refinement that does not fit its embeddings of width "
                        f"{clip_config.projection_dim}: {wrong[0]} is {tuple(own[wrong[0]].shape)}."
                    )
                module.load_state_dict(own)
        return model.eval()

    # ---------------------------------------------------------------------------------------------------- encoding

    def encode_image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> global embeddings of length 1 (B, E), and tokens, CLS first (B, 1 + P, E)."""
        tower = self.clip.vision_model
        states = tower.post_layernorm(tower(pixel_values).last_hidden_state)  # of all tokens, not of CLS alone
        tokens = self.clip.visual_projection(states)
        return F.normalize(tokens[:, 0], dim=-1), tokens

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes captions.

        Args:
            input_ids: (B, T), padded at the end.
            attention_mask: (B, T), True from the start token to the end token; by default up to the first end token.

        Returns:
            Global embeddings of length 1 (B, E), tokens (B, T, E), and the mask.
        """
        if attention_mask is None:
            ends = input_ids == self.config.clip_config.text_config.eos_token_id
            attention_mask = (ends.cumsum(1) - ends.int()) == 0
        states = self.clip.text_model(input_ids).last_hidden_state  # causal attention: padding at the end is not seen
        tokens = self.clip.text_projection(states)
        return F.normalize(last_tokens(tokens, attention_mask), dim=-1), tokens, attention_mask.bool()

    def span_embeds(self, input_ids: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes captions, and spans of them by the mean of their last states in front of the final norm.

        Args:
            input_ids: (B, T), padded at the end.
            spans: (B, S, 2), first token and the one after the last; an empty span has the mean 0.

        Returns:
            Tokens as of `encode_text` (B, T, E), and embeddings of the spans, not of length 1 (B, S, E).
        """
        output = self.clip.text_model(input_ids, output_hidden_states=True)
        states = output.hidden_states[-1]  # not normed
        position = torch.arange(states.shape[1], device=states.device)
        inside = ((position >= spans[..., :1]) & (position < spans[..., 1:])).to(states.dtype)  # (B, S, T)
        means = inside @ states / inside.sum(-1, keepdim=True).clamp(min=1)  # (B, S, D)
        project = self.clip.text_projection
        return project(output.last_hidden_state), project(self.clip.text_model.final_layer_norm(means))

    def local_image(self, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the token score reads of an image: CLS and refined patches.

        Args:
            image_tokens: (B, 1 + P, E).

        Returns:
            Tokens of length 1 (B, M, E), and their mask (B, M).
        """
        cls, patches = image_tokens[:, :1], image_tokens[:, 1:]
        mask = patches.new_ones(patches.shape[:2], dtype=torch.bool)
        if self.image_refinement is not None:
            patches, mask = self._refined(self.image_refinement, patches, None)
        if self.config.global_tokens:
            patches, mask = torch.cat([cls, patches], dim=1), F.pad(mask, (1, 0), value=True)
        return F.normalize(patches, dim=-1), mask

    def local_text(self, text_tokens: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the token score reads of a caption: refined tokens, then the end token; of length 1.

        Args:
            text_tokens: (B, T, E).
            text_mask: (B, T).

        Returns:
            Tokens (B, N, E), and their mask (B, N).
        """
        positions = torch.arange(text_mask.shape[1], device=text_mask.device)
        others = text_mask & (positions < text_mask.sum(1, keepdim=True) - 1)
        if self.text_refinement is not None:
            ends = last_tokens(text_tokens, text_mask)
            text_tokens, text_mask = self._refined(self.text_refinement, text_tokens, others)
            if self.config.global_tokens:
                text_tokens = torch.cat([text_tokens, ends[:, None]], dim=1)
                text_mask = F.pad(text_mask, (0, 1), value=True)
        elif not self.config.global_tokens:
            text_mask = others
        return F.normalize(text_tokens, dim=-1), text_mask

    def _refined(self, refinement: TokenRefinement, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Refined tokens (B, K, E), and which of them count (B, K)."""
        refined, weights = refinement.refine(tokens, mask)
        if self.config.adaptive_share is None:
            return refined, weights.new_ones(refined.shape[:2], dtype=torch.bool)
        return refined, adaptive_mask(weights, self.config.adaptive_share)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> FineLIPOutput:
        """Encodes images (B, 3, H, W) and captions (B', T)."""
        image_embeds, image_tokens = self.encode_image(pixel_values)
        text_embeds, text_tokens, text_mask = self.encode_text(input_ids, attention_mask)
        local_image_tokens, local_image_mask = self.local_image(image_tokens)
        local_text_tokens, local_text_mask = self.local_text(text_tokens, text_mask)
        return FineLIPOutput(
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            image_tokens=image_tokens,
            text_tokens=text_tokens,
            text_mask=text_mask,
            local_image_tokens=local_image_tokens,
            local_image_mask=local_image_mask,
            local_text_tokens=local_text_tokens,
            local_text_mask=local_text_mask,
            logit_scale=self.clip.logit_scale.exp(),
        )

    def text_encoder(self) -> CLIPTextModel:
        """A copy of the text tower as what Stable Diffusion loads: a stock model, or one with rotary positions."""
        text_config = self.config.clip_config.text_config
        rotary = rotary_settings(text_config) is not None
        settings = {name: value for name, value in text_config.to_dict().items() if name != "model_type"}
        config = (RotaryTextConfig if rotary else type(text_config)).from_dict(settings)
        encoder = (RotaryTextModel if rotary else CLIPTextModel)(config).to(self.dtype)
        own = {name.removeprefix("text_model."): tensor for name, tensor in self.clip.text_model.state_dict().items()}
        encoder.load_state_dict({name: own[name.removeprefix("text_model.")] for name in encoder.state_dict()})
        return encoder.eval()

    def save_checkpoint(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Saves the whole model as one file in the layout of FineLIP's code; `from_clip` reads it back bit for bit.

        Args:
            path: The file, .pt or .safetensors.
            overwrite: Whether to replace the file.

        Returns:
            `path`.

        Raises:
            ValueError: If the file has another suffix, or exists and `overwrite` is false; if the model has refinement
                for one tower alone; or if it differs from FineLIP's code in what the layout does not say: quick GELU,
                and heads of width 64.
        """
        path = Path(path)
        if path.suffix not in (".pt", ".safetensors") or path.is_dir():
            raise ValueError(f"{path} must be a file that ends in .pt or .safetensors.")
        if path.exists() and not overwrite:
            raise ValueError(f"{path} would be overwritten: choose another file, or say overwrite=True.")
        if rotary_settings(self.config.clip_config.text_config) is not None:
            raise ValueError("FineLIP's layout holds a position table, but these positions are rotary: save a folder.")
        config = self.config
        if (
            config.adaptive_share
            or not config.global_tokens
            or (config.num_refined_text_tokens != config.num_refined_tokens)
        ):
            raise ValueError(
                "FineLIP's layout has one number of refined tokens for both towers, all of which count beside CLS and "
                "end token: keep this model with save_pretrained."
            )
        for name in ("text", "vision"):
            tower = getattr(self.config.clip_config, f"{name}_config")
            width = tower.hidden_size // tower.num_attention_heads
            if (tower.hidden_act, width) != ("quick_gelu", HEAD_WIDTH):
                raise ValueError(
                    f"FineLIP's layout implies quick_gelu and heads of width {HEAD_WIDTH}, but the {name} tower has "
                    f"{tower.hidden_act} and heads of width {width}: keep the model with save_pretrained."
                )
        tensors = finelip_layout(self.state_dict())
        with writing(path) as part:
            if path.suffix == ".pt":
                torch.save(tensors, part)
            else:
                save_file(tensors, part, metadata={"format": "pt"})
        return path


def load_clip(
    source: str | Path, *, max_length: int | None = None, **options: Any
) -> tuple[FineLIPModel, CLIPTokenizer, CLIPImageProcessor]:
    """Loads a CLIP, or a saved `FineLIPModel`, with what prepares its input.

    Args:
        source: A folder or hub id of `FineLIPModel.save_pretrained`, or whatever `FineLIPModel.from_clip` takes.
        max_length: Tokens that a CLIP's text tower shall read; None keeps the table's rows.
        options: Of `FineLIPModel.from_clip`; but refinement is by default the source's own, so that nothing that is
            measured rests on weights that were drawn. With `refine_image=True` or `refine_text=True`, refinement that
            the source does not have is drawn anew, for training.

    Returns:
        Model, tokenizer, and image processor: the source's own, or CLIP's at the size that the model reads.

    Raises:
        ValueError: If there is no such model. One sentence.
    """
    hub: dict[str, Any] = {
        name: options[name] for name in ("revision", "token", "local_files_only") if name in options
    }
    file, folder, config = locate(source, options.get("subfolder"), hub)
    if config is not None and config.get("model_type") == FineLIPConfig.model_type:
        saved = FineLIPConfig.from_dict(config)
        of_text = saved.clip_config.text_config
        rotary = rotary_settings(of_text) is not None
        if options.get("position") == "rotary" and not rotary:
            raise ValueError(
                f"{folder} has a trained position table: rotary positions start from a CLIP, or from such."
            )
        if rotary and max_length is not None:
            of_text.max_position_embeddings = max_length
        elif max_length not in (None, of_text.max_position_embeddings):
            raise ValueError(
                f"{folder} reads {of_text.max_position_embeddings} tokens, not max_length={max_length}: "
                "leave max_length out."
            )
        own = {
            name: value
            for name, value in options.items()
            if name not in (*hub, "subfolder", "hidden_act", "refinement", "position")
            and (value is not None or not name.startswith("refine_"))
        }
        numbers = {
            name: getattr(saved, name)
            for name in ("num_refined_tokens", "num_refined_text_tokens")
            if saved.refine_image or saved.refine_text
        }
        settings = refinement_settings(options.get("refinement") or {}, saved.clip_config, numbers, str(folder))
        own |= {name: value for name, value in settings.items() if value is not None}
        if rotary:  # whose window may differ from the saved one
            own["clip_config"] = saved.clip_config
        model = FineLIPModel.from_pretrained(folder, **own).eval()
    else:
        of_source: dict[str, Any] = {"refine_image": None, "refine_text": None}
        model = FineLIPModel.from_clip(source, max_length=max_length, **(of_source | options))
    text, size = model.config.clip_config.text_config, model.config.clip_config.vision_config.image_size
    tokenizer = _tokenizer(None, folder, text.max_position_embeddings, None, text.vocab_size, str(file))
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        return model, tokenizer, CLIPImageProcessor.from_pretrained(folder)
    crop = {"height": size, "width": size}
    return model, tokenizer, CLIPImageProcessor(size={"shortest_edge": size}, crop_size=crop)
