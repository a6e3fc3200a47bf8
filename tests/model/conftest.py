"""A tiny CLIP, as `transformers` saves one, and FineLIP's model of it."""

import copy
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from tiny_clip import END, TOKENIZER, TOWER, E, draw_batch, randomize
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.model import FineLIPModel


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


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return draw_batch()


@pytest.fixture
def saved(model: FineLIPModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved")
    pad = TOKENIZER.convert_ids_to_tokens(0)
    own = CLIPTokenizer.from_pretrained(BUNDLED_MODEL, subfolder="tokenizer", model_max_length=248, pad_token=pad)
    own.save_pretrained(tmp_path / "saved")
    CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of a repository `someone/clip` in an otherwise empty cache."""
    repository = tmp_path / "hub/models--someone--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository / "snapshots" / ("0" * 40)
