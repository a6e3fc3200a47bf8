"""From any source to a stock encoder: parity with the methods' own forward passes, saving, padding, errors."""

import json
import logging
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
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
    check_width,
    final_layer_norm,
    load_text_encoder,
    save_checkpoint,
    save_text_encoder,
    text_embeddings,
)
from finelip_diffusion.tokenizer import clip_tokenizer

SHORT = "a red fox"
LONG = " ".join(f"in cell {n} a small blue square, then a green ring;" for n in range(30))
START, END = 49406, 49407


def random_state(width=64, layers=2, rows=248, two_tables=True, projection=32, dtype=torch.float32):
    """Weights under OpenAI's names, of the sizes of OpenAI's initialization, biases included."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, std):
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    attention, output, mlp = width**-0.5, width**-0.5 * (2 * layers) ** -0.5, (2 * width) ** -0.5
    state = {
        "token_embedding.weight": random(49408, width, std=0.02),
        "positional_embedding": random(rows, width, std=0.01),
        "ln_final.weight": 1 + random(width, std=0.1),
        "ln_final.bias": random(width, std=0.1),
        "text_projection": random(width, projection, std=attention),
        "logit_scale": torch.tensor(4.6),
        "visual.proj": torch.zeros(2, 2),
    }
    if two_tables:
        state["positional_embedding_res"] = random(rows, width, std=0.01)
        state["cross_net.visual.weight"] = torch.zeros(2, 2)
    for n in range(layers):
        block = f"transformer.resblocks.{n}."
        for name, (rows_, columns, std) in {
            "attn.in_proj_": (3 * width, width, attention),
            "attn.out_proj.": (width, width, output),
            "mlp.c_fc.": (4 * width, width, mlp),
            "mlp.c_proj.": (width, 4 * width, output),
        }.items():
            state[f"{block}{name}weight"] = random(rows_, columns, std=std)
            state[f"{block}{name}bias"] = random(rows_, std=0.02)
        for name in ("ln_1", "ln_2"):
            state[f"{block}{name}.weight"] = 1 + random(width, std=0.1)
            state[f"{block}{name}.bias"] = random(width, std=0.1)
    return state


def norm(x, state, name):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def two_table_forward(state, input_ids, keep=20):
    """The long text tower as its authors describe it: two masked tables, then CLIP's pre-norm transformer.

    Returns the states after `ln_final`, and the pooled embedding: the state at the end-of-text token, projected.
    """
    steps, width = input_ids.shape[1], state["ln_final.weight"].shape[0]
    heads = width // 64
    first = (torch.arange(len(state["positional_embedding"])) < keep).to(state["positional_embedding"].dtype)[:, None]
    x = state["token_embedding.weight"][input_ids]
    x = x + (first * state["positional_embedding"])[:steps] + ((1 - first) * state["positional_embedding_res"])[:steps]
    future = torch.full((steps, steps), float("-inf"), dtype=x.dtype).triu(1)
    for n in range(sum(name.endswith("in_proj_weight") for name in state)):
        block = f"transformer.resblocks.{n}"
        qkv = norm(x, state, f"{block}.ln_1") @ state[f"{block}.attn.in_proj_weight"].T
        q, k, v = (qkv + state[f"{block}.attn.in_proj_bias"]).unflatten(-1, (3, heads, 64)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / 8 + future  # sqrt(64) = 8
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ state[f"{block}.attn.out_proj.weight"].T + state[f"{block}.attn.out_proj.bias"]
        inner = norm(x, state, f"{block}.ln_2") @ state[f"{block}.mlp.c_fc.weight"].T + state[f"{block}.mlp.c_fc.bias"]
        inner = inner * torch.sigmoid(1.702 * inner)
        x = x + inner @ state[f"{block}.mlp.c_proj.weight"].T + state[f"{block}.mlp.c_proj.bias"]
    x = norm(x, state, "ln_final")
    return x, x[torch.arange(len(x)), input_ids.argmax(-1)] @ state["text_projection"]


def saved(state, folder, name="long.pt"):
    torch.save(state, folder / name)
    return folder / name


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer(77)


@pytest.fixture(scope="module")
def stock(tmp_path_factory, tokenizer):
    """A tiny text encoder in a pipeline's folder, as published: 77 rows, eos id 2."""
    folder = tmp_path_factory.mktemp("stock")
    config = CLIPTextConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=64,
        bos_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def encode(model, tokenizer, *prompts):
    inputs = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
    with torch.inference_mode():
        return model(inputs.input_ids, output_hidden_states=True)


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


# --- the result -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("projection", [False, True])
def test_saved_encoders_reload_in_plain_transformers_to_the_same_states(tmp_path, dtype, projection):
    path = saved(random_state(layers=1, dtype=dtype), tmp_path)
    model, tokenizer = load_text_encoder(path, projection=projection, pad_token="!")
    assert model.dtype == dtype
    assert save_text_encoder(model, tokenizer, tmp_path / "run") == tmp_path / "run"
    plain = type(model).from_pretrained(tmp_path / "run", subfolder="text_encoder")
    plain_tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "run", subfolder="tokenizer")
    assert plain.dtype == dtype and plain.config.max_position_embeddings == plain_tokenizer.model_max_length == 248
    assert plain_tokenizer.pad_token == "!" and plain_tokenizer.pad_token_id == plain.config.pad_token_id == 0
    before, after = encode(model, tokenizer, SHORT, LONG), encode(plain, plain_tokenizer, SHORT, LONG)
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    names = load_file(tmp_path / "run/text_encoder/model.safetensors").keys()
    assert all(name.startswith(("text_model.", "text_projection.")) for name in names)  # as transformers 4 wants them


def test_dtype_is_kept_widened_or_as_asked(tmp_path):
    mixed = random_state(layers=1, dtype=torch.float16)
    mixed["ln_final.weight"] = mixed["ln_final.weight"].float()
    path = saved(mixed, tmp_path)
    assert load_text_encoder(path)[0].dtype == torch.float32
    model, _ = load_text_encoder(path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_padding(stock, tmp_path):
    assert load_text_encoder(stock)[1].pad_token_id == END
    assert load_text_encoder(stock, pad_token="!")[1].pad_token_id == 0
    clip_tokenizer(77, "!").save_pretrained(tmp_path)
    second = CLIPTokenizer.from_pretrained(tmp_path)
    assert load_text_encoder(stock, tokenizer=second)[1].pad_token_id == 0  # the tokenizer's own
    assert load_text_encoder(stock, tokenizer=second, pad_token="eos")[1].pad_token_id == END


def test_saving_never_overwrites_unasked_and_leaves_neighbors_alone(stock, tmp_path):
    model, tokenizer = load_text_encoder(stock)
    (tmp_path / "notes.txt").write_text("mine")
    save_text_encoder(model, tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"text_encoder and .*tokenizer would be overwritten"):
        save_text_encoder(model, tokenizer, tmp_path)
    torch.nn.init.zeros_(text_embeddings(model).position_embedding.weight)
    save_text_encoder(model, tokenizer, tmp_path, overwrite=True)
    again, _ = load_text_encoder(tmp_path)
    assert text_embeddings(again).position_embedding.weight.abs().max() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "text_encoder", "tokenizer"]
    with pytest.raises(ValueError, match="is a file"):
        save_text_encoder(model, tokenizer, tmp_path / "notes.txt")


def test_a_failed_save_leaves_the_old_one(stock, tmp_path, monkeypatch):
    model, tokenizer = load_text_encoder(stock)
    save_text_encoder(model, tokenizer, tmp_path)
    before = (tmp_path / "text_encoder/model.safetensors").read_bytes()
    torch.nn.init.zeros_(text_embeddings(model).position_embedding.weight)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(CLIPTokenizer, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        save_text_encoder(model, tokenizer, tmp_path, overwrite=True)
    assert (tmp_path / "text_encoder/model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text_encoder", "tokenizer"]


def test_gradients_flow_and_tokens_can_be_added(stock):
    """What trainers and textual inversion do with a stock encoder."""
    model, tokenizer = load_text_encoder(stock)
    tokenizer.add_tokens("<my-cat>")
    model.resize_token_embeddings(len(tokenizer))
    ids = tokenizer("a <my-cat> " + SHORT, return_tensors="pt").input_ids
    output = model(ids)
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, -1])  # the end, not the highest id
    output.last_hidden_state.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- one file for other programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["openai", "comfyui"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_and_back_is_the_same_encoder(tmp_path, layout, dtype):
    """Weights, activation, heads, padding and token ids; 4 heads of 16 and GELU are nothing that shapes would say."""
    options = {"num_attention_heads": 4, "hidden_act": "gelu", "pad_token": "!"}
    model, tokenizer = load_text_encoder(saved(random_state(dtype=dtype), tmp_path), projection=True, **options)
    file = save_checkpoint(model, tokenizer, tmp_path / "new" / "long.safetensors", layout=layout)
    assert [path.name for path in file.parent.iterdir()] == ["long.safetensors"]
    again, other = load_text_encoder(file)
    save_text_encoder(again, other, tmp_path / "folder")
    for found, words in [(again, other), load_text_encoder(tmp_path / "folder")]:
        assert type(found) is CLIPTextModelWithProjection and found.dtype == dtype
        state = found.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        aside = {"architectures", "dtype", "transformers_version"}
        one, old = found.config.to_dict(), model.config.to_dict()
        assert all(one[name] == value for name, value in old.items() if name not in aside)
        assert words([LONG, "wow!!!"], padding="max_length") == tokenizer([LONG, "wow!!!"], padding="max_length")
    assert type(load_text_encoder(file, projection=False)[0]) is CLIPTextModel


def test_the_authors_forward_pass_takes_the_file_for_its_own(tmp_path):
    """Every text weight is there under its name, both tables of 248 rows, and the function is the encoder's."""
    state = random_state()
    model, tokenizer = load_text_encoder(saved(state, tmp_path), projection=True, pad_token="!")
    file = load_file(save_checkpoint(model, tokenizer, tmp_path / "long.safetensors", layout="openai"))
    foreign = ("visual.", "cross_net.", "logit_scale")
    assert {name: tensor.shape for name, tensor in file.items()} == {
        name: tensor.shape for name, tensor in state.items() if not name.startswith(foreign)
    }
    input_ids = tokenizer([SHORT, LONG], padding="max_length", truncation=True, return_tensors="pt").input_ids
    output = encode(model, tokenizer, SHORT, LONG)
    states, pooled = two_table_forward(file, input_ids)
    expected, expected_pooled = two_table_forward(state, input_ids)
    assert torch.equal(states, expected) and torch.equal(pooled, expected_pooled)
    torch.testing.assert_close(output.text_embeds, pooled, rtol=0, atol=1e-5)  # fp32, as above


def test_the_file_holds_what_comfyui_looks_for(stock, tmp_path):
    """Its loader counts the rows of one table, and takes layer 30 for bigG and layer 1 for CLIP-L; no prefix."""
    model, tokenizer = load_text_encoder(stock)
    file = load_file(save_checkpoint(model, tokenizer, tmp_path / "l.safetensors", layout="comfyui"))
    assert file["text_model.embeddings.position_embedding.weight"].shape == (248, 64)
    assert "text_model.encoder.layers.1.mlp.fc1.weight" in file
    assert "text_model.encoder.layers.30.mlp.fc1.weight" not in file and "text_projection.weight" not in file
    whole = CLIPTextConfig(
        hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=32, max_position_embeddings=248
    )
    second = CLIPTextModelWithProjection(whole)
    file = load_file(save_checkpoint(second, tokenizer, tmp_path / "g.safetensors", layout="comfyui"))
    assert {"text_model.encoder.layers.30.mlp.fc1.weight", "text_projection.weight"} <= file.keys()


def test_files_are_never_overwritten_unasked_and_whole_or_not_there(stock, tmp_path, caplog):
    model, tokenizer = load_text_encoder(stock)
    path = tmp_path / "long.safetensors"
    save_checkpoint(model, tokenizer, path, layout="comfyui")
    assert "but this one is 64 wide with 3." in caplog.text
    before = path.read_bytes()
    for target, layout, sentence in [
        (path, "comfyui", r"long\.safetensors would be overwritten: choose another file, or say overwrite=True"),
        (tmp_path / "long.pt", "openai", r"long\.pt must be a file that ends in \.safetensors"),
        (tmp_path, "comfyui", r"must be a file that ends in \.safetensors"),
        (path, "gguf", "layout='gguf' is unknown: choose from openai, comfyui"),
        (tmp_path / "x.safetensors", "openai", "has a text projection, but this encoder has none"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            save_checkpoint(model, tokenizer, target, layout=layout)
    assert [entry.name for entry in tmp_path.iterdir()] == ["long.safetensors"] and path.read_bytes() == before
    torch.nn.init.zeros_(text_embeddings(model).position_embedding.weight)
    save_checkpoint(model, tokenizer, path, layout="comfyui", overwrite=True)
    assert text_embeddings(load_text_encoder(path)[0]).position_embedding.weight.abs().max() == 0


# --- errors ---------------------------------------------------------------------------------------------------------


def tiny_unet(cross_attention_dim):
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=8,
    )


def test_a_512_wide_encoder_is_refused_for_a_768_wide_unet(tmp_path):
    narrow, _ = load_text_encoder(saved(random_state(width=512, layers=1), tmp_path))
    with pytest.raises(ValueError, match=r"text encoder is 512 wide, but the UNet reads states of width 768"):
        check_width(narrow, tiny_unet(768))
    check_width(narrow, tiny_unet(512))
    check_width([narrow, narrow], tiny_unet(1024))
    with pytest.raises(ValueError, match=r"1024 wide \(512 \+ 512\), but the UNet reads states of width 768"):
        check_width([narrow, narrow], tiny_unet(768))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_length": 250}, r"model\.safetensors: max_length=250 .* 248 \(ratio 4\) and 305 \(ratio 5\)"),
        ({"max_length": 76}, "max_length=76 is shorter than the 77 rows"),
        ({"ratio": 5}, "ratio 5 takes 77 rows to 305, not to max_length=248, which needs ratio 4"),
        ({"keep": 76}, "keep is 76, but a table of 77 rows can keep 0 to 75"),
        ({"pad_token": "no token"}, "pad_token='no token' is not in the vocabulary"),
        ({"subfolder": "text_encoder_3"}, "holds no CLIP text model: .*text_encoder_3"),
        ({"projection": True}, r"lacks the text weights text_projection\.weight"),
    ],
)
def test_wrong_options_are_one_sentence(stock, options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        load_text_encoder(stock, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "no/such/folder", "./absent", "absent.pt", "owner/absent.safetensors"]
)
def test_paths_that_do_not_exist(source):
    with pytest.raises(ValueError, match="does not exist: give a folder"):
        load_text_encoder(source)


@pytest.mark.parametrize("options", [{}, {"local_files_only": True}])
def test_a_hub_id_without_network(options, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"owner/model is not a folder here.*cannot be reached or is not cached"
    ) as caught:
        load_text_encoder("owner/model", **options)
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_clip(tmp_path, stock):
    with pytest.raises(ValueError, match=r"holds no CLIP text model: config\.json is neither in"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match=r"holds no weights: one of model\.safetensors"):
        load_text_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((stock / "text_encoder/model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="of type 't5', not of a CLIP"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip_text_model", "hidden_act": "sine"}')
    with pytest.raises(ValueError, match="hidden_act is 'sine'"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"config\.json is not a readable JSON"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "clip_text_model", "hidden_size": 65, "num_attention_heads": 4}'
    )
    with pytest.raises(ValueError, match=r"config\.json describes no CLIP text model .*65"):
        load_text_encoder(tmp_path)
    with pytest.raises(ValueError, match="is a file and has no subfolder"):
        load_text_encoder(tmp_path / "model.safetensors", subfolder="text_encoder")


def test_tokenizers_that_do_not_fit(stock, tmp_path):
    larger = clip_tokenizer(77)
    larger.add_tokens("<one-more>")
    with pytest.raises(ValueError, match=r"tokenizer has 49409 tokens, but .* embeds only 49408"):
        load_text_encoder(stock, tokenizer=larger)
    state = random_state(layers=1)
    state["token_embedding.weight"] = state["token_embedding.weight"][:1000]
    with pytest.raises(ValueError, match=r"vocabulary of 1000 tokens and no tokenizer .* give tokenizer="):
        load_text_encoder(saved(state, tmp_path))
    (tmp_path / "text_encoder").symlink_to(stock / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match="holds no readable CLIP tokenizer"):
        load_text_encoder(tmp_path)


def test_config_and_weights_that_disagree(stock, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(stock / "text_encoder/model.safetensors")
    config = json.loads((stock / "text_encoder/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"lacks the text weights encoder\.layers\.3\.layer_norm1\.bias"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"does not have: encoder\.layers\.2\."):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    with pytest.raises(ValueError, match=r"wrong shape: embeddings\..* is \(49408, 64\) and must be \(49408, 128\)"):
        load_text_encoder(tmp_path)


def test_plain_diffusers_loads_the_saved_folder_as_components(stock, tmp_path):
    """`StableDiffusionPipeline` with our encoder saves and reloads as any other: stock classes, nothing registered."""
    model, tokenizer = load_text_encoder(stock)
    autoencoder = AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=32)
    pipe = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=model,
        tokenizer=tokenizer,
        unet=tiny_unet(64),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    with torch.inference_mode():
        (embeds, _), (embeds_again, _) = (each.encode_prompt(LONG, "cpu", 1, False) for each in (pipe, again))
    assert embeds.shape == (1, 248, 64) and torch.equal(embeds, embeds_again)
    from_pipeline, _ = load_text_encoder(tmp_path)
    assert torch.equal(encode(from_pipeline, tokenizer, LONG).last_hidden_state, embeds)
