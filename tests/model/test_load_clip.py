"""`load_clip`: whatever is a CLIP with its tokenizer and image processor, and what is refused."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import TOKENIZER, E, assert_one_sentence, assert_same, save_state, tiny_open_clip
from tiny_models import tiny_text_encoder
from torch import Tensor
from transformers import CLIPTokenizer

from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.model import FineLIPModel, load_clip
from finelip_diffusion.tokenizer import VOCAB_SIZE


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


def test_load_clip_takes_hub_ids(hub: Path, folder: Path, saved: Path, model: FineLIPModel) -> None:
    hub.symlink_to(folder)
    assert_same(load_clip("someone/clip", max_length=248, local_files_only=True)[0].clip, model.clip)
    hub.unlink()
    hub.symlink_to(saved)
    again, tokenizer, image_processor = load_clip("someone/clip", local_files_only=True)
    assert_same(again, model)
    assert tokenizer.pad_token_id == 0 and list(image_processor.image_mean) == [0.5] * 3


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
