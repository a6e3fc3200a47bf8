"""Models beside Stable Diffusion 1 and XL: 2.x, 3 and Flux with long prompts, and what `attach` refuses."""

import copy
from functools import partial

import pytest
import tiny_models
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    KandinskyV22PriorPipeline,
    PixArtAlphaPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UnCLIPScheduler,
)
from diffusers.models import PriorTransformer
from PIL import Image
from tiny_models import LAYERS, WIDTH, tiny_scheduler, tiny_text_encoder, tiny_unet, tiny_vae
from transformers import LlamaConfig, LlamaModel, T5Config, T5EncoderModel, T5Tokenizer

from finelip_diffusion import FineLIPStableDiffusionPipeline, attach
from finelip_diffusion.text_encoder import save_text_encoder
from finelip_diffusion.tokenizer import clip_tokenizer

CPU = torch.device("cpu")
WORDS = ["red", "cat", "under", "a", "green", "tree", "beside", "two", "blue", "dogs", "asleep", ".", "crown"]


pixels = partial(tiny_models.pixels, steps=1)


@pytest.fixture
def endings(text_of):
    """Two prompts of 102 tokens that differ after token 77."""
    return [text_of(100) + " a crown", text_of(100) + " a candle"]


# Stable Diffusion 2.x


@pytest.fixture(scope="module")
def stable_diffusion_2():
    """An encoder as OpenCLIP ViT-H without its last layer, padded with "!", under a UNet that predicts v."""
    encoder = tiny_text_encoder(1, hidden_act="gelu")
    unet = tiny_unet(2, use_linear_projection=True)
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(0),
        text_encoder=encoder,
        tokenizer=clip_tokenizer(77, pad_token="!"),
        unet=unet,
        scheduler=DDIMScheduler.from_config(tiny_scheduler().config, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_stable_diffusion_2(stable_diffusion_2, endings, text_of):
    stock = stable_diffusion_2
    ours = FineLIPStableDiffusionPipeline(**stock.components, requires_safety_checker=False, long_prompt="stretch")
    plain = StableDiffusionPipeline(**stock.components, requires_safety_checker=False)
    attached = attach(plain, long_prompt="stretch")
    for pipe in (ours, attached):
        pipe.set_progress_bar_config(disable=True)
        assert pipe.text_encoder.config.hidden_act == "gelu"
        assert pipe.tokenizer.pad_token_id == 0
    assert torch.equal(pixels(stock, endings[0]), pixels(stock, endings[1]))
    first, second = (pixels(ours, prompt) for prompt in endings)
    assert not torch.equal(first, second)
    assert torch.equal(first, pixels(attached, endings[0]))
    assert torch.equal(pixels(ours, endings[0], long_prompt="truncate"), pixels(stock, endings[0]))
    short, stock_short = (pipe.encode_prompt(text_of(20), CPU, 1, False)[0][:, :21] for pipe in (attached, stock))
    torch.testing.assert_close(short, stock_short, rtol=0, atol=2e-5)  # 248 positions against 77 round otherwise


def test_the_last_layer_of_open_clip_is_left_out(stable_diffusion_2, tmp_path, caplog, text_of):
    """A whole ViT-H has one layer more than Stable Diffusion 2 reads."""
    whole = tiny_text_encoder(7, positions=248, hidden_act="gelu", num_hidden_layers=LAYERS + 1)
    save_text_encoder(whole, clip_tokenizer(248, pad_token="!"), tmp_path)
    pipe = attach(StableDiffusionPipeline(**stable_diffusion_2.components, requires_safety_checker=False), tmp_path)
    assert f"has {LAYERS + 1} layers and the one it replaces {LAYERS}" in caplog.text
    assert pipe.text_encoder.config.num_hidden_layers == LAYERS
    ids = pipe.tokenizer(text_of(100), padding="max_length", return_tensors="pt").input_ids
    expected = whole.final_layer_norm(whole(ids, output_hidden_states=True).hidden_states[-2])
    assert torch.equal(pipe.encode_prompt(text_of(100), CPU, 1, False)[0], expected)


# Stable Diffusion 3 and Flux


def tiny_t5():
    torch.manual_seed(3)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS), ("▁", -2.0)]
    config = T5Config(
        vocab_size=len(vocab), d_model=80, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval(), T5Tokenizer(vocab=vocab, extra_ids=0)


def latent_parts(channels):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    )  # fmt: skip
    return {"vae": vae.eval(), "scheduler": FlowMatchEulerDiscreteScheduler()}


@pytest.fixture(scope="module")
def stable_diffusion_3():
    parts = latent_parts(4)
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=80, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8,
    )  # fmt: skip
    text_encoder_3, tokenizer_3 = tiny_t5()
    pipe = StableDiffusion3Pipeline(
        **parts,
        transformer=transformer.eval(),
        text_encoder=tiny_text_encoder(1, projection=True),
        text_encoder_2=tiny_text_encoder(2, projection=True),
        text_encoder_3=text_encoder_3,
        tokenizer=clip_tokenizer(77),
        tokenizer_2=clip_tokenizer(77, pad_token="!"),
        tokenizer_3=tokenizer_3,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def flux():
    parts = latent_parts(1)
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=80, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    text_encoder_2, tokenizer_2 = tiny_t5()
    pipe = FluxPipeline(
        **parts,
        transformer=transformer.eval(),
        text_encoder=tiny_text_encoder(1),
        text_encoder_2=text_encoder_2,
        tokenizer=clip_tokenizer(77),
        tokenizer_2=tokenizer_2,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SMALL = {"height": 16, "width": 16, "max_sequence_length": 32}


@pytest.mark.parametrize("t5", [True, False], ids=["t5", "no_t5"])
def test_stable_diffusion_3(stable_diffusion_3, endings, text_of, t5):
    """T5 is cut behind 32 tokens here, so that what changes after token 77 comes through CLIP."""
    parts = stable_diffusion_3.components if t5 else {**stable_diffusion_3.components, "text_encoder_3": None}
    stock = StableDiffusion3Pipeline(**parts)
    attached = attach(StableDiffusion3Pipeline(**parts), long_prompt="stretch")
    for pipe in (stock, attached):
        pipe.set_progress_bar_config(disable=True)
    assert torch.equal(pixels(stock, endings[0], **SMALL), pixels(stock, endings[1], **SMALL))
    first, second = (pixels(attached, prompt, **SMALL) for prompt in endings)
    assert not torch.equal(first, second)
    assert attached.text_encoder_3 is parts["text_encoder_3"]
    assert attached.tokenizer_3 is parts["tokenizer_3"]
    assert (stock.tokenizer_max_length, stock.tokenizer.model_max_length) == (77, 77)

    def encode(pipe, prompt):
        return pipe.encode_prompt(prompt, None, None, CPU, do_classifier_free_guidance=False, max_sequence_length=32)

    states, stock_states = (encode(pipe, text_of(20))[0] for pipe in (attached, stock))
    assert states.shape == (1, 248 + 32, 80)  # CLIP's beside each other, T5's or zeros behind them
    assert stock_states.shape == (1, 77 + 32, 80)
    torch.testing.assert_close(states[:, :21], stock_states[:, :21], rtol=0, atol=2e-5)  # as for SD 2
    assert torch.equal(states[:, 248:], stock_states[:, 77:])
    long, long_pooled = (encode(attached, endings[0])[i] for i in (0, 2))
    other, other_pooled = (encode(attached, endings[1])[i] for i in (0, 2))
    moved = (long != other).any(dim=-1)[0]
    assert moved.nonzero().min() == 102  # the start token and 101 more are the same
    assert not torch.equal(long_pooled, other_pooled)


def test_flux(flux, endings, text_of):
    """CLIP gives Flux the pooled vector alone; the states are T5's and stay to the bit."""
    stock, attached = FluxPipeline(**flux.components), attach(FluxPipeline(**flux.components), long_prompt="stretch")
    for pipe in (stock, attached):
        pipe.set_progress_bar_config(disable=True)
    assert torch.equal(pixels(stock, endings[0], **SMALL), pixels(stock, endings[1], **SMALL))
    assert not torch.equal(pixels(attached, endings[0], **SMALL), pixels(attached, endings[1], **SMALL))
    assert (attached.text_encoder_2, attached.tokenizer_2) == (flux.text_encoder_2, flux.tokenizer_2)
    states, pooled, _ = attached.encode_prompt(endings[0], max_sequence_length=32)
    assert torch.equal(states, stock.encode_prompt(endings[0], max_sequence_length=32)[0])
    ids = attached.tokenizer(endings[0], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(pooled, attached.text_encoder(ids).pooler_output)
    (short, _), (stock_short, _) = (pipe.encode_prompt(text_of(19))[1::-1] for pipe in (attached, stock))
    torch.testing.assert_close(short, stock_short, rtol=0, atol=2e-5)  # its end token is at position 20


@pytest.mark.parametrize(
    ("model", "other"), [("stable_diffusion_3", StableDiffusion3Img2ImgPipeline), ("flux", FluxImg2ImgPipeline)]
)
def test_other_pipelines_of_sd3_and_flux(request, model, other, endings):
    stock = request.getfixturevalue(model)
    attached = attach(type(stock)(**stock.components), long_prompt="stretch")
    call = {"image": Image.new("RGB", (16, 16), "gray"), "strength": 1.0, **SMALL}
    direct, piped = attach(other(**stock.components), long_prompt="stretch"), other.from_pipe(attached)
    for pipe in (direct, piped):
        pipe.set_progress_bar_config(disable=True)
        assert (pipe.tokenizer_max_length, pipe.tokenizer.model_max_length) == (248, 248)
    first, second = (pixels(piped, prompt, **call) for prompt in endings)
    assert not torch.equal(first, second)
    assert torch.equal(first, pixels(direct, endings[0], **call))


def test_a_trained_encoder_in_sd3_brings_its_projection(stable_diffusion_3, tmp_path):
    trained = tiny_text_encoder(7, positions=248, projection=True)
    save_text_encoder(trained, clip_tokenizer(248), tmp_path / "whole")
    pipe = attach(StableDiffusion3Pipeline(**stable_diffusion_3.components), tmp_path / "whole")
    assert torch.equal(pipe.text_encoder.text_projection.weight, trained.text_projection.weight)
    save_text_encoder(tiny_text_encoder(7, positions=248), clip_tokenizer(248), tmp_path / "without")
    with pytest.raises(ValueError, match="projection"):
        attach(StableDiffusion3Pipeline(**stable_diffusion_3.components), tmp_path / "without")


# What attach refuses


def test_pipelines_that_do_not_read_through_clip():
    t5, tokenizer = tiny_t5()
    pixart = PixArtAlphaPipeline(tokenizer, t5, tiny_vae(0), None, tiny_scheduler())
    with pytest.raises(ValueError, match=r"PixArtAlphaPipeline .* \(T5EncoderModel\).* CLIP text encoders"):
        attach(pixart)


def test_pipelines_with_a_language_model():
    """HunyuanVideo cuts what CLIP reads at 77 tokens, whatever its tokenizer says: attach would change nothing."""
    torch.manual_seed(0)
    llama = LlamaModel(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                   num_attention_heads=1, num_key_value_heads=1))  # fmt: skip
    pipe = HunyuanVideoPipeline(
        llama, None, None, None, FlowMatchEulerDiscreteScheduler(), tiny_text_encoder(1), clip_tokenizer(77)
    )
    with pytest.raises(ValueError, match=r"text_encoder \(LlamaModel\), text_encoder_2 \(CLIPTextModel\)"):
        attach(pipe)


def test_a_prior_with_a_fixed_number_of_places():
    torch.manual_seed(0)
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=WIDTH)
    pipe = KandinskyV22PriorPipeline(
        prior, None, tiny_text_encoder(1, projection=True), clip_tokenizer(77), UnCLIPScheduler(), None
    )
    with pytest.raises(ValueError, match="KandinskyV22PriorPipeline .* a UNet or transformer"):
        attach(pipe)


def test_without_an_encoder(stock):
    without = StableDiffusionPipeline(**{**stock.components, "text_encoder": None}, requires_safety_checker=False)
    with pytest.raises(ValueError, match="no text encoder.* CLIP text encoders"):
        attach(without)


def test_a_wrong_width_leaves_the_pipeline_as_it_is(stock, flux, tmp_path):
    save_text_encoder(tiny_text_encoder(1, width=WIDTH // 2, positions=248), clip_tokenizer(248), tmp_path)
    for pipe in (stock, FluxPipeline(**flux.components)):
        with pytest.raises(ValueError, match=r"16 wide.* 32"):
            attach(pipe, tmp_path)
        assert pipe.tokenizer.model_max_length == 77  # nothing half done


def test_encoders_of_two_lengths(stock_xl, tmp_path):
    save_text_encoder(tiny_text_encoder(1, positions=134), clip_tokenizer(134), tmp_path)
    pipe = StableDiffusionXLPipeline(**stock_xl.components, add_watermarker=False)
    with pytest.raises(ValueError, match="134 and 248 tokens.* give a long encoder of 248"):
        attach(pipe, tmp_path, max_length=134)
    assert pipe.tokenizer.model_max_length == 77


def test_offloading_comes_after(stock):
    pipe = StableDiffusionImg2ImgPipeline(**copy.deepcopy(stock.components), requires_safety_checker=False)
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="attach first"):
        attach(pipe, long_prompt="stretch")
