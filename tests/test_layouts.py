"""Every public layout gives the encoder that it holds: the hidden states are those of the merged table."""

import json
import logging
from pathlib import Path

import pytest
import torch
from public_layouts import (
    AS_IS,
    LAYOUTS,
    REST,
    TOKENIZER,
    hugging_face,
    in_polar_form,
    long_clip,
    open_clip,
    prefixed,
    small_encoder,
)
from safetensors.torch import load_file, save_file
from tiny_models import WIDTH
from torch import Tensor
from torch.nn.functional import linear, normalize
from transformers import CLIPTextModelWithProjection

from finelip_diffusion import load_text_encoder
from finelip_diffusion.positions import is_only_stretched, stretch_positions
from finelip_diffusion.text_encoder import STRETCHED_FROM, save_checkpoint, save_text_encoder, text_embeddings
from finelip_diffusion.towers import text_weights


@pytest.fixture(scope="module")
def encoder() -> CLIPTextModelWithProjection:
    return small_encoder(3)


@torch.no_grad()
def states(encoder: torch.nn.Module) -> Tensor:
    """(layers + 2, T, D): every hidden state of 248 tokens, and the last one normed."""
    ids = torch.randint(len(TOKENIZER) - 2, (1, 248), generator=torch.Generator().manual_seed(1))
    found = encoder(ids, output_hidden_states=True)
    return torch.cat([*found.hidden_states, found.last_hidden_state])


def written(tensors: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_states_of_the_merged_table(encoder, tmp_path, name):
    """From a file, with and without its projection; alone what is in polar form is rounded on the way."""
    tensors = LAYOUTS[name](encoder)
    file = written(tensors, tmp_path / ("clip.pt" if "Long-CLIP" in name else "clip.safetensors"))
    loaded, tokenizer = load_text_encoder(file, projection=False, **AS_IS)
    assert loaded.config.max_position_embeddings == tokenizer.model_max_length == 248
    if "GmP" in name:  # a norm and a division in float32, of sums of 64 numbers
        torch.testing.assert_close(states(loaded), states(encoder), rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(states(loaded), states(encoder))
    if any("text_projection" in own for own in tensors):
        loaded, _ = load_text_encoder(file, projection=True, **AS_IS)
        assert torch.equal(loaded.text_projection.weight, encoder.text_projection.weight)


def test_nothing_else_is_taken_for_a_text_weight(encoder):
    """Each layout's other parts are set aside by name, and what no layout has is refused by name."""
    for name, make in LAYOUTS.items():
        tensors = make(encoder)
        weights = text_weights(tensors)
        expected = {own for own in tensors if own.startswith(("vis", "logit", "mask_net", "cross_net", "text_filip"))}
        if name == "FG-CLIP":
            expected.add("text_model.embeddings.position_embedding.weight")
        if ".text_model." in name or name == "XL's second":
            expected |= REST.keys()
        inside = {own for own in weights.set_aside if not own.endswith("logit_scale")}
        assert inside == {own for own in expected if not own.endswith("logit_scale")}, name
        assert set(weights.own) == set(weights.tensors), name
        assert set(weights.own.values()) <= {own.replace(".theta", ".weight") for own in tensors}, name
    for name in ("positional_embedding_ros", "mask_not.0.weight", "transformer.resblocks.0.mlp.c_fc.s"):
        with pytest.raises(ValueError, match=f"does not have: {name}"):
            text_weights({**long_clip(encoder), name: torch.ones(1)})


def test_polar_form_is_the_authors_forward(encoder):
    """zer0int's layer computes F.linear(x, r * F.normalize(theta, dim=1)); one matrix gives the same."""
    theirs = in_polar_form(long_clip(encoder))
    ours = text_weights(theirs).tensors
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    for layer in range(encoder.config.num_hidden_layers):
        block = f"transformer.resblocks.{layer}.mlp.c_fc"
        expected = linear(x, theirs[f"{block}.r"] * normalize(theirs[f"{block}.theta"], dim=1))
        assert torch.equal(linear(x, ours[f"encoder.layers.{layer}.mlp.fc1.weight"]), expected)
    half = {name: tensor.half() for name, tensor in theirs.items()}
    assert {tensor.dtype for tensor in text_weights(half).tensors.values()} == {torch.float16}
    del theirs["transformer.resblocks.1.mlp.c_fc.r"]
    with pytest.raises(ValueError, match=r"does not have: transformer\.resblocks\.1\.mlp\.c_fc\.theta"):
        text_weights(theirs)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "scaled", "mixed"])
def test_small_and_mixed_types_are_converted_and_said(encoder, tmp_path, caplog, kind):
    tensors = {name: tensor / 8 for name, tensor in hugging_face(encoder).items()}
    matrices = [name for name in tensors if "mlp" in name and name.endswith("weight")]
    dtype = torch.float16 if kind == "mixed" else getattr(torch, kind.replace("scaled", "float8_e4m3fn"))
    expected = dict(tensors)
    for name in tensors if kind.startswith("float8") else matrices:
        tensors[name] = tensors[name].to(dtype)
        expected[name] = tensors[name].float()
    if kind == "scaled":
        for name in matrices:
            tensors[name.replace("weight", "scale_weight")] = torch.tensor(0.5)
            expected[name] = expected[name] * 0.5
        tensors["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    with caplog.at_level(logging.INFO, "finelip_diffusion"):
        loaded, _ = load_text_encoder(written(tensors, tmp_path / "clip.safetensors"), **AS_IS)
    reference = small_encoder(4)
    names = {name: name.removeprefix("text_model.") for name in reference.state_dict()}
    reference.load_state_dict(
        {name: expected[own if "projection" in own else f"text_model.{own}"] for name, own in names.items()}
    )
    assert loaded.dtype == (torch.float16 if kind.startswith("float8") else torch.float32)
    assert torch.equal(states(loaded.float()), states(reference))
    sentence = {
        "float8_e4m3fn": "tensors of float8 became float16",
        "float8_e5m2": "tensors of float8 became float16",
        "scaled": f"{len(matrices)} scaled matrices of float8 were multiplied out",
        "mixed": "it mixes float16 and float32",
    }[kind]
    assert sentence in caplog.text


def test_folders_of_the_transformers_ports(encoder, tmp_path):
    """longclip-transformers' configurations, FG-CLIP's with 77 beside 248 rows, and a keep of their own."""
    text = {**encoder.config.to_dict(), "model_type": "longclip_text_model", "interpolation_keep_length": 20}
    whole = {"model_type": "longclip", "text_config": text, "vision_config": {}, "projection_dim": WIDTH}
    fg_clip = {"model_type": "clip", "text_config": {**encoder.config.to_dict(), "max_position_embeddings": 77}}
    for number, (name, config) in enumerate(
        [
            ("longclip-transformers", whole),
            ("longclip-transformers, text model", text),
            ("FG-CLIP", fg_clip),
            ("transformers", {**encoder.config.to_dict(), "max_position_embeddings": 77}),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        written(LAYOUTS[name](encoder), folder / "model.safetensors")
        loaded, tokenizer = load_text_encoder(folder, projection=False, tokenizer=TOKENIZER)
        assert loaded.config.max_position_embeddings == tokenizer.model_max_length == 248, name
        assert type(loaded.config).model_type == "clip_text_model" and torch.equal(states(loaded), states(encoder))
    folder = tmp_path / "0"
    (folder / "config.json").write_text(json.dumps({**whole, "text_config": {**text, "interpolation_keep_length": 8}}))
    table = text_embeddings(
        load_text_encoder(folder, projection=False, tokenizer=TOKENIZER)[0]
    ).position_embedding.weight
    assert not torch.equal(table[8:20], text_embeddings(encoder).position_embedding.weight[8:20])


# --- the trap: a table that was never trained -----------------------------------------------------------------------


def test_a_frozen_table_is_said_to_be_one(encoder, tmp_path, caplog):
    """A conversion that copies `positional_embedding` alone; a stretched encoder of our own says itself what it is."""
    short = small_encoder(5, positions=77)
    frozen = stretch_positions(text_embeddings(short).position_embedding.weight)
    tensors = hugging_face(encoder)
    for dtype in (torch.float32, torch.float16):
        caplog.clear()
        tensors["text_model.embeddings.position_embedding.weight"] = frozen.to(dtype)
        load_text_encoder(written(tensors, tmp_path / "frozen.safetensors"), **AS_IS)
        (record,) = caplog.records
        assert record.levelname == "WARNING" and "after row 20 were never trained" in record.getMessage()
        assert "convert the file with both (longclip-L.pt, which has positional_embedding_res)" in record.getMessage()

    caplog.clear()
    load_text_encoder(written(LAYOUTS["Long-CLIP"](encoder), tmp_path / "both.pt"), **AS_IS)
    both = open_clip(encoder)
    both |= {"positional_embedding": frozen, "positional_embedding_res": frozen}
    assert not caplog.records
    load_text_encoder(written(both, tmp_path / "untrained.pt"), **AS_IS)
    assert "neither of its two position tables is trained after row 20" in caplog.text

    caplog.clear()
    file = written(prefixed("", hugging_face(short)), tmp_path / "short.safetensors")
    ours, tokenizer = load_text_encoder(file, **AS_IS | {"max_length": 248})
    assert getattr(ours.config, STRETCHED_FROM) == 77 and not caplog.records
    home = save_text_encoder(ours, tokenizer, tmp_path / "ours")
    bare = save_checkpoint(ours, tokenizer, tmp_path / "ours.safetensors", layout="comfyui")
    caplog.clear()
    with caplog.at_level(logging.INFO, "finelip_diffusion"):
        for source in (home, bare):
            again, _ = load_text_encoder(source, tokenizer=TOKENIZER)
            assert getattr(again.config, STRETCHED_FROM) == 77
    said = [record for record in caplog.records if "positions" in record.getMessage()]
    assert [record.levelname for record in said] == ["INFO", "INFO"]
    assert all("were stretched from 77 rows, and are not trained after row 20" in r.getMessage() for r in said)


def test_what_a_stretched_table_is():
    """Exactly stretched in any type, however it was saved; one step of training at 1e-6 is seen in float32."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(77, WIDTH, generator=generator) * 0.01
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        by_hand = old.to(dtype)  # as Long-CLIP's code has it, in the type of the weights
        rows = [*by_hand[:20]]
        for i in range(20, 76):
            rows += [(4 - j) * by_hand[i] / 4 + j * by_hand[i + 1] / 4 for j in range(4)]
        rows += [by_hand[76] + j * (by_hand[76] - by_hand[75]) / 4 for j in range(4)]
        table = torch.stack(rows)
        assert is_only_stretched(table) and is_only_stretched(table.float())
        assert is_only_stretched(stretch_positions(by_hand)) and not is_only_stretched(by_hand)
    trained = stretch_positions(old)
    trained[100] += 1e-6
    assert not is_only_stretched(trained)
    assert not is_only_stretched(torch.randn(248, WIDTH, generator=generator))
    assert is_only_stretched(stretch_positions(old, ratio=6)) and is_only_stretched(stretch_positions(old, 30), 30)


def test_the_files_of_other_programs_come_back(encoder, tmp_path):
    """ComfyUI's and kohya's files have the names that those look for, and come back bit for bit."""
    for layout in ("comfyui", "kohya"):
        path = save_checkpoint(encoder, TOKENIZER, tmp_path / f"{layout}.safetensors", layout=layout)
        assert load_file(path).keys() == hugging_face(encoder).keys()
        loaded, _ = load_text_encoder(path, projection=True, tokenizer=TOKENIZER)
        assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in encoder.state_dict().items())
