"""Rotary positions against a literal rotation and transformers' helpers; trained, saved, plugged in, lengthened."""

import math
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import scripts
import torch
from diffusers import DiffusionPipeline
from tiny_models import as_published, make_stable_diffusion, pixels, tiny_text_encoder
from torch import Tensor
from transformers import CLIPTextConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

from finelip_diffusion import FineLIPStableDiffusionPipeline, load_text_encoder
from finelip_diffusion.lengthening import is_stock, nobody_trained
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.model import FineLIPModel, load_clip
from finelip_diffusion.publishing import model_card
from finelip_diffusion.rotary import (
    NTK_FACTOR,
    THETA,
    RotaryTextConfig,
    RotaryTextModel,
    angles,
    mark_trained,
    scaled_theta,
    turn,
)
from finelip_diffusion.text_encoder import save_checkpoint, save_text_encoder
from finelip_diffusion.tokenizer import clip_tokenizer

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
WIDTH = 8


def rotary_config(**changes: object) -> RotaryTextConfig:
    stock = tiny_text_encoder(0).config.to_dict()
    rotary = {"theta": THETA, "trained_length": 77}
    settings = {name: value for name, value in stock.items() if name != "model_type"}
    return RotaryTextConfig(**settings | {"max_position_embeddings": 248, "rotary": rotary} | changes)


@pytest.fixture(scope="module")
def encoder() -> RotaryTextModel:
    torch.manual_seed(0)
    return RotaryTextModel(rotary_config()).eval()


@pytest.fixture(scope="module")
def folder(encoder: RotaryTextModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_encoder(encoder, clip_tokenizer(248), tmp_path_factory.mktemp("rotary"))


@pytest.fixture(scope="module")
def ids(encoder: RotaryTextModel) -> Tensor:
    ids = torch.randint(5, 1000, (2, 100), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = encoder.config.eos_token_id
    return ids


def turned_literally(states: Tensor, theta: float) -> Tensor:
    """(T, D): each pair of neighboring channels as a complex number, times exp(i * position * theta ** (-2 j / D))."""
    result = torch.empty_like(states)
    length, width = states.shape
    for position in range(length):
        for pair in range(width // 2):
            angle = position * theta ** (-2 * pair / width)
            number = complex(states[position, 2 * pair], states[position, 2 * pair + 1])
            number *= complex(math.cos(angle), math.sin(angle))
            result[position, 2 * pair], result[position, 2 * pair + 1] = number.real, number.imag
    return result


def test_a_layer_attends_as_the_paper_says(encoder: RotaryTextModel) -> None:
    attention = encoder.encoder.layers[0].self_attn
    theta = THETA * (NTK_FACTOR * 248 / 77 - (NTK_FACTOR - 1)) ** (16 / 14)  # heads are 16 wide
    states = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(2))
    mask = torch.full((9, 9), -math.inf).triu(1)
    with torch.no_grad():
        ours = attention(states, mask[None, None])[0][0]
        q, k, v = (layer(states)[0] for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
        heads = []
        for head in range(2):
            channels = slice(16 * head, 16 * head + 16)
            queries, keys = (turned_literally(part[:, channels].double(), theta) for part in (q, k))
            weights = (queries @ keys.T / 4 + mask).softmax(-1)
            heads.append(weights @ v[:, channels].double())
        expected = attention.out_proj(torch.cat(heads, -1).float())
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)  # float32 against float64


def test_turning_is_that_of_transformers() -> None:
    states = torch.randn(3, 2, 11, WIDTH)
    cosines, sines = angles(11, WIDTH, THETA, CPU)
    theirs = apply_rotary_pos_emb(states.transpose(1, 2), sines[None], cosines[None]).transpose(1, 2)
    torch.testing.assert_close(turn(states, cosines, sines), theirs)


@pytest.mark.parametrize("length", [50, 77, 248, 500])
def test_ntk_scaling_is_that_of_transformers(length: int) -> None:
    config = LlamaConfig(hidden_size=2 * WIDTH, num_attention_heads=2, max_position_embeddings=77)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": THETA, "factor": NTK_FACTOR}
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, CPU, seq_len=length)
    cosines, sines = angles(length, WIDTH, scaled_theta(THETA, 77, length, WIDTH), CPU)
    turns = torch.outer(torch.arange(length).double(), frequencies.double())
    # Their frequencies are rounded to float32, which 500 positions multiply.
    torch.testing.assert_close(cosines, turns.cos().float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(sines, turns.sin().float(), rtol=0, atol=1e-4)


def test_products_depend_on_distances_alone() -> None:
    query, key = torch.randn(2, WIDTH, dtype=torch.float64)
    cosines, sines = angles(60, WIDTH, THETA, CPU)
    queries, keys = (turn(states.expand(60, -1), cosines, sines) for states in (query, key))
    products = queries @ keys.T
    for distance in (-7, 0, 3):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-6)  # float32 angles


def test_there_is_no_table_and_order_counts(encoder: RotaryTextModel, ids: Tensor) -> None:
    assert not [name for name in encoder.state_dict() if "position" in name]
    swapped = ids.clone()
    swapped[:, [3, 4]] = ids[:, [4, 3]]
    with torch.no_grad():
        states, others = (encoder(each).last_hidden_state for each in (ids, swapped))
    assert (states[:, 10:] - others[:, 10:]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="249 tokens are more than the window of 248"):
        encoder(torch.zeros(1, 249, dtype=torch.long))


def test_it_is_saved_and_read_back(encoder: RotaryTextModel, folder: Path, ids: Tensor) -> None:
    again, tokenizer = load_text_encoder(folder)
    assert tokenizer.model_max_length == again.config.max_position_embeddings == 248
    with torch.no_grad():
        expected = encoder(ids).last_hidden_state
        assert torch.equal(again(ids).last_hidden_state, expected)
        assert torch.equal(RotaryTextModel.from_pretrained(folder / "text_encoder")(ids).last_hidden_state, expected)
    assert not is_stock(again) and not nobody_trained(again, tiny_text_encoder(0))


def test_a_longer_window_is_scaled_from_the_trained_one(folder: Path, ids: Tensor) -> None:
    longer, tokenizer = load_text_encoder(folder, max_length=500)
    assert tokenizer.model_max_length == longer.config.max_position_embeddings == 500
    expected = RotaryTextModel(rotary_config(max_position_embeddings=500)).eval()
    expected.load_state_dict(longer.state_dict())
    with torch.no_grad():
        states = longer(ids.repeat(1, 5)).last_hidden_state
        assert torch.equal(states, expected(ids.repeat(1, 5)).last_hidden_state)
    assert load_text_encoder(folder, max_length=100)[0].config.max_position_embeddings == 248  # never shorter


def test_what_was_trained_keeps_its_angles(encoder: RotaryTextModel, ids: Tensor) -> None:
    with torch.no_grad():
        before = encoder(ids).last_hidden_state
        config = rotary_config()
        mark_trained(config)
        assert config.rotary["trained_length"] == 248
        trained = RotaryTextModel(config).eval()
        trained.load_state_dict(encoder.state_dict())
        assert torch.equal(trained(ids).last_hidden_state, before)
    stock = CLIPTextConfig()
    mark_trained(stock)
    assert not hasattr(stock, "rotary")


@pytest.fixture(scope="module")
def drawn(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A saved pipeline with a rotary encoder, and what it drew."""
    home = tmp_path_factory.mktemp("pipeline")
    make_stable_diffusion().save_pretrained(home / "base")
    as_published(home)
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(home / "base", finelip=folder)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.text_encoder, RotaryTextModel)
    assert "246" in str(pipe.describe_prompt("a cat " * 150))
    pipe.save_pretrained(home / "saved")
    return home / "saved", pixels(pipe, "a red cat " * 60)


def test_it_draws_and_so_does_what_was_saved(drawn: tuple[Path, Tensor]) -> None:
    pipe = FineLIPStableDiffusionPipeline.from_pretrained(drawn[0])
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(pixels(pipe, "a red cat " * 60), drawn[1])
    assert isinstance(DiffusionPipeline.from_pretrained(drawn[0]).text_encoder, RotaryTextModel)
    assert "loads it after `import finelip_diffusion.rotary`." in str(model_card(drawn[0], "me/rotary"))


def test_without_this_package_diffusers_says_what_to_import(
    drawn: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "finelip_diffusion.rotary")
    monkeypatch.setitem(sys.modules, "finelip_diffusion", None)
    with pytest.raises((ValueError, ImportError), match="finelip_diffusion.rotary"):
        DiffusionPipeline.from_pretrained(drawn[0])


def test_what_cannot_hold_it_says_so(encoder: RotaryTextModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a position table, but these positions are rotary: save a folder"):
        save_checkpoint(encoder, clip_tokenizer(248), tmp_path / "a.safetensors", layout="comfyui")
    with pytest.raises(ValueError, match="takes the place of a CLIPTextModel, not that of SDXL's second encoder"):
        load_text_encoder(folder, projection=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, two updates each, as a user runs them."""
    home = tmp_path_factory.mktemp("stages")
    shared = {
        "num_scenes": 32, "train_batch_size": 8, "max_train_steps": 2, "lr_warmup_steps": 1, "report_to": "none",
        "num_validation_examples": 8,
    }  # fmt: skip
    for flags in (
        {"recipe": "rotary_distill"},
        {"recipe": "rotary", "pretrained_model_name_or_path": home / "rotary_distill" / "finelip_model"},
    ):
        flags = shared | {"output_dir": home / str(flags["recipe"])} | flags
        done = scripts.run(
            ROOT / "train" / "finetune_encoder.py", *(f"--{key}={value}" for key, value in flags.items())
        )
        assert done.returncode == 0, done.stderr[-2000:]
    return home


def test_both_stages_train_and_the_second_goes_on_from_the_first(trained: Path) -> None:
    first, second = (load_text_encoder(trained / stage, max_length=None)[0] for stage in ("rotary_distill", "rotary"))
    assert first.config.rotary == {"theta": THETA, "trained_length": 77}
    assert (first.config.max_position_embeddings, second.config.max_position_embeddings) == (77, 248)
    width = first.config.hidden_size // first.config.num_attention_heads
    assert second.config.rotary == {"theta": scaled_theta(THETA, 77, 248, width), "trained_length": 248}
    stock = load_clip(BUNDLED_MODEL / "clip")[0].text_encoder().state_dict()
    tables = [
        stock["embeddings.token_embedding.weight"],
        *(each.embeddings.token_embedding.weight for each in (first, second)),
    ]
    moved = [(after - before).abs().max() for before, after in pairwise(tables)]
    assert 0 < moved[1] < moved[0] < 0.1  # the second began where the first ended, at a lower rate


def test_a_trained_model_reads_longer_captions(trained: Path) -> None:
    model, tokenizer, _ = load_clip(trained / "rotary" / "finelip_model", max_length=500)
    captions = tokenizer("a red circle. " * 120, return_tensors="pt", truncation=True).input_ids
    assert 248 < captions.shape[1] <= 500
    embeds, tokens, _ = model.encode_text(captions)
    encoder, _ = load_text_encoder(trained / "rotary", max_length=500)
    states = encoder(captions).last_hidden_state
    torch.testing.assert_close(model.clip.text_projection(states), tokens, rtol=1e-4, atol=1e-4)  # other kernels
    assert embeds.isfinite().all()


def test_a_trained_table_is_not_taken_out(tmp_path: Path) -> None:
    model = FineLIPModel.from_clip(BUNDLED_MODEL / "clip", refine_image=False, refine_text=False)
    model.save_pretrained(tmp_path)
    load_clip(BUNDLED_MODEL / "clip")[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a trained position table: rotary positions start from a CLIP"):
        load_clip(tmp_path, position="rotary")


def test_texts_beyond_the_window_are_measured_in_one_window_and_in_several(trained: Path) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "text_length.py"))
    args = script["Arguments"](model=str(trained / "rotary" / "finelip_model"), tokens=[260], texts=2)
    rows = script["measure"](args, 260)
    assert [row[0] for row in rows] == [
        f"260 tokens, {script[name]}" for name in ("FIRST", "WINDOWS", "ONE", "ANGLES")
    ]
    ids, tokenizer = list(range(320, 320 + 258)), load_clip(args.model)[1]
    changed = [*ids[:-1], 5]
    with torch.no_grad():
        told = {}
        for reading, model, length in script["readings"](args, 260):
            one, other = (script["read_as"](reading, model, each, tokenizer, length) for each in (ids, changed))
            told[reading] = one
            assert torch.equal(one, other) == (reading == script["FIRST"])  # which ends before the change
    assert not torch.allclose(told[script["ONE"]], told[script["ANGLES"]])
