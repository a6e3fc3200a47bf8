"""The bundled world: deterministic, disjoint splits, captions that state every fact, a reader that is right."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from finelip_diffusion.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    SIZE_WORDS,
    SIZES,
    Caption,
    Object,
    Scene,
    advice,
    alterations,
    describe,
    read,
    render,
    repainted,
    sample_scene,
    vary,
)


def test_scenes_are_functions_of_their_seed() -> None:
    assert sample_scene(7) == sample_scene(7)
    assert len({sample_scene(seed) for seed in range(200)}) == 200
    assert str(describe(sample_scene(7), 3)) == str(describe(sample_scene(7), 3))
    assert describe(sample_scene(7), 3) != describe(sample_scene(7), 4)


def test_splits_share_no_scene() -> None:
    for seed in range(300):
        assert sample_scene(seed, "train", (1, 9)).split == "train"
        assert sample_scene(seed, "test", (1, 9)).split == "test"
        assert vary(sample_scene(seed, "train", (1, 2)), "alter", seed).split == "train"


def test_number_of_objects_spans_the_range_asked_for() -> None:
    counts = {len(sample_scene(seed).objects) for seed in range(200)}
    assert counts == set(range(4, 10))
    assert {len(sample_scene(seed, num_objects=(1, 1)).objects) for seed in range(20)} == {1}


@pytest.mark.parametrize(("arguments", "words"), [(("dev",), "'train' or 'test'"), (("train", (0, 3)), "1 to 9")])
def test_bad_samples_are_refused_in_a_sentence(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sample_scene(0, *arguments)


def test_near_duplicates_change_what_they_say() -> None:
    scene = sample_scene(5, num_objects=(6, 6))
    moved, exchanged = vary(scene, "move", 1), vary(scene, "exchange", 1)
    looks = [(item.shape, item.colour, item.size) for item in scene.objects]
    assert sorted((item.shape, item.colour, item.size) for item in moved.objects) == sorted(looks)
    assert moved != scene
    assert [item.cell for item in exchanged.objects] == [item.cell for item in scene.objects]
    for attribute in ("shape", "colour", "size"):
        before, after = (sorted(getattr(item, attribute) for item in s.objects) for s in (scene, exchanged))
        assert before == after
    with pytest.raises(ValueError, match="'swap'"):
        vary(scene, "swap", 0)


@pytest.mark.parametrize("kind", ["move", "exchange", "alter"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_near_duplicate_is_another_scene_of_the_split(kind: str, split: str) -> None:
    """Of one object, too, which may have no neighbor in the test split; and of twins, which cannot be exchanged."""
    scenes = [sample_scene(seed, split, (1, 9)) for seed in range(60)]
    pairs = combinations(range(9), 2)
    twins = [Scene("mint", tuple(Object(cell, "star", "red", "small") for cell in pair)) for pair in pairs]
    scenes += (found := [scene for scene in twins if scene.split == split][:3])
    assert found
    for seed, scene in enumerate(scenes):
        other = vary(scene, kind, seed)
        assert other != scene and other.split == split and other == vary(scene, kind, seed)


def test_an_altered_scene_differs_in_one_attribute_where_the_split_has_one() -> None:
    def changes(one: Scene, other: Scene) -> int:
        pairs = zip(one.objects, other.objects, strict=True)
        return sum(getattr(before, name) != getattr(after, name) for before, after in pairs for name in ATTRIBUTES)

    alone = 0
    for seed in range(40):
        scene = sample_scene(seed, "test", (1, 9))
        other = vary(scene, "alter", seed)
        cells = [item.cell for item in scene.objects]
        assert [item.cell for item in other.objects] == cells
        near = (each for each in alterations(scene, scene.objects) if each.split == "test")
        near = (each for each in near if [item.cell for item in each.objects] == cells)  # nothing was moved
        has_one = any(changes(scene, each) == 1 for each in near)
        alone += not has_one
        assert changes(scene, other) == (1 if has_one else 2)
    assert 0 < alone < 20  # both happen


def test_captions_state_every_object_once_in_words() -> None:
    for seed in range(200):
        scene = sample_scene(seed, num_objects=(1, 9))
        caption = describe(scene, seed)
        assert isinstance(caption, Caption)
        assert sorted(fact.object for fact in caption.facts) == list(scene.objects)
        assert scene.background in caption.split(".")[0]
        for fact in caption.facts:
            words = caption[fact.start : fact.end]
            assert fact.object.colour in words
            assert fact.object.shape in words
            assert any(word in words for word in SIZE_WORDS[fact.object.size])
            assert " a orange" not in words


def test_near_duplicates_can_be_told_in_the_same_words() -> None:
    scene = sample_scene(5, num_objects=(6, 6))
    caption = describe(scene, 3)
    assert describe(scene, 3, like=scene) == caption
    for item in scene.objects:
        (free, *_) = set(range(9)) - {other.cell for other in scene.objects}
        for change in ({"size": "large" if item.size == "small" else "small"}, {"cell": free}):
            objects = [replace(item, **change) if other == item else other for other in scene.objects]
            other = Scene(scene.background, tuple(sorted(objects)))
            told = describe(other, 3, like=scene)
            assert sorted(fact.object for fact in told.facts) == list(other.objects)
            changed = [one != two for one, two in zip(caption.split(". "), told.split(". "), strict=True)]
            assert sum(changed) == 1
            assert changed.index(True) == 1 + [fact.object for fact in caption.facts].index(item)
    with pytest.raises(ValueError, match="A scene of 6 objects cannot be told like one of 5"):
        describe(scene, 3, like=sample_scene(5, num_objects=(5, 5)))


def test_captions_are_long_and_half_of_their_facts_lie_after_token_77(tokenizer) -> None:
    lengths, behind = [], []
    for seed in range(200):
        caption = describe(sample_scene(seed), seed)
        lengths.append(len(tokenizer(str(caption)).input_ids) - 2)
        behind += [len(tokenizer(caption[: fact.end]).input_ids) - 2 > 75 for fact in caption.facts]
    assert min(lengths) >= 60
    assert max(lengths) <= 240
    assert 0.4 < np.mean(behind) < 0.6


def test_every_object_on_every_background_is_read_back() -> None:
    """All 384 cells that can be drawn, in the middle of the picture."""
    for background in BACKGROUNDS:
        for shape in SHAPES:
            for colour in COLOURS:
                for size in SIZES:
                    scene = Scene(background, (Object(4, shape, colour, size),))
                    assert read(render(scene)) == scene


def test_the_reader_is_right_on_rendered_scenes_and_stands_noise_and_blur() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(seed, "test", (1, 9)) for seed in range(300)]
    noisy = 0
    for scene in scenes:
        image = render(scene)
        assert read(image) == scene
        soft = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float32) / 255
        noisy += read(np.clip(soft + rng.normal(0, 0.05, soft.shape), 0, 1)) == scene
    assert noisy >= 0.99 * len(scenes)


def test_another_style_exchanges_every_color_and_back() -> None:
    for seed in range(20):
        scene = sample_scene(seed, num_objects=(1, 9))
        painted = repainted(scene)
        assert painted.background != scene.background
        for told, shown in zip(scene.objects, painted.objects, strict=True):
            assert (told.cell, told.shape, told.size) == (shown.cell, shown.shape, shown.size)
            assert told.colour != shown.colour
        assert repainted(read(render(painted)), back=True) == scene


def test_the_reader_sees_nothing_in_noise_and_refuses_other_sizes() -> None:
    noise = np.random.default_rng(0).random((IMAGE_SIZE, IMAGE_SIZE, 3))
    assert read(noise).objects == ()
    with pytest.raises(ValueError, match=rf"{IMAGE_SIZE} x {IMAGE_SIZE} pixels, not an array of \(64, 64, 3\)"):
        read(Image.new("RGB", (64, 64)))


def test_a_prompt_about_something_else_is_answered_with_what_can_be_drawn() -> None:
    sentence = advice("a witch in a forest")
    assert sentence is not None
    assert sentence.count(".") == 1 and "crosses" in sentence and "purple" in sentence and "mint" in sentence
    for prompt in ("Two BOXES and a dot", "a rhombus", "draw some stars!", str(describe(sample_scene(0)))):
        assert advice(prompt) is None
