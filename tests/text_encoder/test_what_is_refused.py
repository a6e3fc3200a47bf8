"""What is not a long text encoder, or does not fit, is refused in one sentence."""

import json

import huggingface_hub.constants
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from long_weights import LONG, encode, random_state, saved

from finelip_diffusion.text_encoder import (
    check_width,
    load_text_encoder,
)
from finelip_diffusion.tokenizer import clip_tokenizer


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
