"""Textual inversion, DreamBooth and compel on the long pipelines, against diffusers' own, at tiny size."""

import copy

import pytest
import torch
from compel import Compel, CompelForSD, CompelForSDXL, ReturnedEmbeddingsType
from own_pipelines import embed, pixels, with_own_tokenizers
from tiny_models import WIDTH
from torch import Tensor
from transformers import CLIPTextModel

from finelip_diffusion import FineLIPStableDiffusionPipeline, attach
from finelip_diffusion.prompts import LONG_PROMPTS


def vectors(count: int, seed: int = 0) -> Tensor:
    found = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) * 5
    return found[0] if count == 1 else found


def test_textual_inversions_in_both_prompts_through_both_encoders(stock, pipe, text_of):
    with_own_tokenizers(stock)
    with_own_tokenizers(pipe)
    plain = pixels(pipe, text_of(90))
    for each in (stock, pipe):
        each.load_textual_inversion({"<toy>": vectors(3)})
        each.load_textual_inversion(vectors(1, seed=1), token="<bad>")
    prompt, negative = "a red <toy> under a tree", "<bad>, dull, <toy>"
    ours = pixels(pipe, prompt, negative_prompt=negative, long_prompt="truncate")
    assert torch.equal(ours, pixels(stock, prompt, negative_prompt=negative))
    counts = {pipe.describe_prompt(prompt, how).tokens for how in LONG_PROMPTS}
    assert counts == {8}  # three of them are the toy's
    # windows of 248 and of 77 tokens
    states = embed(pipe, prompt, negative), embed(stock, prompt, negative)
    for long, short in zip(*states, strict=True):
        torch.testing.assert_close(long[:, :21], short[:, :21], rtol=0, atol=5e-5)
    for how in LONG_PROMPTS:  # after token 77, and alone in the negative prompt
        behind = text_of(100) + " <toy>"
        counts = how != "truncate"
        one, other = (pixels(pipe, each, long_prompt=how) for each in (behind, text_of(100) + " toy"))
        assert torch.equal(one, other) != counts
        one, other = (pixels(pipe, "a cat", negative_prompt=each, long_prompt=how) for each in ("<bad>", "bad"))
        assert not torch.equal(one, other)
    assert torch.equal(pixels(pipe, text_of(90)), plain)  # prompts without them read as before


def test_unloading_textual_inversions_undoes_them_in_both_encoders(pipe, text_of, tmp_path):
    with_own_tokenizers(pipe)
    both = [(pipe.text_encoder, pipe.tokenizer), (pipe.stock_text_encoder, pipe.stock_tokenizer)]
    before = {how: pixels(pipe, text_of(90), long_prompt=how) for how in ("stretch", "chunk")}
    spelled = pipe.tokenizer("a <toy>").input_ids
    pipe.load_textual_inversion({"<toy>": vectors(2)})
    pipe.load_textual_inversion({"<bad>": vectors(1, seed=1)})
    pipe.unload_textual_inversion(["<toy>", "<toy>_1"])
    for encoder, tokenizer in both:
        assert tokenizer("a <toy>").input_ids == spelled
        token = tokenizer("<bad>").input_ids[1]
        assert token == 49408  # the first behind the vocabulary
        assert torch.equal(encoder.get_input_embeddings().weight[token], vectors(1, seed=1))
    pipe.unload_textual_inversion()
    for encoder, tokenizer in both:
        assert len(tokenizer) == encoder.get_input_embeddings().num_embeddings == encoder.config.vocab_size == 49408
    assert (pipe.tokenizer.model_max_length, pipe.stock_tokenizer.model_max_length) == (248, 77)
    for how, image in before.items():
        assert torch.equal(pixels(pipe, text_of(90), long_prompt=how), image)
    pipe.text_encoder.save_pretrained(tmp_path)
    assert CLIPTextModel.from_pretrained(tmp_path).config.max_position_embeddings == 248


def test_diffusers_still_leaves_the_vocabulary_enlarged(stock):
    """Where this fails, diffusers has fixed it: the pipelines need not set `vocab_size` after unloading."""
    with_own_tokenizers(stock)
    stock.load_textual_inversion({"<toy>": vectors(2)})
    stock.unload_textual_inversion()
    assert stock.text_encoder.config.vocab_size == 49410


def test_textual_inversions_of_sdxl_have_a_part_for_each_encoder(stock_xl, pipe_xl, text_of):
    with_own_tokenizers(stock_xl)
    with_own_tokenizers(pipe_xl)
    embeddings = {"clip_l": vectors(2), "clip_g": vectors(2, seed=1)}
    tokens = ["<s0>", "<s1>"]
    before = pixels(pipe_xl, text_of(90))
    for each in (stock_xl, pipe_xl):
        each.load_textual_inversion(
            embeddings["clip_l"], token=tokens, text_encoder=each.text_encoder, tokenizer=each.tokenizer
        )
        each.load_textual_inversion(  # in the order of diffusers' signature
            embeddings["clip_g"], tokens, each.tokenizer_2, each.text_encoder_2
        )
    prompt, negative = "a <s0><s1> under a tree", "<s1>"
    ours = pixels(pipe_xl, prompt, negative_prompt=negative, long_prompt="truncate")
    assert torch.equal(ours, pixels(stock_xl, prompt, negative_prompt=negative))
    assert not torch.equal(pixels(pipe_xl, prompt), pixels(pipe_xl, "a cat under a tree"))
    tables = [
        getattr(pipe_xl, f"{stock}text_encoder{place}").get_input_embeddings().weight
        for place in ("", "_2")
        for stock in ("", "stock_")
    ]
    for table, part in zip(tables, ("clip_l", "clip_l", "clip_g", "clip_g"), strict=True):
        assert torch.equal(table[-2:], embeddings[part])
    pipe_xl.unload_textual_inversion(tokens)  # the first place, as in diffusers
    assert "<s0>" in pipe_xl.tokenizer_2.get_vocab()
    assert "<s0>" in pipe_xl.stock_tokenizer_2.get_vocab()
    pipe_xl.unload_textual_inversion(tokens, pipe_xl.tokenizer_2, pipe_xl.text_encoder_2)
    for name, part in pipe_xl.components.items():
        assert "tokenizer" not in name or len(part) == 49408, name
    assert torch.equal(pixels(pipe_xl, text_of(90)), before)


def test_textual_inversions_that_are_there_already_come_along(stock, finelip_folder):
    with_own_tokenizers(stock)
    stock.load_textual_inversion({"<toy>": vectors(2)})
    long = attach(copy.copy(stock), finelip_folder)
    ours = FineLIPStableDiffusionPipeline.from_pipe(stock, finelip=finelip_folder)
    for each in (long, ours):
        ids = each.tokenizer("<toy> <toy>_1").input_ids[1:-1]
        assert torch.equal(each.text_encoder.get_input_embeddings().weight[ids], vectors(2))
        assert each.text_encoder.config.vocab_size == len(each.tokenizer) == 49410
    assert ours.describe_prompt("a <toy>").tokens == 3
    assert torch.equal(embed(ours, "a <toy>", long_prompt="truncate")[0], embed(stock, "a <toy>")[0])
    assert torch.equal(embed(ours, "a <toy>")[0], embed(long, "a <toy>")[0])


def test_a_dreambooth_model_is_a_base_like_any_other(stock, pipe, tmp_path):
    """Its identifier is an ordinary rare token, and what was learned of it is in the weights, which are stretched."""
    torch.manual_seed(0)
    for parameter in stock.text_encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    stock.save_pretrained(tmp_path)
    tuned = FineLIPStableDiffusionPipeline.from_pretrained(tmp_path, long_prompt="stretch")
    tuned.set_progress_bar_config(disable=True)
    prompt = "a photo of sks dog"
    assert tuned.tokenizer(prompt).input_ids == tuned.stock_tokenizer(prompt).input_ids
    assert len(tuned.tokenizer("sks").input_ids) == 3  # with start and end
    # weights in a mapped file lie at other addresses, and the kernels for them may round the last bit otherwise
    torch.testing.assert_close(pixels(tuned, prompt, long_prompt="truncate"), pixels(stock, prompt), rtol=0, atol=1e-5)
    expected = embed(stock, prompt)[0][:, :21]
    # windows of 248 and of 77 tokens
    torch.testing.assert_close(embed(tuned, prompt)[0][:, :21], expected, rtol=0, atol=5e-5)
    assert not torch.allclose(embed(pipe, prompt)[0][:, :21], expected, atol=0.1)


@pytest.mark.parametrize("count", [0, 20, 246])
def test_compel_reads_the_long_window(pipe, text_of, count):
    prompt, negative = text_of(count), "dull, grey"
    compel = Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, truncate_long_prompts=False)
    states, negative_states = embed(pipe, prompt, negative)
    assert torch.equal(compel(prompt), states)
    image = pixels(pipe, prompt_embeds=compel(prompt), negative_prompt_embeds=compel(negative))
    assert torch.equal(image, pixels(pipe, prompt, negative_prompt=negative))
    if count == 20:
        assert not torch.equal(compel(f"({prompt})1.3"), states)
    both = CompelForSD(pipe)(prompt, negative_prompt=negative)
    torch.testing.assert_close(both.embeds, states, rtol=0, atol=2e-5)  # a batch of two against one
    torch.testing.assert_close(both.negative_embeds, negative_states, rtol=0, atol=2e-5)


def test_compel_goes_on_in_further_long_windows(pipe, text_of):
    compel = Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, truncate_long_prompts=False)
    assert compel(text_of(400)).shape == (1, 496, WIDTH)
    states, negative = compel.pad_conditioning_tensors_to_same_length([compel(text_of(400)), compel("dull")])
    assert torch.isfinite(pixels(pipe, prompt_embeds=states, negative_prompt_embeds=negative)).all()
    short = pixels(pipe, prompt_embeds=compel("a cat"), negative_prompt=text_of(400))  # ours fills up by itself
    assert torch.isfinite(short).all()


def test_compel_on_both_encoders_of_sdxl(pipe_xl, text_of):
    prompt, negative = text_of(200), "dull, grey"
    states, negative_states, pooled, _ = embed(pipe_xl, prompt, negative)
    found = CompelForSDXL(pipe_xl)(prompt, negative_prompt=negative)
    torch.testing.assert_close(found.embeds, states, rtol=0, atol=5e-5)  # a batch of two against one
    torch.testing.assert_close(found.negative_embeds, negative_states, rtol=0, atol=5e-5)
    torch.testing.assert_close(found.pooled_embeds, pooled, rtol=0, atol=5e-5)
    image = pixels(
        pipe_xl,
        prompt_embeds=found.embeds,
        pooled_prompt_embeds=found.pooled_embeds,
        negative_prompt_embeds=found.negative_embeds,
        negative_pooled_prompt_embeds=found.negative_pooled_embeds,
    )
    torch.testing.assert_close(image, pixels(pipe_xl, prompt, negative_prompt=negative), rtol=0, atol=1e-4)
    by_hand = Compel(
        tokenizer=[pipe_xl.tokenizer, pipe_xl.tokenizer_2],
        text_encoder=[pipe_xl.text_encoder, pipe_xl.text_encoder_2],
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        requires_pooled=[False, True],
        truncate_long_prompts=False,
    )
    assert torch.equal(by_hand(prompt)[0], states)
