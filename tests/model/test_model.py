"""FineLIP's model: against a plain loop, transformers and open_clip; what it trains, reads and saves."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_clip import (
    END,
    LENGTHS,
    PATCHES,
    POSITIONS,
    REFINED,
    TOKENIZER,
    TOWER,
    E,
    assert_same,
    draw_batch,
    randomize,
)
from tiny_models import WIDTH
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

import finelip_diffusion
from finelip_diffusion import FineLIPStableDiffusionPipeline, load_text_encoder
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.model import FineLIPConfig, FineLIPModel, FineLIPOutput, load_clip
from finelip_diffusion.refinement import adaptive_mask
from finelip_diffusion.text_encoder import save_text_encoder

# --- parity ---------------------------------------------------------------------------------------------------------


def refined(refinement: Any, tokens: Tensor) -> Tensor:
    """Section 3.2, of the tokens (N, E) of one image or caption: N tokens weighed for each of K."""
    weights = (refinement.scale * refinement.weigh(tokens)).softmax(0)
    return torch.stack([(weights[:, k, None] * tokens).sum(0) for k in range(weights.shape[1])])


def plain_scores(model: FineLIPModel, pixel_values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Section 3 for one image and one caption without padding: token score, and FineLIP*."""
    clip = model.clip
    states = clip.vision_model(pixel_values[None]).last_hidden_state[0]
    image = clip.visual_projection(clip.vision_model.post_layernorm(states))
    text = clip.text_projection(clip.text_model(ids[None]).last_hidden_state[0])
    v = F.normalize(torch.cat([image[:1], refined(model.image_refinement, image[1:])]), dim=-1)
    t = F.normalize(torch.cat([refined(model.text_refinement, text[:-1]), text[-1:]]), dim=-1)
    similarity = [[F.leaky_relu(word @ patch, 0.1) for patch in v] for word in t]
    by_words = [max(row) for row in similarity]
    by_patches = [max(column) for column in zip(*similarity, strict=True)]
    tokens = sum(by_words) / len(by_words) + sum(by_patches) / len(by_patches)
    return tokens, 0.8 * F.cosine_similarity(image[0], text[-1], dim=0) + 0.2 * tokens


def test_the_whole_model_equals_a_plain_loop_over_pairs(model: FineLIPModel) -> None:
    """Scores and gradients, in float64, to the last bits."""
    model, batch = model.double(), draw_batch(torch.float64)
    output = model(**batch)
    assert isinstance(output, FineLIPOutput) and output.logit_scale == model.clip.logit_scale.exp()
    plain = [
        [plain_scores(model, image, ids[:length]) for ids, length in zip(batch["input_ids"], LENGTHS, strict=True)]
        for image in batch["pixel_values"]
    ]
    tokens, star = (torch.stack([torch.stack([pair[n] for pair in row]) for row in plain]) for n in (0, 1))
    torch.testing.assert_close(output.scores(), star, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.scores(global_share=0), tokens, rtol=0, atol=1e-12)
    weights = torch.randn(star.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if "logit_scale" not in n), strict=True)
    both = [torch.autograd.grad((weights * scores).sum(), parameters) for scores in (output.scores(), star)]
    largest = max(gradient.abs().max() for gradient in both[1])
    for name, left, right in zip(names, *both, strict=True):
        if name == POSITIONS:
            right = right.index_fill(0, torch.arange(20), 0)  # the rows that the model does not train
        assert (left - right).abs().max() < 1e-11 * largest, name


def test_towers_and_tokens_are_those_of_transformers(model: FineLIPModel, batch: dict[str, Tensor]) -> None:
    """Bit for bit: the same modules in the same shapes, up to the order of normalizing."""
    stock = CLIPModel(model.config.clip_config)
    stock.load_state_dict(model.clip.state_dict())
    stock.eval()
    with torch.inference_mode():
        output = model(**batch)
        text = stock.get_text_features(batch["input_ids"]).pooler_output
        image = stock.get_image_features(batch["pixel_values"]).pooler_output
        states = stock.vision_model(batch["pixel_values"]).last_hidden_state
        tokens = stock.visual_projection(stock.vision_model.post_layernorm(states))
    assert torch.equal(output.image_tokens, tokens)
    torch.testing.assert_close(output.image_tokens[:, 0], image, rtol=0, atol=1e-5)
    assert torch.equal(output.text_tokens[range(4), [n - 1 for n in LENGTHS]], text)
    torch.testing.assert_close(output.text_embeds, F.normalize(text, dim=-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(output.image_embeds, F.normalize(image, dim=-1), rtol=0, atol=1e-6)
    assert output.image_tokens.shape == (4, 1 + PATCHES, E) and output.text_tokens.shape == (4, max(LENGTHS), E)
    assert output.local_image_tokens.shape == output.local_text_tokens.shape == (4, 1 + REFINED, E)
    assert output.local_text_mask.all()
    for tokens in (output.local_image_tokens, output.local_text_tokens):
        torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(4, 1 + REFINED), rtol=0, atol=1e-6)


def test_without_refinement_all_tokens_are_compared(folder: Path, batch: dict[str, Tensor]) -> None:
    model = FineLIPModel.from_clip(folder, refine_image=False, refine_text=False)
    with torch.inference_mode():
        output = model(**batch)
    assert torch.equal(output.local_image_tokens, F.normalize(output.image_tokens, dim=-1))
    assert torch.equal(output.local_text_tokens, F.normalize(output.text_tokens, dim=-1))
    assert torch.equal(output.local_text_mask, batch["attention_mask"])


@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("padding", ["end", "zero", "random"])
def test_padding_changes_nothing(
    _model: FineLIPModel, folder: Path, batch: dict[str, Tensor], padding: str, refine: bool
) -> None:
    """In another shape other kernels sum in another order: a few last bits of numbers of order 1."""
    model = _model if refine else FineLIPModel.from_clip(folder, refine_image=False, refine_text=False)
    ids = F.pad(batch["input_ids"], (0, 248 - max(LENGTHS)), value=END)
    mask = F.pad(batch["attention_mask"], (0, 248 - max(LENGTHS)))
    noise = torch.randint(END, ids.shape, generator=torch.Generator().manual_seed(3))
    ids = ids.where(mask, {"end": ids, "zero": torch.zeros_like(ids), "random": noise}[padding])
    with torch.inference_mode():
        expected = model(**batch)
        outputs = [model(batch["pixel_values"], ids, mask), model(batch["pixel_values"], ids)]  # or it finds the ends
    for output in outputs:
        assert torch.equal(output.text_mask, mask)
        torch.testing.assert_close(output.text_embeds, expected.text_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.scores(), expected.scores(), rtol=0, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch(model: FineLIPModel, batch: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        whole = model(**batch)
        part = model(**{name: tensor[1:3] for name, tensor in batch.items()})
    for name, tensor in part.items():
        if tensor.ndim:
            torch.testing.assert_close(tensor, whole[name][1:3], rtol=0, atol=1e-5)
    torch.testing.assert_close(part.scores(), whole.scores()[1:3, 1:3], rtol=0, atol=1e-5)


def test_a_caption_without_an_end_token_is_read_whole(model: FineLIPModel, batch: dict[str, Tensor]) -> None:
    ids = batch["input_ids"][1:2, :100]
    embeds, tokens, mask = model.encode_text(ids)
    assert mask.all() and torch.equal(embeds, F.normalize(tokens[:, -1], dim=-1))


# --- training -------------------------------------------------------------------------------------------------------


def loss_of(model: FineLIPModel, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    logits = output.logit_scale * output.scores()
    return F.cross_entropy(logits, torch.arange(len(logits)))


@pytest.mark.parametrize(("keep", "max_length"), [(20, 248), (58, 134)])
def test_kept_positions_are_not_trained_and_all_else_is(
    folder: Path, batch: dict[str, Tensor], keep: int, max_length: int
) -> None:
    model = FineLIPModel.from_clip(folder, keep=keep, max_length=max_length).train()
    for refinement in (model.image_refinement, model.text_refinement):
        randomize(refinement)
    assert model.config.keep == keep
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    positions = dict(model.named_parameters())[POSITIONS]
    others = [parameter for name, parameter in model.named_parameters() if name != POSITIONS]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": [positions], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        assert torch.equal(positions.grad[:keep], torch.zeros(keep, WIDTH))
        assert (positions.grad[keep : max(LENGTHS) - 1] != 0).any(1).all()
        for name, parameter in model.named_parameters():
            # A bias that shifts all logits of a softmax alike has no effect: its gradient is rounding.
            assert parameter.grad is not None and (parameter.grad.any() or name.endswith(("k_proj.bias", "3.bias")))
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert torch.equal(positions[:keep], before[POSITIONS][:keep])
    assert (positions[keep : max(LENGTHS) - 1] != before[POSITIONS][keep : max(LENGTHS) - 1]).any(1).all()


def test_gradient_checkpointing_changes_no_gradient(model: FineLIPModel, batch: dict[str, Tensor]) -> None:
    model.train()
    loss_of(model, batch).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    loss_of(model, batch).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(model: FineLIPModel, batch: dict[str, Tensor], autocast: bool) -> None:
    """8 bits: scores of order 1, after two layers of rounding, are good to a few hundredths."""
    with torch.inference_mode():
        exact = model(**batch).scores()
    if not autocast:
        model, batch = model.bfloat16(), batch | {"pixel_values": batch["pixel_values"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(model, batch)
        scores = model(**batch).scores()
    torch.testing.assert_close(scores.float(), exact, rtol=0, atol=0.05)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert not model.get_parameter(POSITIONS).grad[:20].any()


def test_attention_is_the_one_that_was_asked_for(folder: Path, batch: dict[str, Tensor]) -> None:
    outputs = []
    for kind in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = FineLIPModel.from_clip(folder, attn_implementation=kind)
        attentions = [m for m in model.modules() if type(m).__name__ == "CLIPAttention"]
        assert len(attentions) == 4 and all(m.config._attn_implementation == kind for m in attentions)
        with torch.inference_mode():
            outputs.append(model(**batch).scores())
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"refine_text": False}, {"refine_image": False, "keep": 58, "max_length": 134}]
)
def test_what_is_saved_is_loaded(
    folder: Path, tmp_path: Path, batch: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = FineLIPModel.from_clip(folder, dtype=dtype, **options)
    model.save_pretrained(tmp_path)
    again = FineLIPModel.from_pretrained(tmp_path)
    assert_same(model, again)
    assert again.dtype == dtype and not again.training
    for name in ("keep", "refine_image", "refine_text", "num_refined_tokens"):
        assert getattr(again.config, name) == getattr(model.config, name)
    assert (again.image_refinement is None, again.text_refinement is None) == (
        not again.config.refine_image,
        not again.config.refine_text,
    )
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    with torch.inference_mode():
        assert torch.equal(model(**batch).scores(), again(**batch).scores())
    again(**batch).scores().sum().backward()
    assert not again.get_parameter(POSITIONS).grad[: model.config.keep].any()


def test_the_text_tower_drops_into_stable_diffusion(
    model: FineLIPModel, batch: dict[str, Tensor], tmp_path: Path, stable_diffusion_folder: Path
) -> None:
    encoder = model.text_encoder()
    assert type(encoder) is CLIPTextModel and not encoder.training
    with torch.inference_mode():
        own = model.clip.text_model(batch["input_ids"], output_hidden_states=True)
        stock = encoder(batch["input_ids"], output_hidden_states=True)
    assert all(map(torch.equal, own.hidden_states, stock.hidden_states))
    assert torch.equal(own.last_hidden_state, stock.last_hidden_state)
    encoder.get_parameter("final_layer_norm.weight").data.zero_()  # a copy
    assert model.clip.text_model.final_layer_norm.weight.any()

    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED_MODEL, subfolder="tokenizer", model_max_length=248)
    save_text_encoder(model.text_encoder(), tokenizer, tmp_path)
    assert_same(load_text_encoder(tmp_path)[0], model.text_encoder())
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(stable_diffusion_folder, finelip=tmp_path)
    assert_same(pipe.text_encoder, model.text_encoder())
    caption = "in cell one a small blue square, then a green ring; " * 15
    embeds, _ = pipe.encode_prompt(caption, "cpu", 1, False)
    ids = tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(embeds, model.clip.text_model(ids).last_hidden_state)


# --- what of the tokens is compared --------------------------------------------------------------------------------


def test_shares_of_refined_tokens_are_set_apart(folder: Path, batch: dict[str, Tensor], tmp_path: Path) -> None:
    shares = {"refined_share": 0.5, "refined_text_share": 0.25}
    model = FineLIPModel.from_clip(folder, refinement=shares)
    output = model(**batch)
    assert output.local_image_tokens.shape[1] == 1 + PATCHES // 2
    assert output.local_text_tokens.shape[1] == 1 + PATCHES // 4
    model.save_pretrained(tmp_path / "saved")
    TOKENIZER.save_pretrained(tmp_path / "saved")
    again, *_ = load_clip(tmp_path / "saved", refinement=shares | {"refined_share": None, "global_tokens": True})
    torch.testing.assert_close(again(**batch).scores(), output.scores(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="has a refinement to 8 tokens, and refined_share=0.1 asks for 1"):
        load_clip(tmp_path / "saved", refinement={"refined_share": 0.1})
    with pytest.raises(ValueError, match="one number of refined tokens for both towers"):
        model.save_checkpoint(tmp_path / "model.pt")


def test_without_global_tokens_the_score_is_of_patches_and_words(folder: Path, batch: dict[str, Tensor]) -> None:
    both = [FineLIPModel.from_clip(folder, refinement={"global_tokens": flag}) for flag in (True, False)]
    both[1].load_state_dict(both[0].state_dict())
    with_them, without = (model(**batch) for model in both)
    assert torch.equal(without.local_image_tokens, with_them.local_image_tokens[:, 1:])
    assert torch.equal(without.local_text_tokens, with_them.local_text_tokens[:, :-1])
    plain = FineLIPModel.from_clip(folder, refine_image=False, refine_text=False, refinement={"global_tokens": False})
    output = plain(**batch)
    assert output.local_image_tokens.shape[1] == PATCHES
    assert output.local_text_mask.sum(1).tolist() == [length - 1 for length in LENGTHS]  # all but the end token


def test_an_adaptive_share_counts_as_many_tokens_as_are_looked_at(folder: Path, batch: dict[str, Tensor]) -> None:
    """Weights that are all alike look at every token; where they meet in one, one refined token counts."""
    model = FineLIPModel.from_clip(folder, refinement={"refined_share": 0.5, "adaptive_share": 0.25})
    for refinement in (model.image_refinement, model.text_refinement):
        torch.nn.init.zeros_(refinement.weigh[-1].weight)
    output = model(**batch)
    assert output.local_image_mask.sum(1).tolist() == [1 + PATCHES // 4] * 4
    expected = [1 + min(8, -(-(length - 1) // 4)) for length in LENGTHS]
    assert output.local_text_mask.sum(1).tolist() == expected
    weights = torch.zeros(1, PATCHES, 8)
    weights[:, 3] = 1
    assert adaptive_mask(weights, 0.25).sum() == 1
    weights = torch.eye(PATCHES)[None, :, :8]
    assert adaptive_mask(weights, 0.25).sum() == 2  # eight tokens are looked at
    scores = output.scores(0)
    for row, image in enumerate(output.local_image_tokens):
        for column, text in enumerate(output.local_text_tokens):
            kept = image[output.local_image_mask[row]], text[output.local_text_mask[column]]
            alike = F.leaky_relu(kept[1] @ kept[0].T, 0.1)
            expected_score = alike.max(1).values.mean() + alike.max(0).values.mean()
            torch.testing.assert_close(scores[row, column], expected_score, rtol=0, atol=1e-5)


def test_spans_are_pooled_in_front_of_the_final_norm(model: FineLIPModel, batch: dict[str, Tensor]) -> None:
    """As GOAL's code has it: mean, final norm, projection."""
    spans = torch.tensor([[[1, 4], [2, 6]], [[5, 90], [0, 0]], [[1, 29], [3, 4]], [[0, 1], [0, 2]]])
    tokens, embeds = model.span_embeds(batch["input_ids"], spans)
    torch.testing.assert_close(tokens, model.encode_text(batch["input_ids"], batch["attention_mask"])[1])
    tower = model.clip.text_model
    states = tower(batch["input_ids"], output_hidden_states=True).hidden_states[-1]
    for row, column, (first, end) in ((0, 1, (2, 6)), (1, 0, (5, 90)), (2, 1, (3, 4))):
        mean = states[row, first:end].mean(0)
        expected = model.clip.text_projection(tower.final_layer_norm(mean))
        torch.testing.assert_close(embeds[row, column], expected, rtol=0, atol=1e-5)
    assert not torch.allclose(embeds[0, 0], tokens[0, 1:4].mean(0), atol=1e-3)  # the other order is another thing


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_size", "patch_size", "number"), [(224, 16, 39), (224, 14, 51), (224, 32, 9), (8, 8, 1)]
)
def test_a_fifth_of_the_patches_is_left(image_size: int, patch_size: int, number: int) -> None:
    clip = CLIPConfig(vision_config={"image_size": image_size, "patch_size": patch_size})
    assert FineLIPConfig(clip).num_refined_tokens == number
    assert FineLIPConfig(clip.to_dict(), num_refined_tokens=7).num_refined_tokens == 7


def test_public_names_and_defaults() -> None:
    assert finelip_diffusion.FineLIPConfig is FineLIPConfig and finelip_diffusion.FineLIPModel is FineLIPModel
    config = FineLIPConfig()
    assert (config.keep, config.refine_image, config.refine_text) == (20, True, True)
    assert config.clip_config.text_config.max_position_embeddings == 248


def test_a_model_from_a_configuration_is_drawn_as_clip_draws_it() -> None:
    clip = CLIPConfig(text_config=TOWER | {"max_position_embeddings": 248}, vision_config=TOWER, projection_dim=E)
    torch.manual_seed(0)
    model, stock = FineLIPModel(FineLIPConfig(clip)), CLIPModel(clip)
    for (name, own), other in zip(model.clip.named_parameters(), stock.parameters(), strict=True):
        if own.ndim > 1:
            assert own.std().item() == pytest.approx(other.std().item(), rel=0.2), name
