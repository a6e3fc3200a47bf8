"""Edits of captions: what each rule makes of a sentence, where edits stand, and how a batch draws them."""

import io
import json
import tarfile
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from finelip_diffusion.data.batches import Collator, StepSampler
from finelip_diffusion.data.datasets import DrawnCaptions, RecordDataset, ScenesDataset, open_dataset
from finelip_diffusion.data.edits import choose_edits, place_of_edit, rule_edits
from finelip_diffusion.data.sources import Record, Unusable, edits_of
from finelip_diffusion.scenes import IMAGE_SIZE, STOCK_CONTENT_TOKENS, find_facts

LATE = "Nothing else is to be said of it. " * 12


@pytest.mark.parametrize(
    ("caption", "edits"),
    [
        ("Three dogs sleep.", {"Two dogs sleep.", "Four dogs sleep."}),
        ("A sign says 7.", {"A sign says 6.", "A sign says 8."}),
        ("Left of it stands a tree.", {"Right of it stands a tree."}),
        ("A cat in front of a wall.", {"A cat behind a wall."}),
        ("A wooden table and a metal chair.", {"A metal table and a wooden chair."}),
        ("A small metal chair.", set()),  # two attributes of one noun
        ("A striped and plain shirt.", set()),
        ("A man, who holds an umbrella, walks.", {"A man, walks."}),
        ("A Chinese twofold cleft.", set()),  # parts of words
    ],
)
def test_each_rule(caption: str, edits: set[str]) -> None:
    assert {edit for draw in range(20) for edit in rule_edits(caption, draw)} == edits


def test_a_color_becomes_another_and_changes_places() -> None:
    edits = rule_edits("A red car stands beside a blue house.", 1)
    assert "A blue car stands beside a red house." in edits and len(edits) == 3
    assert all(edit.split()[2:6] == ["car", "stands", "beside", "a"] for edit in edits)
    assert rule_edits("Red.", 3)[0][0].isupper()
    assert rule_edits("A red car.", 5) == rule_edits("A red car.", 5)


def test_edits_stand_before_or_after_token_77(tokenizer) -> None:
    caption = f"A red car. {LATE}A blue house. Two dogs."
    offsets = tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True, verbose=False).offset_mapping
    edits = rule_edits(caption)
    places = {edit: place_of_edit(caption, edit, offsets) for edit in edits}
    assert set(places.values()) == {"before", "after"}
    for edit, place in places.items():
        read = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:STOCK_CONTENT_TOKENS]
                for text in (caption, edit)]  # fmt: skip
        assert (read[0] == read[1]) == (place == "after")
    for place in ("before", "after"):
        chosen = choose_edits(caption, edits, offsets, 2, place, 3)
        assert chosen and all(places[edit] == place for edit in chosen)
    assert set(choose_edits(caption, edits, offsets, 99, "any", 0)) == set(edits)
    assert choose_edits(caption, [], offsets, 2, "any", 0) == []


def test_a_scene_has_an_edit_for_each_object_that_changes_one_fact() -> None:
    dataset = ScenesDataset(num_scenes=16)
    dataset.with_edits = True
    for index in range(0, 16, 3):
        example = dataset[index, 7]
        scene = dataset.scene(index)
        assert 0 < len(example.edits) <= len(scene.objects)
        told = {fact.object for fact in find_facts(example.caption).facts}
        for edit in example.edits:
            assert len(told ^ {fact.object for fact in find_facts(edit).facts}) == 2, edit
    dataset = open_dataset("scenes:tags", num_scenes=8, edits=True)
    example = dataset[0]
    assert example.edits == tuple(rule_edits(example.caption, 0))


def test_a_batch_draws_edits_and_says_which_count(tokenizer) -> None:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    records = [Record("a", f"A red car. {LATE}", "a", "a"), Record("b", "Nothing.", "b", "b")]
    dataset = RecordDataset(records)
    dataset.with_edits = True
    dataset.image = lambda record: _png()  # type: ignore[method-assign]
    examples = [dataset[0, 5], dataset[1, 6]]
    batch = Collator(tokenizer, processor, num_edits=2)(examples)
    assert batch["edited_valid"].tolist() == [[True, False], [False, False]]
    own = batch["input_ids"][0]
    for row, differs in ((batch["edited_ids"][0, 0], True), (batch["edited_ids"][0, 1], False)):
        assert torch.equal(row[: len(own)], own) != differs
    late = Collator(tokenizer, processor, num_edits=2, edit_place="after")(examples)
    assert not late["edited_valid"].any()
    cut = Record("a", f"{LATE * 4}A red car.", "a", "a")  # edited where the window has ended
    dataset = RecordDataset([cut])
    dataset.with_edits, dataset.image = True, lambda record: _png()  # type: ignore[method-assign]
    assert not Collator(tokenizer, processor, num_edits=1)([dataset[0]])["edited_valid"].any()


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def test_edits_made_elsewhere_come_with_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png())
    rows = [
        {"image": "a.png", "caption": "A red car.", "edits": ["A  blue car.", "A red bus."]},
        {"image": "a.png", "captions": ["One.", "Another."], "hard_negatives": [["Two."], []]},
        {"image": "a.png", "caption": "A green car."},
        {"image": "a.png", "captions": ["One.", "Another."], "edits": ["for which?"]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = open_dataset(tmp_path / "rows.jsonl", edits=True)
    assert [dataset[index].edits for index in range(3)] == [("A blue car.", "A red bus."), ("Two.",), ()]
    assert dataset[3].edits == tuple(rule_edits("A green car."))
    assert open_dataset(tmp_path / "rows.jsonl")[0].edits == ()
    (skip,) = dataset.skipped
    assert skip.reason == "the edited captions are not a list of texts for each of 2 captions"
    assert edits_of({"edits": '["from CSV"]'}) == [["from CSV"]]
    for wrong in (3, "no JSON", [1], {"a": 1}, ["a", ["b"]]):
        with pytest.raises(Unusable, match="not a list of texts"):
            edits_of({"edits": wrong})


def test_a_stream_and_a_table_have_edits_too(tmp_path: Path) -> None:
    row = json.dumps({"captions": ["A red car.", "Two dogs."], "edits": [["A blue car."], []]}).encode()
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        for name, data in (("0.png", _png()), ("0.json", row)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    stream = open_dataset(str(tmp_path / "one.tar"), edits=True)
    found = {example.caption: set(example.edits) for example in islice(iter(stream), 20)}
    assert found["A red car."] == {"A blue car."} and found["Two dogs."] <= {"One dogs.", "Three dogs."}
    assert not next(iter(open_dataset(str(tmp_path / "one.tar")))).edits

    datasets = pytest.importorskip("datasets")
    rows = {"image": [Image.new("RGB", (8, 8))], "caption": ["A red car."], "hard_negatives": [["A red bus."]]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "table")
    assert open_dataset(tmp_path / "table", edits=True)[0].edits == ("A red bus.",)


def test_rewrites_are_one_example_whose_caption_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png())
    (tmp_path / "b.png").write_bytes(_png())
    rows = [{"image": "a.png", "captions": ["One.", "Two.", "Three."]}, {"image": "b.png", "caption": "Alone here."}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert len(open_dataset(tmp_path / "rows.json")) == 4
    dataset = open_dataset(tmp_path / "rows.json", rewrites=True, edits=True)
    assert isinstance(dataset, DrawnCaptions) and len(dataset) == 2
    assert {dataset[0, draw].caption for draw in range(9)} == {"One.", "Two.", "Three."}
    assert all(dataset[0, draw].caption == dataset.caption(0, draw) for draw in range(9))
    assert dataset.caption_lengths().tolist() == [6, 11] and dataset[0, 0].edits == ("Two.",)
    scenes = open_dataset("scenes", num_scenes=8, rewrites=True)
    assert len({scenes.caption(0, draw)[:12] for draw in range(12)}) > 6  # all families


def test_a_curriculum_goes_from_short_to_long_and_keeps_the_examples() -> None:
    lengths = list(range(100, 0, -1))
    for bucket in (False, True):
        plain = StepSampler(100, 5, 3, lengths=lengths, bucket=bucket)
        rising = StepSampler(100, 5, 3, lengths=lengths, bucket=bucket, rising_steps=8)
        batches = [[lengths[index] for index, _ in rising.batch(step)] for step in range(40)]
        first = [length for batch in batches[:8] for length in batch]
        assert first == sorted(first)
        assert [n for batch in batches[8:20] for n in batch] != sorted(n for batch in batches[8:20] for n in batch)
        whole = [[lengths[index] for index, _ in plain.batch(step)] for step in range(20)]
        assert sorted(chain(*batches[:20])) == sorted(chain(*whole))
        assert batches[20:28] != sorted(batches[20:28])  # the second epoch is as any other
    assert StepSampler(100, 5, 3, lengths=lengths, rising_steps=999).batch(19)[-1][0] == 0  # the longest comes last
