"""Captions in everyone's words: every family states its scene, facts know their characters, splits share no words."""

import re
from dataclasses import replace

import pytest

from finelip_diffusion.data.datasets import ScenesDataset, open_dataset
from finelip_diffusion.scenes import (
    CHANGES,
    FAMILIES,
    Caption,
    Object,
    Scene,
    arranged,
    describe,
    noise,
    read,
    render,
    sample_for,
    sample_scene,
)
from finelip_diffusion.scenes.words import SYNONYMS, UNSEEN_PLACES, UNSEEN_SYNONYMS

NAMES = [(split, name) for split, names in FAMILIES.items() for name in names]
WHOLE = [noise.lower, noise.upper, noise.unpunctuated, noise.british, noise.american]


def words_of(caption: Caption) -> list[str]:
    return [caption[fact.start : fact.end] for fact in caption.facts]


@pytest.mark.parametrize(("split", "name"), NAMES)
def test_every_family_states_every_object_once_and_knows_where(split: str, name: str) -> None:
    for seed in range(60):
        scene = sample_for(name, seed) if name == "unplaced" else sample_scene(seed, num_objects=(2, 9))
        caption = describe(scene, seed, wording=name, split=split)
        assert caption == describe(scene, seed, wording=name, split=split)
        assert caption.wording == name
        assert sorted(fact.object for fact in caption.facts) == list(scene.objects)
        assert not re.search("[\ue000-\ue0ff{}]", caption) or name == "records"
        for fact, text in zip(caption.facts, words_of(caption), strict=True):
            assert text == text.strip()
            for attribute in ("shape", "colour", "size"):
                if name not in (
                    "grouped",
                    "pairs",
                    "defaults",
                    "respective",
                ):  # there, some of the three are said before
                    names = SYNONYMS[attribute][getattr(fact.object, attribute)]
                    assert any(word in text.lower() for word in names)
    assert len({str(describe(sample_for(name, 1), seed, wording=name, split=split)) for seed in range(20)}) == 20


def test_what_is_said_of_one_object_changes_with_it() -> None:
    """A caption that said less than its scene would stay the same when the scene changes."""
    item = Object(2, "star", "red", "small")
    other = Object(6, "circle", "blue", "large")
    for split, name in NAMES:
        scene = Scene("grey", (item, other))
        changes = [{"shape": "cross"}, {"colour": "green"}, {"size": "large"}, {"cell": 0}]
        if name == "unplaced":
            scene, changes = arranged(scene), changes[:3]
            item, other = scene.objects
        told = str(describe(scene, 5, wording=name, split=split))
        for change in changes:
            assert str(describe(Scene("grey", (replace(item, **change), other)), 5, wording=name, split=split)) != told


def test_unseen_words_and_families_are_never_trained_on() -> None:
    places = [place.format(t="top", u="upper", s="left") for place in UNSEEN_PLACES]
    held_out = re.compile(r"\b(" + "|".join([*UNSEEN_SYNONYMS, *map(re.escape, places)]) + r")s?\b", re.IGNORECASE)
    found = {"train": 0, "unseen": 0}
    for split, name in NAMES:
        for seed in range(40):
            found[split] += bool(held_out.search(describe(sample_for(name, seed), seed, wording=name, split=split)))
    assert found["train"] == 0
    assert found["unseen"] > 20
    synonyms = [word for values in SYNONYMS.values() for words in values.values() for word in words[1:]]
    assert 0.08 < len(UNSEEN_SYNONYMS) / len(synonyms) < 0.15
    assert set(FAMILIES["train"]).isdisjoint(FAMILIES["unseen"])
    assert len(FAMILIES["train"]) >= 12 and len(FAMILIES["unseen"]) == 3


def test_any_wording_is_one_of_its_split() -> None:
    scene = sample_scene(3)
    for split, names in FAMILIES.items():
        told = {str(describe(scene, seed, wording="any", split=split)) for seed in range(80)}
        able = [name for name in names if name not in ("unplaced", "late")]  # objects stand elsewhere; by name alone
        by_name = {str(describe(scene, seed, wording=name, split=split)) for seed in range(80) for name in able}
        assert len(told) == 80
        assert told <= by_name


def test_late_captions_are_sentences_at_the_end_of_the_window(tokenizer) -> None:
    ends = []
    for seed in range(60):
        scene = sample_scene(seed)
        late, plain = describe(scene, seed, wording="late"), describe(scene, seed)
        assert late.endswith(plain) and len(late) > len(plain) and late.background == scene.background
        assert words_of(late) == words_of(plain)
        assert len(tokenizer(late).input_ids) <= 248
        ends += [len(tokenizer(late[: fact.end]).input_ids) - 1 for fact in late.facts]
    assert sum(end > 190 for end in ends) > 0.1 * len(ends)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"wording": "poem"}, "'poem' is not one of the split 'train': choose any, sentences, casual"),
        ({"wording": "story"}, "'story' is not one of the split 'train'"),
        ({"split": "test"}, "'train' or 'unseen', not 'test'"),
        ({"wording": "rows", "like": sample_scene(0)}, "'sentences' alone can tell a scene like another, not 'rows'"),
    ],
)
def test_bad_wordings_are_refused_in_a_sentence(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        describe(sample_scene(0), **options)


def test_captions_take_20_to_240_tokens(tokenizer) -> None:
    for split, name in NAMES:
        scenes = [sample_for(name, seed) for seed in range(100)]
        told = [describe(scene, seed, wording=name, split=split, noise=True) for seed, scene in enumerate(scenes)]
        texts = [str(caption) for caption in told]
        lengths = [len(row) - 2 for row in tokenizer(texts).input_ids]
        assert min(lengths) >= (3 if name == "unplaced" else 20)
        assert sum(length > 246 for length in lengths) <= 2  # a 248-token encoder's start and end tokens aside


# --------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("change", WHOLE)
def test_changes_of_the_whole_text_keep_each_facts_words(change) -> None:
    for seed in range(60):
        caption = describe(sample_scene(seed), seed, wording="any")
        changed = change(caption)
        assert (changed.background, changed.wording) == (caption.background, caption.wording)
        assert [fact.object for fact in changed.facts] == [fact.object for fact in caption.facts]
        for before, after in zip(words_of(caption), words_of(changed), strict=True):
            alone = Caption(before)
            assert after.split() == str(change(alone)).split()
    texts = [describe(sample_scene(seed), seed, wording="any") for seed in range(60)]
    assert any(change(text) != text for text in texts)


def test_typos_are_one_a_word_and_facts_move_with_them() -> None:
    caption = describe(sample_scene(4), 4, wording="prose")
    typed = noise.misspelled(caption, 1, 1.0)
    assert typed == noise.misspelled(caption, 1, 1.0) != noise.misspelled(caption, 2, 1.0)
    pairs = list(zip(re.findall(r"[A-Za-z]+", caption), re.findall(r"[A-Za-z]+", typed), strict=True))
    for before, after in pairs:
        assert before[0] == after[0]
        assert abs(len(before) - len(after)) <= 1
        assert before == after or len(before) >= 4
    assert sum(before != after for before, after in pairs) > 0.8 * sum(len(before) >= 4 for before, _ in pairs)
    for before, after in zip(words_of(caption), words_of(typed), strict=True):
        assert len(before.split()) == len(after.split())
        assert before[0] == after[0]
    assert noise.misspelled(caption, 1, 0.0) == caption


def test_spelling_goes_there_and_back() -> None:
    caption = Caption("A Gray color, centered: gray-colored.")
    assert noise.british(caption) == "A Grey colour, centred: grey-coloured."
    assert noise.american(noise.british(caption)) == caption


def test_some_captions_stay_as_they_are_and_some_change_in_every_way() -> None:
    captions = [describe(sample_scene(seed), seed, wording="joined") for seed in range(300)]
    changed = [noise.disturbed(caption, seed) for seed, caption in enumerate(captions)]
    same = sum(one == other for one, other in zip(captions, changed, strict=True)) / 300
    assert 0.4 < same < 0.6  # 0.4, and those whose dice change nothing
    assert 0.18 < sum(text.islower() for text in changed) / 300 < 0.36
    assert any(text.isupper() for text in changed)
    assert any("," not in text for text in changed)


# ------------------------------------------------------------------------------------------------- what training reads


def test_training_draws_a_wording_of_its_own_each_time() -> None:
    dataset = open_dataset("scenes:all", num_scenes=16)
    assert isinstance(dataset, ScenesDataset)
    captions = {dataset[3, draw].caption for draw in range(40)}
    assert len(captions) == 40
    assert dataset[3, 7] == dataset[3, 7]
    assert dataset[3].image_id == open_dataset("scenes", num_scenes=16)[3].image_id
    assert dataset[3].image == open_dataset("scenes", num_scenes=16)[3].image


def test_several_wordings_take_turns_and_other_words_tell_the_same_pictures() -> None:
    dataset = ScenesDataset(num_scenes=64, wording="all,rows", group_size=1)
    plain = {index: {describe(dataset.scene(index), draw, wording="rows") for draw in range(30)} for index in (0, 5)}
    for index, told in plain.items():
        rows = sum(dataset[index, draw].caption in told for draw in range(30))
        assert 5 < rows < 25
    other = dataset.retold("sentences")
    for index in range(64):
        assert other[index, 3].image_id == dataset[index, 3].image_id
        plain, said = describe(dataset.scene(index), 3), dataset._told(index, 3).background
        assert other[index, 3].caption == (plain if said else str(plain)[plain.facts[0].start :])  # no opening
        assert said in (None, dataset.scene(index).background)
    assert dataset[0, 1].caption != other[0, 1].caption
    unsaid = sum(dataset._told(index, 3).background is None for index in range(64))
    assert 3 < unsaid < 30


def test_a_caption_without_places_is_told_only_of_a_scene_that_stands_as_it_means() -> None:
    said = [(count, sample_for("unplaced", seed, split)) for count, split in ((0, "train"), (1, "test"))
            for seed in range(60)]  # fmt: skip
    for number, scene in said:
        assert arranged(scene) == scene and scene.split == ("train", "test")[number]
        assert read(render(scene)) == scene
    assert {len(scene.objects) for _, scene in said} == {1, 2, 3, 4, 5}
    alone = arranged(Scene("pink", (Object(7, "star", "red", "small"),)))
    assert alone.objects[0].cell == 4
    assert describe(alone, 1, wording="unplaced").facts[0].object.cell == 4
    many = sample_scene(0, num_objects=(6, 9))
    assert arranged(many) == many
    for scene in (many, Scene("pink", (Object(7, "star", "red", "small"),))):
        with pytest.raises(ValueError, match="one to five objects"):
            describe(scene, wording="unplaced")
    chosen = [describe(alone, seed, wording="any") == describe(alone, seed, wording="unplaced") for seed in range(60)]
    assert 10 < sum(chosen) < 40
    dataset = ScenesDataset(num_scenes=400, wording="all", group_size=1)
    share = sum(dataset.scene(index) == sample_for("unplaced", index) for index in range(400)) / 400
    assert 0.18 < share < 0.32
    with pytest.raises(ValueError, match="'unplaced' needs scenes of its own"):
        ScenesDataset(wording="all,unplaced")
    grouped = ScenesDataset(num_scenes=16, wording="unplaced")
    assert all(arranged(grouped.scene(index)) == grouped.scene(index) for index in range(16))
    assert len({grouped[index].image_id for index in range(16)}) > 8


def test_plain_scenes_are_told_in_sentences_and_a_family_by_its_name() -> None:
    plain, rows, unseen = (ScenesDataset(num_scenes=8, wording=name) for name in ("sentences", "rows", "story"))
    assert plain[0, 5].caption == open_dataset("scenes", num_scenes=8)[0, 5].caption
    scene = plain._base(0)[1]
    assert plain[0, 5].image == render(scene)
    assert plain[0, 5].caption == describe(scene, 5)
    assert rows[0, 5].caption == describe(scene, 5, wording="rows")
    assert unseen[0, 5].caption == describe(scene, 5, wording="story", split="unseen")
    with pytest.raises(ValueError, match="'poem' is not one of the split 'train'"):
        open_dataset("scenes:poem")


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_keeps_the_objects_and_knows_their_words(name: str) -> None:
    differ = 0
    for seed in range(20):
        scene = sample_scene(seed, "test")
        plain, caption = CHANGES["as it is"](scene, seed), CHANGES[name](scene, seed)
        assert plain == describe(scene, seed)
        assert sorted(fact.object for fact in caption.facts) == list(scene.objects)
        differ += caption != plain
        if name in ("order", "fillers", "list"):
            words = {fact.object: text for fact, text in zip(plain.facts, words_of(plain), strict=True)}
            assert [words[fact.object] for fact in caption.facts] == words_of(caption)
    assert differ == 0 if name == "as it is" else differ >= 10
