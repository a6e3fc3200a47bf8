"""Ranks against a plain loop, galleries against the model alone, and scenes that only late text tells apart."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTokenizer

from finelip_diffusion.data.datasets import Example
from finelip_diffusion.data.sources import Skip
from finelip_diffusion.evaluation import gallery as gallery_module
from finelip_diffusion.evaluation import retrieval
from finelip_diffusion.evaluation.retrieval import (
    embed_gallery,
    evaluate,
    gallery_scores,
    himo_at_k,
    ranks,
    scenes_gallery,
)
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.model import FineLIPConfig, FineLIPModel
from finelip_diffusion.scenes import describe, render, sample_scene


@pytest.fixture(scope="module")
def scenes_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(BUNDLED_MODEL / "tokenizer")


@pytest.fixture(scope="module")
def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def make_model(scenes_tokenizer: CLIPTokenizer) -> Callable[..., FineLIPModel]:
    def make(positions: int = 248, refine: bool = True) -> FineLIPModel:
        torch.manual_seed(0)
        tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = tower | {
            "vocab_size": len(scenes_tokenizer),
            "max_position_embeddings": positions,
            "bos_token_id": scenes_tokenizer.bos_token_id,
            "eos_token_id": scenes_tokenizer.eos_token_id,
        }
        vision = tower | {"image_size": 32, "patch_size": 8}
        clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12, initializer_factor=5.0)
        return FineLIPModel(FineLIPConfig(clip, refine_image=refine, refine_text=refine)).eval()

    return make


@pytest.fixture(scope="module")
def model(make_model: Callable[..., FineLIPModel]) -> FineLIPModel:
    return make_model()


@pytest.fixture(scope="module")
def groups() -> retrieval.SceneGallery:
    return scenes_gallery(2)


def scene_examples(number: int, captions: int = 1) -> list[Example]:
    """Scenes of three to five objects, with several captions each."""
    found = []
    for seed in range(number):
        scene = sample_scene(seed, num_objects=(3, 5))
        image = render(scene)
        found += [Example(image, str(describe(scene, turn)), str(seed), f"{seed}[{turn}]") for turn in range(captions)]
    return found


# ------------------------------------------------------------------------------------------------------------ figures


def test_ranks_by_hand() -> None:
    """Two images of two captions each, and one of one; the best own caption counts."""
    scores = torch.tensor([[0.1, 0.8, 0.9, 0.2, 0.3], [0.5, 0.4, 0.4, 0.1, 0.6], [0.7, 0.7, 0.1, 0.2, 0.7]])
    right = torch.tensor([0, 0, 1, 1, 2]) == torch.arange(3)[:, None]
    assert ranks(scores, right).tolist() == [1, 3, 2]  # the second ties with one, the third with two
    assert ranks(scores.T, right.T).tolist() == [2, 0, 1, 2, 0]
    among = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    assert ranks(scores, right, among).tolist() == [0, 1, 1]


def test_ranks_equal_a_sorted_list_in_which_wrong_ones_come_first() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (40, 30), generator=generator).float()  # many ties
    right = torch.rand(40, 30, generator=generator) < 0.1
    right[:, 0] |= ~right.any(1)
    for row, own, rank in zip(scores.tolist(), right.tolist(), ranks(scores, right).tolist(), strict=True):
        order = sorted(range(30), key=lambda place: (-row[place], own[place]))
        assert rank == [own[place] for place in order].index(True)


def test_the_order_of_a_gallery_changes_no_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, right = torch.rand(20, 20, generator=generator), torch.eye(20, dtype=torch.bool)
    rows, columns = torch.randperm(20, generator=generator), torch.randperm(20, generator=generator)
    moved = ranks(scores[rows][:, columns], right[rows][:, columns])
    assert torch.equal(moved, ranks(scores, right)[rows])


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_model_that_tells_nothing_apart_finds_nothing(value: float) -> None:
    assert ranks(torch.full((4, 4), value), torch.eye(4, dtype=torch.bool)).tolist() == [3, 3, 3, 3]


def test_a_better_candidate_of_no_number_is_no_hit() -> None:
    scores = torch.tensor([[1.0, float("nan"), 0.5]])
    assert ranks(scores, torch.tensor([[True, False, False]])).tolist() == [1]


def test_queries_without_an_answer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"query 1 has no right candidate"):
        ranks(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))
    with pytest.raises(ValueError, match=r"scores are \(2, 2\), but right is \(2, 3\)"):
        ranks(torch.zeros(2, 2), torch.ones(2, 3, dtype=torch.bool))


def test_himo_is_the_correlation_with_the_number_of_sentences() -> None:
    assert himo_at_k(torch.tensor([0.1, 0.2, 0.3])) == pytest.approx(1)
    assert himo_at_k(torch.tensor([0.3, 0.1])) == pytest.approx(-1)
    assert himo_at_k(torch.tensor([0.25, 0.25, 0.25])) == 0
    values = np.random.default_rng(0).random(7)
    assert himo_at_k(torch.from_numpy(values)) == pytest.approx(np.corrcoef(np.arange(7), values)[0, 1])
    with pytest.raises(ValueError, match="2 sentences or more, not 1"):
        himo_at_k(torch.tensor([0.5]))


# ------------------------------------------------------------------------------------------------------------ gallery


def test_a_gallery_scores_as_the_model_does(
    model: FineLIPModel, scenes_tokenizer: CLIPTokenizer, image_processor: CLIPImageProcessor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Block by block as at once; to float32's rounding, since batches are padded and ordered otherwise."""
    examples = scene_examples(7)
    gallery = embed_gallery(model, scenes_tokenizer, image_processor, examples, batch_size=3)
    batch = scenes_tokenizer([example.caption for example in examples], padding=True, return_tensors="pt")
    pixel_values = image_processor([example.image for example in examples], return_tensors="pt").pixel_values
    with torch.no_grad():
        output = model(pixel_values, batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(gallery_scores(gallery), output.scores(), atol=1e-5, rtol=0)
    cosines = output.image_embeds @ output.text_embeds.T
    torch.testing.assert_close(gallery_scores(gallery, global_share=1), cosines, atol=1e-5, rtol=0)
    monkeypatch.setattr(gallery_module, "BLOCK", 2)
    torch.testing.assert_close(gallery_scores(gallery, global_share=0.3), output.scores(0.3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("refine", [True, False])
def test_batches_and_order_change_nothing(
    make_model: Callable[..., FineLIPModel], scenes_tokenizer: CLIPTokenizer, image_processor: CLIPImageProcessor,
    refine: bool,
) -> None:  # fmt: skip
    """Two captions an image; ranks are compared, so that the last bits of a score do not count."""
    model, examples = make_model(refine=refine), scene_examples(6, captions=2)
    options = {"views": retrieval.VIEWS, "himo": True}
    straight = evaluate(embed_gallery(model, scenes_tokenizer, image_processor, examples, 64, **options))
    small = evaluate(embed_gallery(model, scenes_tokenizer, image_processor, examples, 5, **options))
    turned = evaluate(embed_gallery(model, scenes_tokenizer, image_processor, examples[::-1], 5, **options))
    assert (straight["images"], straight["captions"], straight["groups"]) == (6, 12, 6)
    assert straight["ranks"] == small["ranks"]
    sentences = [example.caption.count(". ") + 1 for example in examples]
    for name, found in straight["ranks"].items():
        if name.startswith("sentences/") and "text_to_image" in name:  # captions turn round, their sentences do not
            parts = torch.tensor(found).split(sentences)[::-1]
            assert torch.cat(parts).tolist() == turned["ranks"][name]
        else:
            assert found == turned["ranks"][name][::-1]
    assert straight["lengths"] == turned["lengths"][::-1]
    assert straight["figures"]["himo"]["value"] == pytest.approx(turned["figures"]["himo"]["value"], abs=1e-4)


def test_an_image_finds_any_of_its_captions(
    model: FineLIPModel, scenes_tokenizer: CLIPTokenizer, image_processor: CLIPImageProcessor
) -> None:
    """Embeddings that are put in: images along the axes, one caption of each beside them, one far away."""
    gallery = embed_gallery(model, scenes_tokenizer, image_processor, scene_examples(3, captions=2))
    axes, captions = torch.eye(12)[:3], gallery.views["whole"]
    captions.embeds[captions.rows[::2]] = axes
    captions.embeds[captions.rows[1::2]] = torch.eye(12)[5]
    gallery.image_embeds.copy_(axes)
    figures = evaluate(gallery)["figures"]
    assert figures["whole/global/image_to_text/R@1"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 3}
    assert figures["whole/global/text_to_image/R@1"]["value"] == 0.5  # the far ones tie with all
    assert figures["whole/global/text_to_image/R@5"]["n"] == 6
    assert "whole/global/image_to_text/group_R@1" not in figures


def test_examples_that_stand_in_for_unusable_ones_are_left_out(
    model: FineLIPModel, scenes_tokenizer: CLIPTokenizer, image_processor: CLIPImageProcessor
) -> None:
    first, second, third = scene_examples(3)
    stand_in = Example(third.image, third.caption, third.image_id, third.name, (Skip("b.jpg", "missing file"),))
    report = evaluate(embed_gallery(model, scenes_tokenizer, image_processor, [first, stand_in, third, second], 2))
    assert (report["images"], report["captions"]) == (3, 3)
    assert report["skipped"] == [{"name": "b.jpg", "reason": "missing file"}]


def test_views_show_the_captions_that_they_name(
    model: FineLIPModel, scenes_tokenizer: CLIPTokenizer, image_processor: CLIPImageProcessor
) -> None:
    examples = scene_examples(4)
    gallery = embed_gallery(model, scenes_tokenizer, image_processor, examples, views=retrieval.VIEWS, himo=True)

    def embedded(caption: str, length: int = 248) -> Tensor:
        row = scenes_tokenizer(caption, truncation=True, max_length=length, return_tensors="pt").input_ids
        with torch.no_grad():
            return model.encode_text(row)[0][0]

    assert list(gallery.views) == list(retrieval.VIEWS)
    for number, example in enumerate(examples):
        first, rest = example.caption.split(". ", 1)
        wanted = {
            "whole": embedded(example.caption),
            "without_first": embedded(rest),
            "first_last": embedded(f"{rest} {first}."),
            "truncated": embedded(example.caption, 77),
        }
        for view, embeds in wanted.items():
            captions = gallery.views[view]
            torch.testing.assert_close(captions.embeds[captions.rows[number]], embeds, atol=1e-5, rtol=0)
        parts = example.caption.split(". ")
        starts = [". ".join(parts[: stop + 1]) + "." * (stop + 1 < len(parts)) for stop in range(len(parts))]
        similarities = torch.stack([embedded(start) for start in starts]) @ gallery.image_embeds[number]
        torch.testing.assert_close(gallery.growing[number], similarities, atol=1e-5, rtol=0)
    cut = gallery.views["truncated"].read
    assert torch.equal(cut, gallery.lengths.clamp(max=77))
    assert 0 < gallery.views["truncated"].changed == int((gallery.lengths > 77).sum())


def test_a_view_that_changes_no_caption_is_left_out(
    model: FineLIPModel, scenes_tokenizer: CLIPTokenizer, image_processor: CLIPImageProcessor
) -> None:
    image = render(sample_scene(0))
    short = [Example(image, caption, caption, caption) for caption in ("A red circle.", "a blue star")]
    gallery = embed_gallery(model, scenes_tokenizer, image_processor, short, views=retrieval.VIEWS, himo=True)
    assert list(gallery.views) == ["whole"]
    assert "himo" not in evaluate(gallery)["figures"]


def test_bad_galleries_are_refused_in_a_sentence(
    model: FineLIPModel, scenes_tokenizer: CLIPTokenizer, image_processor: CLIPImageProcessor
) -> None:
    with pytest.raises(ValueError, match="give 'whole' and any of"):
        embed_gallery(model, scenes_tokenizer, image_processor, scene_examples(2), views=["without_first"])
    with pytest.raises(ValueError, match="has 1 images: give at least 2"):
        embed_gallery(model, scenes_tokenizer, image_processor, scene_examples(1, captions=2))


# --------------------------------------------------------------------------------------------- near-duplicate scenes


def test_groups_are_held_out_and_differ_in_one_late_attribute(
    groups: retrieval.SceneGallery, scenes_tokenizer: CLIPTokenizer
) -> None:
    assert len(groups) == 16
    for start in range(0, 16, 8):
        pairs = groups.pairs[start : start + 8]
        (scene, caption), others = pairs[0], pairs[1:]
        assert len({scene for scene, _ in pairs}) == 8
        cut = {tuple(scenes_tokenizer(str(text), truncation=True, max_length=77).input_ids) for _, text in pairs}
        assert len(cut) == 1
        for other, text in others:
            assert other.split == scene.split == "test"
            assert sorted(fact.object for fact in text.facts) == list(other.objects)
            before, after = (sorted(set(one.objects) - set(two.objects)) for one, two in
                             ((scene, other), (other, scene)))  # fmt: skip
            names = ("cell", "shape", "colour", "size")
            if len(before) == 1:
                assert sum(getattr(before[0], name) != getattr(after[0], name) for name in names) == 1
            else:  # two have changed places
                looks = [sorted((item.shape, item.colour, item.size) for item in items) for items in (before, after)]
                assert len(before) == 2
                assert looks[0] == looks[1]
            assert text != caption


def test_groups_are_functions_of_their_seed(groups: retrieval.SceneGallery) -> None:
    assert scenes_gallery(1).pairs == groups.pairs[:8]
    assert scenes_gallery(1, seed=1).pairs != groups.pairs[:8]


def test_a_reader_of_77_tokens_is_at_chance_in_a_group(
    model: FineLIPModel, scenes_tokenizer: CLIPTokenizer, image_processor: CLIPImageProcessor,
    groups: retrieval.SceneGallery,
) -> None:  # fmt: skip
    """Eight captions that read alike find the same image of eight: 1 of 8; and an image ties with all eight: none."""
    gallery = embed_gallery(model, scenes_tokenizer, image_processor, groups, views=("whole", "truncated"))
    assert gallery.groups.tolist() == [0] * 8 + [1] * 8
    assert len(gallery.views["truncated"].embeds) == 2
    report = evaluate(gallery)
    assert report["groups"] == 2
    for score in ("global", "finelip"):
        assert report["figures"][f"truncated/{score}/text_to_image/group_R@1"]["value"] == 0.125
        assert report["figures"][f"truncated/{score}/image_to_text/group_R@1"]["value"] == 0


def test_a_reader_of_everything_finds_all(
    model: FineLIPModel, scenes_tokenizer: CLIPTokenizer, image_processor: CLIPImageProcessor,
    groups: retrieval.SceneGallery,
) -> None:  # fmt: skip
    gallery = embed_gallery(model, scenes_tokenizer, image_processor, groups)
    captions = gallery.views["whole"]
    own = F.normalize(torch.randn(16, 12, generator=torch.Generator().manual_seed(0)), dim=-1)
    gallery.image_embeds.copy_(own)
    captions.embeds[captions.rows] = own
    figures = evaluate(gallery)["figures"]
    for direction in ("image_to_text", "text_to_image"):
        for figure in ("R@1", "group_R@1"):
            assert figures[f"whole/global/{direction}/{figure}"]["value"] == 1
