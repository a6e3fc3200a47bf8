"""What is saved, as folders and as files of other programs: whole or not at all, and the same encoder again."""

import pytest
import torch
from long_weights import END, LONG, SHORT, encode, random_state, saved, two_table_forward
from safetensors.torch import load_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from finelip_diffusion.text_encoder import (
    load_text_encoder,
    save_checkpoint,
    save_text_encoder,
    text_embeddings,
)
from finelip_diffusion.tokenizer import clip_tokenizer


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
