"""From any source to a stock encoder: parity with the methods' own forward passes, saving, padding, errors."""

import json
import logging
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
from long_weights import END, LONG, SHORT, START, encode, random_state, saved, two_table_forward
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from finelip_diffusion.positions import stretch_positions
from finelip_diffusion.text_encoder import (
    final_layer_norm,
    load_text_encoder,
    save_text_encoder,
    text_embeddings,
)
from finelip_diffusion.tokenizer import clip_tokenizer

# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """ViT-L/14's text tower: width 768, 12 layers, 12 heads, two tables of 248 rows; its file and literal states."""
    state = random_state(width=768, layers=12, projection=768)
    path = saved(state, tmp_path_factory.mktemp("full"))
    input_ids = clip_tokenizer(248)(
        [SHORT, LONG], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    assert (input_ids[1] != END).sum() > 200
    with torch.inference_mode():
        return SimpleNamespace(
            state=state, path=path, input_ids=input_ids, literal=two_table_forward(state, input_ids)
        )


def test_full_size_equals_the_two_table_forward(full_size):
    """In fp32 to 1e-5: states are of order 1, and twelve layers of differently ordered sums lose a few last bits."""
    model, _ = load_text_encoder(full_size.path, projection=True)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    with torch.inference_mode():
        output = model(full_size.input_ids)
    states, pooled = full_size.literal
    torch.testing.assert_close(output.last_hidden_state, states, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.text_embeds, pooled, rtol=0, atol=1e-5)


def root_mean_square(x):
    return x.float().square().mean().sqrt().item()


def test_full_size_in_bfloat16(full_size):
    """bf16 keeps 8 bits: both passes stray from the fp32 states by twelve layers of rounding, ours by no more.

    The bound: the root mean square error is at most that of the literal pass in bf16, a tenth added for the order of
    sums, and under 2^-6, two spacings of bf16 numbers in [1, 2), where the states' root mean square lies.
    """
    model, _ = load_text_encoder(full_size.path, dtype=torch.bfloat16)
    half = {name: tensor.bfloat16() for name, tensor in full_size.state.items()}
    with torch.inference_mode():
        ours = model(full_size.input_ids).last_hidden_state
        theirs, _ = two_table_forward(half, full_size.input_ids)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    error, literal_error = (
        root_mean_square(ours - full_size.literal[0]),
        root_mean_square(theirs - full_size.literal[0]),
    )
    assert error < min(1.1 * literal_error, 2**-6)


@pytest.mark.parametrize(("dtype", "spacing"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_small_size_in_half_precision(tmp_path, dtype, spacing):
    """As above, over two layers: about one spacing of the dtype's numbers in [1, 2); torch 2.6 rounds more often."""
    state = random_state(dtype=dtype)
    model, tokenizer = load_text_encoder(saved(state, tmp_path), projection=True, pad_token="!")
    assert model.dtype == dtype and tokenizer.pad_token_id == 0
    input_ids = tokenizer([SHORT, LONG], padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.inference_mode():
        exact = two_table_forward({name: tensor.float() for name, tensor in state.items()}, input_ids)
        literal = two_table_forward(state, input_ids)
        output = model(input_ids)
    for ours, theirs, expected in zip((output.last_hidden_state, output.text_embeds), literal, exact, strict=True):
        error, literal_error = root_mean_square(ours - expected), root_mean_square(theirs - expected)
        assert error < 1.25 * min(literal_error, spacing)


@pytest.mark.parametrize("prompts", [(SHORT,), (LONG,), ("",), ("😀 日本語 " * 9, LONG)])
def test_positions_up_to_20_are_bit_identical_to_the_stock_encoder(stock, tokenizer, prompts):
    """For any prompt, in every layer: attention is causal and the first 21 rows are the old ones."""
    before = encode(CLIPTextModel.from_pretrained(stock, subfolder="text_encoder"), tokenizer, *prompts)
    model, long_tokenizer = load_text_encoder(stock)
    window = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.inference_mode():
        after = model(window, output_hidden_states=True)
    for old, new in zip(before.hidden_states, after.hidden_states, strict=True):
        assert torch.equal(new[:, :21], old[:, :21])
    assert torch.equal(after.last_hidden_state[:, :21], before.last_hidden_state[:, :21])
    assert not torch.equal(after.last_hidden_state[:, 21:], before.last_hidden_state[:, 21:])
    # In a 248-token window other kernels sum in another order: equal to the last bits only.
    longer = encode(model, long_tokenizer, *prompts).last_hidden_state
    torch.testing.assert_close(longer[:, :21], before.last_hidden_state[:, :21], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("width", "custom"), [(1024, True), (1280, False)])  # ViT-H, bigG, at two layers
def test_open_clip_towers_equal_open_clips_own_forward(tmp_path, width, custom):
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": width // 64, "layers": 2}
    torch.manual_seed(0)
    kind = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    theirs = kind(embed_dim=width, vision_cfg=vision, text_cfg=text).eval()
    path = saved(theirs.state_dict(), tmp_path, "open_clip.bin")
    model, tokenizer = load_text_encoder(path, max_length=None, projection=True, hidden_act="gelu")
    assert isinstance(model, CLIPTextModelWithProjection)
    config = model.config
    assert (config.hidden_act, config.num_attention_heads, config.projection_dim) == ("gelu", width // 64, width)
    input_ids = tokenizer([SHORT, LONG], padding="max_length", truncation=True, return_tensors="pt").input_ids
    tower = theirs.text if custom else theirs
    with torch.inference_mode():
        output = model(input_ids, output_hidden_states=True)
        pooled = theirs.encode_text(input_ids)
        x = tower.token_embedding(input_ids) + tower.positional_embedding
        for block in tower.transformer.resblocks[:-1]:
            x = block(x, attn_mask=tower.attn_mask)
        last = tower.ln_final(tower.transformer.resblocks[-1](x, attn_mask=tower.attn_mask))
    for ours, expected in [
        (output.hidden_states[-2], x),
        (output.last_hidden_state, last),
        (output.text_embeds, pooled),
    ]:
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)  # fp32, as above
    stretched, _ = load_text_encoder(path, hidden_act="gelu")
    expected_table = stretch_positions(tower.positional_embedding)
    assert torch.equal(text_embeddings(stretched).position_embedding.weight, expected_table)


# --- sources --------------------------------------------------------------------------------------------------------


def test_a_stock_pipeline_folder_is_stretched(stock):
    model, tokenizer = load_text_encoder(stock)
    assert type(model) is CLIPTextModel and type(tokenizer) is CLIPTokenizer and not model.training
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 248
    old = load_file(stock / "text_encoder/model.safetensors")
    table = next(tensor for name, tensor in old.items() if name.endswith("position_embedding.weight"))
    assert torch.equal(text_embeddings(model).position_embedding.weight, stretch_positions(table))
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (START, END, END)
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    assert isinstance(final_layer_norm(model), torch.nn.LayerNorm)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, 248),
        ({"max_length": 305}, 305),
        ({"max_length": 476, "ratio": 8}, 476),
        ({"max_length": 134, "keep": 58}, 134),
        ({"max_length": 77}, 77),
        ({"max_length": None}, 77),
    ],
)
def test_lengths(stock, options, rows):
    model, tokenizer = load_text_encoder(stock, **options)
    assert encode(model, tokenizer, SHORT, LONG).last_hidden_state.shape == (2, rows, 64)


def test_pooling_is_the_stock_encoders(stock, tokenizer):
    """The published configs say eos 2, and transformers then takes the highest id: the end of text, all the same."""
    before = encode(CLIPTextModel.from_pretrained(stock, subfolder="text_encoder"), tokenizer, SHORT, LONG)
    model, _ = load_text_encoder(stock, max_length=None)
    assert torch.equal(encode(model, tokenizer, SHORT, LONG).pooler_output, before.pooler_output)


def test_every_place_of_the_same_encoder_gives_the_same_encoder(stock, tokenizer):
    reference, _ = load_text_encoder(stock)
    bare = stock / "text_encoder/model.safetensors"
    places: list[tuple[Any, dict[str, Any]]] = [
        (stock / "text_encoder", {}),
        (str(stock), {"subfolder": "text_encoder"}),
        (bare, {"num_attention_heads": 4, "hidden_act": "quick_gelu"}),
        (stock, {"tokenizer": tokenizer}),
    ]
    for source, options in places:
        model, found = load_text_encoder(source, **options)
        assert found.model_max_length == 248 and tokenizer.model_max_length == 77
        states = encode(reference, found, SHORT, LONG).last_hidden_state
        assert torch.equal(encode(model, found, SHORT, LONG).last_hidden_state, states)


def test_a_whole_clip_gives_its_text_part(tmp_path, tokenizer, caplog):
    part = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=part, vision_config={**part, "image_size": 32}, projection_dim=48)).eval()
    clip.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "finelip_diffusion"):
        model, _ = load_text_encoder(tmp_path, max_length=None)
    assert type(model) is CLIPTextModel
    assert "visual_projection.weight" in caplog.text and "logit_scale" in caplog.text
    model, _ = load_text_encoder(tmp_path, max_length=None, projection=True)
    inputs = tokenizer([SHORT], padding="max_length", return_tensors="pt")
    with torch.inference_mode():
        features = clip.get_text_features(inputs.input_ids)
        features = getattr(features, "pooler_output", features)  # a tensor in transformers 4
        assert torch.equal(model(inputs.input_ids).text_embeds, features)


def test_sdxls_second_encoder_keeps_its_projection_and_its_tokenizer(tmp_path, stock):
    second = CLIPTextConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1)
    CLIPTextModelWithProjection(second).save_pretrained(tmp_path / "text_encoder_2")
    clip_tokenizer(77, "!").save_pretrained(tmp_path / "tokenizer_2")
    clip_tokenizer(77).save_pretrained(tmp_path / "tokenizer")
    model, tokenizer = load_text_encoder(tmp_path, subfolder="text_encoder_2")
    assert type(model) is CLIPTextModelWithProjection and tokenizer.pad_token == "!" and model.config.pad_token_id == 0
    save_text_encoder(model, tokenizer, tmp_path / "out", subfolder="text_encoder_2")
    again, _ = load_text_encoder(tmp_path / "out", subfolder="text_encoder_2")
    assert torch.equal(encode(again, tokenizer, LONG).text_embeds, encode(model, tokenizer, LONG).text_embeds)


def test_a_long_clip_stays_as_it_is_even_if_its_config_says_77(stock, tmp_path):
    model, tokenizer = load_text_encoder(stock)
    save_text_encoder(model, tokenizer, tmp_path)
    config = tmp_path / "text_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 77}))
    again, _ = load_text_encoder(tmp_path)
    assert again.config.max_position_embeddings == 248
    old, new = (text_embeddings(each).position_embedding.weight for each in (model, again))
    assert torch.equal(old, new)


def test_a_finelip_file_reports_what_it_sets_aside_and_knows_its_activation(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "finelip_diffusion"):
        load_text_encoder(saved(random_state(), tmp_path))
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    for name in ("visual.proj", "cross_net.visual.weight", "logit_scale", "text_projection.weight"):
        assert name in record.message


def test_a_file_that_does_not_say_its_activation_is_warned_about(tmp_path, caplog):
    path = saved(random_state(rows=77, two_tables=False), tmp_path)
    model, _ = load_text_encoder(path)
    assert model.config.hidden_act == "quick_gelu" and "quick_gelu is assumed" in caplog.text
    caplog.clear()
    model, _ = load_text_encoder(path, hidden_act="gelu")
    assert model.config.hidden_act == "gelu" and "assumed" not in caplog.text


def test_shards_are_read(stock, tmp_path):
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder/config.json").write_bytes((stock / "text_encoder/config.json").read_bytes())
    tensors = load_file(stock / "text_encoder/model.safetensors")
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        save_file(part, tmp_path / "text_encoder" / shard)
    index = tmp_path / "text_encoder/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    model, tokenizer = load_text_encoder(tmp_path)
    expected = encode(load_text_encoder(stock)[0], tokenizer, LONG).last_hidden_state
    assert torch.equal(encode(model, tokenizer, LONG).last_hidden_state, expected)


def test_a_hub_id_is_found_in_the_cache(stock, tmp_path, monkeypatch):
    commit = "0" * 40
    repository = tmp_path / "models--someone--stable"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    for folder in ("text_encoder", "tokenizer"):
        (snapshot / folder).symlink_to(stock / folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model, tokenizer = load_text_encoder("someone/stable", local_files_only=True)
    expected = encode(load_text_encoder(stock)[0], tokenizer, LONG).last_hidden_state
    assert torch.equal(encode(model, tokenizer, LONG).last_hidden_state, expected)
