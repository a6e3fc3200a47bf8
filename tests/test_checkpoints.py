"""Foreign checkpoints: what is read, what is refused, and that nothing in a file is ever run."""

import json
import pickle

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig

from finelip_diffusion.checkpoints import CONFIGURATION, read_checkpoint, read_configuration
from finelip_diffusion.layouts import POSITIONS, PROJECTION, caveat, huggingface_layout, openai_layout
from finelip_diffusion.towers import check_weights, text_weights

WIDTH, LAYERS, VOCAB, EMBED = 64, 2, 99, 32


def openai_state(rows=77, two_tables=False):
    """Random weights under OpenAI's names, with the parts that do not belong to the text tower."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.1

    state = {
        "positional_embedding": random(rows, WIDTH),
        "text_projection": random(WIDTH, EMBED),
        "logit_scale": torch.tensor(4.6),
        "visual.conv1.weight": random(4, 3, 2, 2),
        "token_embedding.weight": random(VOCAB, WIDTH),
        "ln_final.weight": 1 + random(WIDTH),
        "ln_final.bias": random(WIDTH),
    }
    for layer in range(LAYERS):
        block = f"transformer.resblocks.{layer}."
        for norm in ("ln_1", "ln_2"):
            state |= {f"{block}{norm}.weight": 1 + random(WIDTH), f"{block}{norm}.bias": random(WIDTH)}
        for name, shape in {
            "attn.in_proj_": (3 * WIDTH, WIDTH),
            "attn.out_proj.": (WIDTH, WIDTH),
            "mlp.c_fc.": (4 * WIDTH, WIDTH),
            "mlp.c_proj.": (WIDTH, 4 * WIDTH),
        }.items():
            state |= {f"{block}{name}weight": random(*shape), f"{block}{name}bias": random(shape[0])}
    if two_tables:
        state |= {"positional_embedding_res": random(rows, WIDTH), "cross_net.sparc.weight": random(3, 3)}
    return state


def expected_of(state):
    return dict(text_weights(state).tensors)


def test_openai_names_become_ours():
    state = openai_state()
    weights = text_weights(state)
    assert weights.layout.name == "openai" and weights.set_aside == ("logit_scale", "visual.conv1.weight")
    assert torch.equal(weights.tensors[PROJECTION], state["text_projection"].T)
    assert weights.tensors[PROJECTION].is_contiguous()
    for position, name in enumerate("qkv"):
        third = slice(position * WIDTH, (position + 1) * WIDTH)
        for kind in ("weight", "bias"):
            theirs = state[f"transformer.resblocks.1.attn.in_proj_{kind}"][third]
            assert torch.equal(weights.tensors[f"encoder.layers.1.self_attn.{name}_proj.{kind}"], theirs)
    config = weights.config()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (WIDTH, LAYERS, 1)
    assert (config.vocab_size, config.max_position_embeddings, config.projection_dim) == (VOCAB, 77, EMBED)
    assert config.hidden_act == "quick_gelu" and not weights.activation_is_known


def test_two_tables_are_merged_and_training_parts_set_aside():
    state = openai_state(248, two_tables=True)
    weights = text_weights(state)
    assert weights.layout.name == "two-table" and weights.activation_is_known
    assert "cross_net.sparc.weight" in weights.set_aside
    merged = weights.tensors[POSITIONS]
    assert torch.equal(merged[:20], state["positional_embedding"][:20])
    assert torch.equal(merged[20:], state["positional_embedding_res"][20:])


def test_open_clip_layouts_agree():
    """open_clip's own conversion between its two layouts, and ours of either, give the same tensors."""
    state = openai_state()
    custom = open_clip.model.convert_to_custom_text_state_dict(state)
    assert "text.transformer.resblocks.0.ln_1.weight" in custom
    plain, prefixed = text_weights(state), text_weights(custom)
    assert prefixed.layout.name == "open_clip" and prefixed.config().hidden_act == "gelu"
    assert plain.tensors.keys() == prefixed.tensors.keys()
    assert all(torch.equal(plain.tensors[name], prefixed.tensors[name]) for name in plain.tensors)


def test_depth_tells_the_activation_and_an_argument_overrules():
    deep = openai_state()
    deep |= {
        name.replace("resblocks.1", f"resblocks.{layer}"): tensor
        for layer in range(2, 24)
        for name, tensor in openai_state().items()
        if "resblocks.1" in name
    }
    weights = text_weights(deep)
    assert weights.config().hidden_act == "gelu" and weights.activation_is_known
    assert weights.config(hidden_act="quick_gelu").hidden_act == "quick_gelu"


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "nested"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("zipped", [True, False])
def test_wrapping_and_prefixes_are_taken_off(tmp_path, wrap, prefix, zipped):
    state = openai_state()
    content = {prefix + name: tensor for name, tensor in state.items()}
    if wrap == "nested":
        content = {"epoch": 3, "model": {"state_dict": content, "step": 7}}
    elif wrap:
        content = {"epoch": 3, wrap: content, "optimizer": {"lr": 1e-6}}
    path = tmp_path / "clip.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(path)
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


def test_weights_outlive_the_file(tmp_path):
    path = tmp_path / "clip.pt"
    torch.save(openai_state(), path)
    weights = text_weights(read_checkpoint(path))
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(weights.tensors[POSITIONS], openai_state()["positional_embedding"])


def test_shards_are_read_through_their_index(tmp_path):
    state = openai_state()
    names = sorted(state)
    save_file({name: state[name] for name in names[:9]}, tmp_path / "a.safetensors")
    save_file({name: state[name] for name in names[9:]}, tmp_path / "b.safetensors")
    weight_map = {name: "a.safetensors" if i < 9 else "b.safetensors" for i, name in enumerate(names)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert read_checkpoint(index).keys() == state.keys()
    index.write_text("{}")
    with pytest.raises(ValueError, match="names no shards"):
        read_checkpoint(index)


class _WritesAFile:
    """Unpickled by plain pickle, it would create the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["torch", "torch-legacy", "pickle"])
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path, form, suffix):
    victim, path = tmp_path / "created", tmp_path / f"evil{suffix}"
    content = {**openai_state(), "surprise": _WritesAFile(victim)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"surprise": _WritesAFile(victim)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(ValueError, match=r"wants to run (\S*open|code), and was refused unread") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value) and not victim.exists()
    pickle.loads(pickle.dumps(_WritesAFile(victim))).close()
    assert victim.exists()  # the trap does work


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_is_refused_with_a_way_out(tmp_path):
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with pytest.raises(ValueError, match="TorchScript archive, which holds code: save its state_dict"):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint\n", b"\x80\x02", b"PK\x03\x04 broken", b"{}" * 99, None])
def test_what_is_no_checkpoint_is_one_sentence(tmp_path, suffix, content):
    path = tmp_path / f"file{suffix}"
    if content is None:  # a download that stopped half-way
        if suffix == ".safetensors":
            save_file(openai_state(), path)
        else:
            torch.save(openai_state(), path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_files_without_a_clip_are_named(tmp_path):
    with pytest.raises(ValueError, match="is missing"):
        read_checkpoint(tmp_path / "absent.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no tensors under names"):
        read_checkpoint(tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"no CLIP text tower .* conv\.weight"):
        text_weights({"conv.weight": torch.zeros(1)})


@pytest.mark.parametrize("name", sorted(n for n in openai_state(77) if not n.startswith(("visual", "logit"))))
def test_every_missing_text_weight_is_named(name):
    state = openai_state()
    expected = expected_of(state)
    del state[name]
    with pytest.raises(ValueError, match="lacks the text weights") as caught:
        weights = text_weights(state)
        weights.config()
        check_weights(weights, expected)
    assert f"{name}." in str(caught.value)


def test_extra_text_weights_are_named():
    with pytest.raises(ValueError, match=r"does not have: transformer\.resblocks\.0\.ls_1\.gamma"):
        text_weights({**openai_state(), "transformer.resblocks.0.ls_1.gamma": torch.zeros(1)})
    with pytest.raises(ValueError, match="cls_emb"):
        text_weights({**openai_state(), "cls_emb": torch.zeros(1)})


def test_misshapen_text_weights_are_named():
    state = openai_state()
    expected = expected_of(state)
    state["ln_final.bias"] = torch.zeros(WIDTH + 1)
    with pytest.raises(ValueError, match=r"ln_final\.bias \(final_layer_norm\.bias\) is \(65,\) and must be \(64,\)"):
        check_weights(text_weights(state), expected)
    state["transformer.resblocks.0.attn.in_proj_weight"] = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"lacks the text weights transformer\.resblocks\.0\.attn\.in_proj_weight"):
        check_weights(text_weights(state), expected)
    with pytest.raises(ValueError, match=r"\(248, 64\) and \(77, 64\)"):
        text_weights({**openai_state(248), "positional_embedding_res": torch.zeros(77, WIDTH)})
    with pytest.raises(ValueError, match=r"positional_embedding in shape \(64,\), not in two"):
        text_weights({**openai_state(), "positional_embedding": torch.zeros(WIDTH)}).config()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    state = openai_state()
    expected = expected_of(state)
    state["transformer.resblocks.1.mlp.c_fc.bias"][3] = value
    with pytest.raises(ValueError, match=r"infinite numbers in transformer\.resblocks\.1\.mlp\.c_fc\.bias \(encoder"):
        check_weights(text_weights(state), expected)


def test_quantized_weights_are_refused():
    state = openai_state()
    expected = expected_of(state)
    state["token_embedding.weight"] = state["token_embedding.weight"].to(torch.int8)
    with pytest.raises(ValueError, match=r"token_embedding\.weight \(.*\) as torch\.int8"):
        check_weights(text_weights(state), expected)


def test_a_width_that_tells_no_heads_asks_for_them():
    state = {name: tensor for name, tensor in openai_state().items() if "resblocks" not in name}
    state["token_embedding.weight"] = torch.zeros(VOCAB, 48)
    state["transformer.resblocks.0.mlp.c_fc.weight"] = torch.zeros(96, 48)
    with pytest.raises(ValueError, match=r"48 wide.*give num_attention_heads"):
        text_weights(state).config()
    assert text_weights(state).config(num_attention_heads=4).num_attention_heads == 4


# --- from our names to those of others ------------------------------------------------------------------------------


@pytest.mark.parametrize("two_tables", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_openais_names_there_and_back(two_tables, dtype):
    """Every text weight comes back bit for bit; a merged table is written as both, 77 rows as OpenAI's one."""
    state = {name: tensor.to(dtype) for name, tensor in openai_state(248 if two_tables else 77, two_tables).items()}
    weights = text_weights(state)
    again = openai_layout(weights.tensors)
    text = state.keys() - set(weights.set_aside)
    assert again.keys() == text
    assert all(torch.equal(again[name], state[name]) for name in text if not name.startswith("positional"))
    for table in (name for name in text if name.startswith("positional")):
        assert torch.equal(again[table], weights.tensors[POSITIONS])
    back = text_weights(again)
    assert back.layout == weights.layout and back.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in weights.tensors.items())
    pointers = [tensor.data_ptr() for tensor in again.values()]
    assert len(set(pointers)) == len(pointers) and all(tensor.is_contiguous() for tensor in again.values())


def test_openais_names_are_those_that_errors_tell():
    weights = text_weights(openai_state())
    assert {weights.own_name(name) for name in weights.tensors} == openai_layout(weights.tensors).keys()


def test_without_a_projection_openais_layout_is_refused():
    tensors = dict(text_weights(openai_state()).tensors)
    del tensors[PROJECTION]
    with pytest.raises(ValueError, match="has a text projection, but this encoder has none: load it with projection"):
        openai_layout(tensors)


def test_transformers_names_there_and_back():
    tensors = text_weights(openai_state()).tensors
    named = huggingface_layout(tensors)
    assert all(name.startswith(("text_model.", "text_projection.weight")) for name in named)
    back = text_weights(named)
    assert back.layout.name == "huggingface" and back.tensors.keys() == tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in tensors.items())


def test_configurations_in_metadata(tmp_path):
    path = tmp_path / "clip.safetensors"
    for text, expected in [(None, None), ('{"hidden_act": "gelu"}', {"hidden_act": "gelu"})]:
        save_file(openai_state(), path, metadata=None if text is None else {CONFIGURATION: text})
        assert read_configuration(path) == expected
    for text in ("{broken", "[1]", "null"):
        save_file(openai_state(), path, metadata={CONFIGURATION: text})
        with pytest.raises(ValueError, match=r"clip\.safetensors has metadata .* that is not a JSON object"):
            read_configuration(path)


def test_what_other_programs_make_of_an_encoder():
    published = CLIPTextConfig(hidden_size=768, num_attention_heads=12, max_position_embeddings=248)
    assert caveat("openai", published) is None and caveat("comfyui", published) is None
    gelu = CLIPTextConfig(hidden_size=768, num_attention_heads=8, hidden_act="gelu", max_position_embeddings=248)
    assert "but this encoder has gelu and heads of width 96" in str(caveat("openai", gelu))
    small = CLIPTextConfig(hidden_size=512, num_attention_heads=8, max_position_embeddings=248)
    assert "but this one is 512 wide with 12." in str(caveat("comfyui", small))
    assert caveat("comfyui", CLIPTextConfig(hidden_size=512, num_attention_heads=8)) is None  # 77 rows: no long one
