"""FineLIP's model: against a plain loop, transformers and open_clip; what it trains, reads and saves."""

import copy
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import WIDTH, tiny_text_encoder
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

import finelip_diffusion
from finelip_diffusion import FineLIPStableDiffusionPipeline, load_text_encoder
from finelip_diffusion.model import FineLIPConfig, FineLIPModel, FineLIPOutput, load_clip
from finelip_diffusion.pipeline import BUNDLED_MODEL
from finelip_diffusion.positions import stretch_positions
from finelip_diffusion.refinement import adaptive_mask
from finelip_diffusion.text_encoder import save_text_encoder
from finelip_diffusion.tokenizer import VOCAB_SIZE
from finelip_diffusion.towers import image_tower

E, PATCHES, REFINED = 24, 16, 3
TOKENIZER = CLIPTokenizer.from_pretrained(BUNDLED_MODEL, subfolder="tokenizer")
END = TOKENIZER.eos_token_id
LENGTHS = (7, 130, 30, 2)  # tokens of captions, start and end included; the last one is empty
POSITIONS = "clip.text_model.embeddings.position_embedding.weight"
TOWER = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}


def randomize(module: Any, seed: int = 0) -> None:
    """Biases and norms too, which are drawn as 0 and 1 and would hide where they stand."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Refinement is drawn anew wherever a CLIP is loaded."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP of 77 tokens and 4 x 4 patches, as `transformers` saves one."""
    path = tmp_path_factory.mktemp("clip")
    ids = {"vocab_size": len(TOKENIZER), "bos_token_id": END - 1, "eos_token_id": END, "pad_token_id": END}
    vision = TOWER | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=TOWER | ids, vision_config=vision, projection_dim=E))
    randomize(clip)
    clip.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def _model(folder: Path) -> FineLIPModel:
    torch.manual_seed(0)
    model = FineLIPModel.from_clip(folder)
    for refinement in (model.image_refinement, model.text_refinement):
        randomize(refinement)
    return model


@pytest.fixture
def model(_model: FineLIPModel) -> FineLIPModel:
    return copy.deepcopy(_model)


def draw_batch(dtype: torch.dtype = torch.float32, end: int = END) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, end - 1, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids[:, 0] = end - 1
    for row, length in enumerate(LENGTHS):
        ids[row, length - 1 :] = end
    images = torch.randn(len(LENGTHS), 3, 32, 32, generator=generator)
    return {"pixel_values": images.to(dtype), "input_ids": ids, "attention_mask": mask}


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return draw_batch()


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


def assert_same(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


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


# --- sources --------------------------------------------------------------------------------------------------------


def test_a_folder_of_transformers(folder: Path, _model: FineLIPModel) -> None:
    stock = CLIPModel.from_pretrained(folder).state_dict()
    for name, tensor in _model.clip.state_dict().items():
        expected = stretch_positions(stock[name]) if f"clip.{name}" == POSITIONS else stock[name]
        assert torch.equal(tensor, expected), name
    assert _model.clip.config.vision_config.num_attention_heads == 2  # which no shape says
    assert not _model.training and _model.dtype == torch.float32


def tiny_open_clip(quick_gelu: bool = True, custom: bool = False, **vision: float) -> Any:
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16} | vision
    text = {"context_length": 77, "vocab_size": VOCAB_SIZE, "width": 64, "heads": 1, "layers": 2}
    torch.manual_seed(0)
    kind = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    theirs = kind(E, vision, text, quick_gelu=quick_gelu)
    randomize(theirs)
    return theirs.eval()


def save_state(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def assert_features_equal(model: FineLIPModel, theirs: Any) -> None:
    """To 1e-5, relative to features of order 1: the same sums in another order, in float32."""
    batch = draw_batch(end=VOCAB_SIZE - 1)
    ids, images = batch["input_ids"][:, :77], batch["pixel_values"]
    ids[:, 76] = VOCAB_SIZE - 1
    with torch.inference_mode():
        text, image = theirs.encode_text(ids), theirs.encode_image(images)
        embeds, tokens, mask = model.encode_text(ids)
        ours = tokens[range(4), mask.sum(1) - 1]
        torch.testing.assert_close(ours, text, rtol=0, atol=1e-5 * text.abs().max())
        torch.testing.assert_close(embeds, F.normalize(text, dim=-1), rtol=0, atol=1e-5)
        embeds, tokens = model.encode_image(images)
        torch.testing.assert_close(tokens[:, 0], image, rtol=0, atol=1e-5 * image.abs().max())
        torch.testing.assert_close(embeds, F.normalize(image, dim=-1), rtol=0, atol=1e-5)
    assert model.clip.logit_scale == theirs.logit_scale


@pytest.mark.parametrize("file", ["clip.pt", "clip.safetensors"])
def test_a_file_in_openais_layout(tmp_path: Path, file: str) -> None:
    theirs = tiny_open_clip()
    path = save_state(theirs.state_dict(), tmp_path / file)
    model = FineLIPModel.from_clip(path, max_length=None)
    assert_features_equal(model, theirs)
    assert model.config.num_refined_tokens == 1  # of four patches
    stretched = FineLIPModel.from_clip(path)
    assert torch.equal(stretched.get_parameter(POSITIONS), stretch_positions(theirs.positional_embedding))


def test_a_file_of_a_training_run(tmp_path: Path) -> None:
    theirs = tiny_open_clip(quick_gelu=False, custom=True)  # a text tower of its own: `text.…`
    state = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pt")
    assert_features_equal(FineLIPModel.from_clip(tmp_path / "epoch_3.pt", max_length=None), theirs)


def test_wide_image_towers_have_wide_heads(tmp_path: Path) -> None:
    """ViT-H's: 16 heads of 80, which no shape says."""
    theirs = tiny_open_clip(width=1280, head_width=80, layers=1, mlp_ratio=0.5)
    path = save_state(theirs.state_dict(), tmp_path / "clip.pt")
    assert_features_equal(FineLIPModel.from_clip(path, max_length=None), theirs)


def test_heads_are_those_of_every_published_vision_transformer() -> None:
    """open_clip's own configurations, of towers that its plain CLIP classes build."""
    configs = [open_clip.get_model_config(name) for name in open_clip.list_models()]
    towers = [config["vision_cfg"] for config in configs if isinstance(config["vision_cfg"].get("layers"), int)]
    assert len(towers) > 30
    for tower in towers:
        width = tower.get("width", 768)
        state = {
            "visual.conv1.weight": torch.empty(width, 3, 2, 2, device="meta"),
            "visual.positional_embedding": torch.empty(5, width, device="meta"),
            "visual.transformer.resblocks.0.mlp.c_fc.weight": torch.empty(4 * width, width, device="meta"),
            "visual.proj": torch.empty(width, E, device="meta"),
        }
        assert image_tower(state)[1]["num_attention_heads"] == width // tower.get("head_width", 64)


def test_the_activation_of_a_file_is_assumed_aloud_and_can_be_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = tiny_open_clip(quick_gelu=False)
    path = save_state(theirs.state_dict(), tmp_path / "clip.pt")
    assumed = FineLIPModel.from_clip(path, max_length=None)
    assert "quick_gelu is assumed" in caplog.text
    with pytest.raises(AssertionError):
        assert_features_equal(assumed, theirs)
    caplog.clear()
    assert_features_equal(load_clip(path, hidden_act="gelu")[0], theirs)
    assert "assumed" not in caplog.text


def test_a_finelip_file_with_two_tables(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = tiny_open_clip()
    generator = torch.Generator().manual_seed(4)
    tables = [torch.randn(248, 64, generator=generator) for _ in range(2)]
    state = theirs.state_dict() | {"positional_embedding": tables[0], "positional_embedding_res": tables[1]}
    model = FineLIPModel.from_clip(save_state(state, tmp_path / "finelip.pt"))
    assert torch.equal(model.get_parameter(POSITIONS), torch.cat([tables[0][:20], tables[1][20:]]))
    assert "assumed" not in caplog.text
    theirs.positional_embedding.data = model.get_parameter(POSITIONS)[:77].detach()
    assert_features_equal(model, theirs)


def finelip_state() -> dict[str, Tensor]:
    """What FineLIP's training saves: two position tables of 248 rows, both towers, and `cross_net.*`."""
    state = {name: tensor.clone() for name, tensor in tiny_open_clip().state_dict().items()}
    state.pop("attn_mask", None)
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    for name in ("positional_embedding", "positional_embedding_res"):
        state[name] = draw(248, 64)
    hidden, number = int(0.2 * E), REFINED
    for net in ("cross_net.aggr_net", "cross_net.cap_aggr_net"):
        shapes = {"0.weight": (E,), "0.bias": (E,), "1.weight": (hidden, E), "1.bias": (hidden,),
                  "3.weight": (number, hidden), "3.bias": (number,)}  # fmt: skip
        state |= {f"{net}.weight.{name}": 3 * draw(*shape) for name, shape in shapes.items()}
        state[f"{net}.scale"] = 2 + draw(1, 1, 1)
    return state


def literal_tower(state: dict[str, Tensor], prefix: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """Pre-norm blocks with quick GELU and heads of 64, of one image's or caption's states (N, D)."""
    blocks = 1 + max(
        int(name.split(".resblocks.")[1].split(".")[0]) for name in state if f"{prefix}resblocks." in name
    )
    for number in range(blocks):
        own = {name.split(f".{number}.", 1)[1]: t for name, t in state.items()
               if name.startswith(f"{prefix}resblocks.{number}.")}  # fmt: skip
        normed = F.layer_norm(x, x.shape[-1:], own["ln_1.weight"], own["ln_1.bias"])
        qkv = normed @ own["attn.in_proj_weight"].T + own["attn.in_proj_bias"]
        heads = []
        for q, k, v in zip(*(part.split(64, dim=1) for part in qkv.chunk(3, dim=1)), strict=True):
            logits = q @ k.T / 8
            heads.append((logits if mask is None else logits + mask).softmax(1) @ v)
        x = x + torch.cat(heads, 1) @ own["attn.out_proj.weight"].T + own["attn.out_proj.bias"]
        normed = F.layer_norm(x, x.shape[-1:], own["ln_2.weight"], own["ln_2.bias"])
        inner = normed @ own["mlp.c_fc.weight"].T + own["mlp.c_fc.bias"]
        x = x + (inner * torch.sigmoid(1.702 * inner)) @ own["mlp.c_proj.weight"].T + own["mlp.c_proj.bias"]
    return x


def literal_star(state: dict[str, Tensor], image: Tensor, ids: Tensor) -> Tensor:
    """FineLIP* of one image (3, H, W) and one caption without padding, from the names and tables of the file."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def refine(x: Tensor, net: str) -> Tensor:
        inner = norm(x, f"{net}.weight.0") @ state[f"{net}.weight.1.weight"].T + state[f"{net}.weight.1.bias"]
        logits = F.gelu(inner) @ state[f"{net}.weight.3.weight"].T + state[f"{net}.weight.3.bias"]
        return (logits * state[f"{net}.scale"].item()).softmax(0).T @ x  # (K, N) @ (N, E)

    patches = F.conv2d(image[None], state["visual.conv1.weight"], stride=16)[0].flatten(1).T
    x = torch.cat([state["visual.class_embedding"][None], patches]) + state["visual.positional_embedding"]
    x = literal_tower(state, "visual.transformer.", norm(x, "visual.ln_pre"), None)
    v = norm(x, "visual.ln_post") @ state["visual.proj"]
    rows = torch.arange(len(ids))[:, None]
    tables = state["positional_embedding"][: len(ids)] * (rows < 20)  # the frozen table, then the trained one
    tables = tables + state["positional_embedding_res"][: len(ids)] * (rows >= 20)
    causal = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    x = literal_tower(state, "transformer.", state["token_embedding.weight"][ids] + tables, causal)
    t = norm(x, "ln_final") @ state["text_projection"]
    cosine = F.cosine_similarity(v[0], t[-1], dim=0)
    v = F.normalize(torch.cat([v[:1], refine(v[1:], "cross_net.aggr_net")]), dim=-1)
    t = F.normalize(torch.cat([refine(t[:-1], "cross_net.cap_aggr_net"), t[-1:]]), dim=-1)
    similarity = F.leaky_relu(t @ v.T, 0.1)
    return 0.8 * cosine + 0.2 * (similarity.amax(1).mean() + similarity.amax(0).mean())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_finelip_file_keeps_its_refinement(tmp_path: Path, suffix: str) -> None:
    """FineLIP* of the loaded model against a forward written on the file's own names; and back into such a file."""
    state = finelip_state()
    model, _, _ = load_clip(save_state(state, tmp_path / f"finelip{suffix}"))
    assert model.config.num_refined_tokens == REFINED
    batch = draw_batch(end=VOCAB_SIZE - 1)
    with torch.inference_mode():
        scores = model(**batch).scores()
        literal = [
            [literal_star(state, image, ids[:length]) for ids, length in zip(batch["input_ids"], LENGTHS, strict=True)]
            for image in batch["pixel_values"]
        ]
    literal = torch.stack([torch.stack(row) for row in literal])
    torch.testing.assert_close(scores, literal, rtol=0, atol=1e-5)  # the same sums in another order, in float32
    assert scores.std() > 0.01  # of which the rounding is a thousandth

    path = model.save_checkpoint(tmp_path / f"again{suffix}")
    again = load_clip(path)[0]
    assert_same(again, model)
    written = torch.load(path) if suffix == ".pt" else load_file(path)
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        if name.startswith("positional_embedding"):  # the table that both amount to
            tensor = torch.cat([state["positional_embedding"][:20], state["positional_embedding_res"][20:]])
        assert torch.equal(written[name], tensor), name


def test_refinement_is_the_files_own_unless_it_is_asked_for(tmp_path: Path) -> None:
    state = finelip_state()
    path = save_state(state, tmp_path / "finelip.pt")
    plain = load_clip(path, refine_image=False, refine_text=False)[0]
    assert plain.image_refinement is plain.text_refinement is None
    for flags in ({}, {"refine_image": True, "refine_text": True}):
        refinement: Any = load_clip(path, **flags)[0].image_refinement
        assert torch.equal(refinement.scale, state["cross_net.aggr_net.scale"].squeeze())
    without_net = {name: tensor for name, tensor in state.items() if not name.startswith("cross_net.")}
    assert load_clip(save_state(without_net, tmp_path / "long_clip.pt"))[0].text_refinement is None


def test_half_a_refinement_is_refused_in_a_sentence(tmp_path: Path, model: FineLIPModel) -> None:
    state = finelip_state()
    half = {name: t for name, t in state.items() if "cap_aggr_net" not in name}
    sentence = r"lacks cross_net.cap_aggr_net.scale, .* and 2 more\): give the whole checkpoint, or leave"
    assert_one_sentence(sentence, load_clip, save_state(half, tmp_path / "half.pt"))
    assert load_clip(tmp_path / "half.pt", refine_image=False, refine_text=False)[0].image_refinement is None
    more = state | {"cross_net.sparse_net.weight": torch.ones(2)}
    sentence = "does not have: cross_net.sparse_net.weight; leave the refinement out"
    assert_one_sentence(sentence, load_clip, save_state(more, tmp_path / "more.pt"))
    wide = state | {"cross_net.aggr_net.weight.0.bias": torch.ones(3)}
    assert_one_sentence("shapes do not fit together", load_clip, save_state(wide, tmp_path / "wide.pt"))
    one_side = load_clip(save_state(state, tmp_path / "whole.pt"), refine_text=False)[0]
    sentence = "both towers or none, but this model has image_refinement alone"
    assert_one_sentence(sentence, one_side.save_checkpoint, tmp_path / "out.pt")
    sentence = "implies quick_gelu and heads of width 64, but the text tower has quick_gelu and heads of width 16"
    assert_one_sentence(sentence, model.save_checkpoint, tmp_path / "out.pt")
    assert_one_sentence("must be a file that ends in .pt or", one_side.save_checkpoint, tmp_path / "out.bin")
    assert_one_sentence("would be overwritten", one_side.save_checkpoint, tmp_path / "whole.pt")


def test_the_bundled_clip() -> None:
    """Its text tower is that of the bundled Stable Diffusion: the files are shared."""
    model = FineLIPModel.from_clip(BUNDLED_MODEL / "clip")
    stock = CLIPModel.from_pretrained(BUNDLED_MODEL / "clip", dtype=torch.float32).state_dict()
    encoder = CLIPTextModel.from_pretrained(BUNDLED_MODEL, subfolder="text_encoder", dtype=torch.float32)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(stock[f"text_model.{name.removeprefix('text_model.')}"], tensor)
    for name, tensor in model.clip.state_dict().items():
        expected = stock[name]
        if f"clip.{name}" == POSITIONS:
            expected = stretch_positions(expected.half()).float()  # as precise as the file
        assert torch.equal(tensor, expected), name
    assert model.config.num_refined_tokens == 7  # of 36


# --- load_clip ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(model: FineLIPModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved")
    pad = TOKENIZER.convert_ids_to_tokens(0)
    own = CLIPTokenizer.from_pretrained(BUNDLED_MODEL, subfolder="tokenizer", model_max_length=248, pad_token=pad)
    own.save_pretrained(tmp_path / "saved")
    CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_load_clip_takes_a_clip(folder: Path) -> None:
    model, tokenizer, image_processor = load_clip(folder)
    assert model.clip.config.text_config.max_position_embeddings == tokenizer.model_max_length == 77
    assert dict(image_processor.crop_size) == {"height": 32, "width": 32}
    assert model.text_refinement is None and model.image_refinement is None  # none is drawn unasked
    model, tokenizer, _ = load_clip(folder, max_length=248, refine_image=True, refine_text=False)
    assert model.clip.config.text_config.max_position_embeddings == tokenizer.model_max_length == 248
    assert model.text_refinement is None and model.image_refinement is not None


def test_load_clip_takes_a_saved_model(saved: Path, model: FineLIPModel) -> None:
    for max_length in (None, 248):
        again, tokenizer, image_processor = load_clip(saved, max_length=max_length)
        assert_same(again, model)
        assert type(tokenizer) is CLIPTokenizer and (tokenizer.model_max_length, tokenizer.pad_token_id) == (248, 0)
        assert list(image_processor.image_mean) == [0.5] * 3


def test_load_clip_follows_the_recipe_about_refinement(saved: Path, model: FineLIPModel) -> None:
    plain, _, _ = load_clip(saved, refine_image=False, refine_text=False)
    assert plain.image_refinement is plain.text_refinement is None
    assert_same(plain.clip, model.clip)
    plain.save_pretrained(saved)
    torch.manual_seed(0)
    anew: Any = load_clip(saved, refine_image=True, refine_text=True)[0]
    assert anew.text_refinement.scale == 1 and torch.equal(anew.text_refinement.weigh[0].bias, torch.zeros(E))
    first = anew.text_refinement.weigh[1].weight
    assert 0 < first.abs().max() <= E**-0.5  # as nn.Linear draws it


def test_load_clip_reads_the_bundled_clip() -> None:
    model, tokenizer, image_processor = load_clip(BUNDLED_MODEL / "clip", max_length=248)
    assert len(tokenizer) == model.clip.config.text_config.vocab_size == len(TOKENIZER)
    assert tokenizer.model_max_length == 248 and list(image_processor.image_std) == [0.5] * 3


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of a repository `someone/clip` in an otherwise empty cache."""
    repository = tmp_path / "hub/models--someone--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository / "snapshots" / ("0" * 40)


def test_load_clip_takes_hub_ids(hub: Path, folder: Path, saved: Path, model: FineLIPModel) -> None:
    hub.symlink_to(folder)
    assert_same(load_clip("someone/clip", max_length=248, local_files_only=True)[0].clip, model.clip)
    hub.unlink()
    hub.symlink_to(saved)
    again, tokenizer, image_processor = load_clip("someone/clip", local_files_only=True)
    assert_same(again, model)
    assert tokenizer.pad_token_id == 0 and list(image_processor.image_mean) == [0.5] * 3


# --- errors ---------------------------------------------------------------------------------------------------------


def assert_one_sentence(sentence: str, function: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", [FineLIPModel.from_clip, load_clip])
def test_sources_without_an_image_tower_are_refused(
    function: Any, tmp_path: Path, stable_diffusion_folder: Path
) -> None:
    tiny_text_encoder(0).save_pretrained(tmp_path / "text")
    sentence = "holds a 'clip_text_model', which has no image tower: give a whole CLIP"
    assert_one_sentence(sentence, function, tmp_path / "text")
    assert_one_sentence(sentence, function, stable_diffusion_folder)
    assert_one_sentence("does not exist: give a folder", function, tmp_path / "absent.pt")
    state = tiny_open_clip().state_dict()
    text = {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}
    sentence = r"text\.pt holds no image tower that is a vision transformer"
    assert_one_sentence(sentence, function, save_state(text, tmp_path / "text.pt"))


def resnet() -> dict[str, Tensor]:
    text = {"context_length": 77, "vocab_size": VOCAB_SIZE, "width": 64, "heads": 1, "layers": 1}
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}
    return open_clip.model.CLIP(E, vision, text, quick_gelu=True).state_dict()


def without(*names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tiny_open_clip().state_dict().items() if not name.endswith(names)}


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (resnet, "no image tower that is a vision transformer .it lacks vision_model.embeddings.position"),
        (lambda: without("visual.proj"), "it lacks visual_projection.weight.: give a whole CLIP with a ViT"),
        (lambda: without("0.mlp.c_fc.weight"), "it lacks|lacks the text weights"),
        (lambda: without("visual.ln_pre.bias"), "lacks the weights vision_model.pre_layrnorm.bias: give a whole CLIP"),
        (lambda: without("logit_scale"), "lacks the weights logit_scale"),
        (
            lambda: without() | {"visual.transformer.resblocks.1.ls_1.gamma": torch.ones(64)},  # LayerScale
            "image weights that a CLIP does not have: visual.transformer.resblocks.1.ls_1.gamma",
        ),
        (
            lambda: without() | {"visual.ln_post.bias": torch.ones(3)},
            "weights of the wrong shape: vision_model.post_layernorm.bias",
        ),
        (lambda: tiny_open_clip(width=96, head_width=32).state_dict(), "96 wide, which attention heads of 64 do not"),
    ],
)
def test_image_towers_that_do_not_fit_are_one_sentence(state: Any, sentence: str, tmp_path: Path) -> None:
    assert_one_sentence(sentence, FineLIPModel.from_clip, save_state(state(), tmp_path / "clip.pt"))


def test_folders_whose_weights_do_not_fit(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.json"):
        (tmp_path / file.name).symlink_to(file)
    state = load_file(folder / "model.safetensors")
    extra = {name.replace("layers.1", "layers.2"): t.clone() for name, t in state.items() if name.startswith("vision")}
    save_file(state | extra, tmp_path / "model.safetensors")
    sentence = "image weights that a CLIP does not have: vision_model.encoder.layers.2"
    assert_one_sentence(sentence, FineLIPModel.from_clip, tmp_path)
    save_file(
        {name: t for name, t in state.items() if "visual_projection" not in name}, tmp_path / "model.safetensors"
    )
    assert_one_sentence("it lacks visual_projection.weight", load_clip, tmp_path)


def test_a_saved_model_of_another_length_is_refused(saved: Path) -> None:
    assert_one_sentence("reads 248 tokens, not max_length=77: leave max_length out", load_clip, saved, max_length=77)
    assert_one_sentence("holds a 'finelip'", FineLIPModel.from_clip, saved)
