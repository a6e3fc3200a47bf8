"""Whole models with a long encoder in them: the encoder comes back bit for bit, and all else is left as it was."""

import json
from pathlib import Path

import pytest
import torch
from public_layouts import AS_IS, TOKENIZER, hugging_face, open_clip, prefixed, small_encoder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from finelip_diffusion import cli, load_text_encoder
from finelip_diffusion.layouts import embedded_encoders
from finelip_diffusion.merging import fitting_slot, merge, slots
from finelip_diffusion.text_encoder import canonical_weights, save_text_encoder

REST = {"model.diffusion_model.out.2.bias": torch.randn(4), "first_stage_model.quant_conv.bias": torch.randn(2).half()}
XL = {"conditioner.embedders.0.transformer.": hugging_face, "conditioner.embedders.1.model.": open_clip}
KINDS = {
    "1.x": {"cond_stage_model.transformer.": hugging_face},
    "2.x": {"cond_stage_model.model.": open_clip},
    "xl": XL,
    "3.x": {"text_encoders.clip_l.transformer.": hugging_face, "text_encoders.clip_g.transformer.": hugging_face},
    "flux": {"text_encoders.clip_l.transformer.": hugging_face},
    "comfyui": {"clip_l.transformer.": hugging_face},
}


def base_file(kind: str, path: Path) -> Path:
    """A whole model of a kind, in half precision; its text encoders have 77 positions."""
    tensors = dict(REST)
    for number, (prefix, names) in enumerate(KINDS[kind].items()):
        tower = {name: tensor.half() for name, tensor in names(small_encoder(number, positions=77)).items()}
        if kind in ("1.x", "xl") and names is hugging_face:
            del tower["text_projection.weight"]
            tower["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        if kind == "2.x":
            tower |= {"transformer.resblocks.23.ln_1.bias": torch.ones(3), "attn_mask": torch.zeros(77, 77)}
        tensors |= prefixed(prefix, tower)
    if path.suffix == ".ckpt":
        torch.save({"state_dict": tensors, "epoch": 3}, path)
    else:
        save_file(tensors, path, metadata={"modelspec.title": "tiny", "modelspec.hash_sha256": "stale"})
    return path


def read(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"] if path.suffix == ".ckpt" else load_file(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_comes_back_and_all_else_is_left(tmp_path, kind, suffix):
    base, long = base_file(kind, tmp_path / f"base{suffix}"), small_encoder(7)
    for place, prefix in embedded_encoders(read(base)).items():
        out = tmp_path / f"{place}.safetensors"
        slot = merge(base, long, TOKENIZER, out, place=place)
        before, after = read(base), load_file(out)
        assert slot.place == place and after.keys() == before.keys()
        for name in before.keys() - {name for name in before if name.startswith(prefix)}:
            assert torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype
        for name in [name for name in after if name.endswith("position_ids") and name.startswith(prefix)]:
            assert torch.equal(after[name], torch.arange(248)[None])
        if kind == "2.x":
            assert torch.equal(after[f"{prefix}attn_mask"], torch.full((248, 248), float("-inf")).triu(1))
            assert torch.equal(after[f"{prefix}transformer.resblocks.23.ln_1.bias"], torch.ones(3))
        back, _ = load_text_encoder(out, subfolder=place, projection=slot.projection, **AS_IS)
        same = canonical_weights(long)
        assert back.dtype == long.dtype and len(canonical_weights(back)) == len(same) - (not slot.projection)
        assert all(torch.equal(tensor, same[name]) for name, tensor in canonical_weights(back).items())
        with safe_open(out, framework="pt") as file:
            expected = {"format": "pt"} | ({} if suffix == ".ckpt" else {"modelspec.title": "tiny"})
            assert file.metadata() == expected


def test_an_encoder_without_a_projection_leaves_the_base_its_own(tmp_path, caplog):
    base = base_file("3.x", tmp_path / "base.safetensors")
    long = small_encoder(7)
    bare = CLIPTextModel(long.config).eval()
    merge(base, bare, TOKENIZER, tmp_path / "out.safetensors", place="text_encoder_2")
    name = "text_encoders.clip_g.transformer.text_projection.weight"
    assert torch.equal(load_file(tmp_path / "out.safetensors")[name], load_file(base)[name])
    assert "keeps its own text projection" in caplog.text


def pipeline_folder(folder: Path) -> Path:
    """What of a pipeline's folder is read here: the encoders, and files that must be copied as they are."""
    for place, model in (
        ("text_encoder", CLIPTextModel(small_encoder(0, positions=77).config)),
        ("text_encoder_2", small_encoder(1, positions=77)),
    ):
        save_text_encoder(model.eval(), TOKENIZER, folder, subfolder=place)
    (folder / "unet").mkdir()
    (folder / "unet" / "weights.bin").write_bytes(b"\x00\x01")
    index = {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"]}
    index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_folders_of_pipelines(tmp_path):
    """OneTrainer and kohya's scripts load such folders; transformers and diffusers do."""
    base, long = pipeline_folder(tmp_path / "base"), small_encoder(7)
    assert [(slot.place, slot.projection) for slot in slots(base).values()] == [
        ("text_encoder", False),
        ("text_encoder_2", True),
    ]
    out = tmp_path / "out"
    merge(base, long, TOKENIZER, out, place="text_encoder_2")
    back = CLIPTextModelWithProjection.from_pretrained(out / "text_encoder_2")
    assert all(torch.equal(tensor, canonical_weights(long)[name]) for name, tensor in canonical_weights(back).items())
    assert json.loads((out / "model_index.json").read_text()) == json.loads((base / "model_index.json").read_text())
    for name in ("unet/weights.bin", "text_encoder/model.safetensors"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    with pytest.raises(ValueError, match="needs the text projection of text_encoder_2"):
        merge(base, CLIPTextModel(long.config), TOKENIZER, tmp_path / "other", place="text_encoder_2")
    assert not (tmp_path / "other").exists()


def test_the_command(tmp_path, capsys):
    base = base_file("3.x", tmp_path / "base.safetensors")
    home = save_text_encoder(small_encoder(7), TOKENIZER, tmp_path / "long")
    out = tmp_path / "out.safetensors"
    arguments = ["merge", str(base), str(home), str(out), "--subfolder", "text_encoder_2"]
    assert cli.main(arguments) == 0
    assert "with" in (printed := capsys.readouterr().out) and "as its text_encoder_2, 248 positions" in printed
    assert "text_encoders.clip_g.transformer.text_projection.weight" in load_file(out)
    assert cli.main(arguments) == 1 and "would be overwritten" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite", "--dtype", "float16"]) == 0
    merged, before = load_file(out), load_file(base)
    assert {name: t.dtype for name, t in merged.items()} == {name: t.dtype for name, t in before.items()}


def test_what_does_not_fit_is_one_sentence(tmp_path):
    base, long = base_file("1.x", tmp_path / "base.safetensors"), small_encoder(7)
    deep = small_encoder(7)
    deep.config.num_hidden_layers = 3
    home = save_text_encoder(long, TOKENIZER, tmp_path / "long")
    save_file(REST, tmp_path / "none.safetensors")
    folder = pipeline_folder(tmp_path / "folder")
    for call, sentence in [
        (lambda: fitting_slot(base, deep), r"is 32 wide with 3 layers, but .* holds text_encoder \(32 wide with 2"),
        (lambda: merge(base, long, TOKENIZER, tmp_path / "x", place="text_encoder_2"), "has no text_encoder_2"),
        (lambda: merge(base, long, TOKENIZER, tmp_path / "x.ckpt"), "must be a file that ends in .safetensors"),
        (lambda: merge(folder, long, TOKENIZER, tmp_path / "x.safetensors"), "must be a folder"),
        (lambda: merge(base, long, TOKENIZER, base), "would be overwritten: choose another one"),
        (lambda: merge(folder, long, TOKENIZER, folder, overwrite=True), "is the folder that is read from"),
        (lambda: slots(home), "holds no model_index.json: give a whole model"),
        (lambda: slots(tmp_path / "none.safetensors"), "holds no text encoder of CLIP's"),
    ]:
        with pytest.raises(ValueError, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)
    before = base.read_bytes()
    merge(base, long, TOKENIZER, base, overwrite=True)  # onto itself: what is read stays until all is written
    assert base.read_bytes() != before and "cond_stage_model.transformer." in str(sorted(load_file(base)))
