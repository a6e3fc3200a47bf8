"""What a tiny CLIP of random weights is made of, and a batch for it."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import WIDTH
from torch import Tensor, nn
from transformers import CLIPTokenizer

from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.tokenizer import VOCAB_SIZE

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


def draw_batch(dtype: torch.dtype = torch.float32, end: int = END) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, end - 1, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids[:, 0] = end - 1
    for row, length in enumerate(LENGTHS):
        ids[row, length - 1 :] = end
    images = torch.randn(len(LENGTHS), 3, 32, 32, generator=generator)
    return {"pixel_values": images.to(dtype), "input_ids": ids, "attention_mask": mask}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def assert_one_sentence(sentence: str, function: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)


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
