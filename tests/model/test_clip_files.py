"""FineLIP's model from the files of others: OpenAI's layout, open_clip's towers, FineLIP's own training."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_clip import (
    LENGTHS,
    POSITIONS,
    REFINED,
    E,
    assert_one_sentence,
    assert_same,
    draw_batch,
    save_state,
    tiny_open_clip,
)
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel

from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.model import FineLIPModel, load_clip
from finelip_diffusion.positions import stretch_positions
from finelip_diffusion.tokenizer import VOCAB_SIZE
from finelip_diffusion.towers import image_tower


def test_a_folder_of_transformers(folder: Path, _model: FineLIPModel) -> None:
    stock = CLIPModel.from_pretrained(folder).state_dict()
    for name, tensor in _model.clip.state_dict().items():
        expected = stretch_positions(stock[name]) if f"clip.{name}" == POSITIONS else stock[name]
        assert torch.equal(tensor, expected), name
    assert _model.clip.config.vision_config.num_attention_heads == 2  # which no shape says
    assert not _model.training and _model.dtype == torch.float32


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
    assert model.config.num_refined_tokens == 16  # of 81
