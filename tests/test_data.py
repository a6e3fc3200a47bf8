"""Captioned images as published, written by the tests: what is read of them, what is skipped, and in which order."""

import json
from pathlib import Path

import numpy as np
import pytest
from captioned_files import colour, image_bytes, summary, write_images, write_lines
from PIL import Image

from finelip_diffusion.data.datasets import (
    RecordDataset,
    ScenesDataset,
    SkipLog,
    TableDataset,
    open_dataset,
)
from finelip_diffusion.data.sources import Record, Skip, Unusable, captions_of, open_image, read_records
from finelip_diffusion.scenes import read

# ---------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("metadata", ["metadata.jsonl", "metadata.csv"])
def test_imagefolder(tmp_path, metadata):
    write_images(tmp_path / "train", ["a.png", "sub/b.jpg"])
    if metadata.endswith("jsonl"):
        rows = [{"file_name": "a.png", "text": "A cat."}, {"file_name": "sub/b.jpg", "text": "A\n dog."}]
    else:
        rows = ["file_name,text", "a.png,A cat.", 'sub/b.jpg,"A\n dog."']
    write_lines(tmp_path / "train" / metadata, rows)
    dataset = open_dataset(tmp_path)
    assert summary(dataset) == [("A cat.", "a.png", (12, 8)), ("A dog.", "sub/b.jpg", (12, 8))]
    assert dataset[0].name == f"{tmp_path}/train/{metadata}:{1 if metadata.endswith('jsonl') else 2}"
    assert dataset[0].image.getpixel((0, 0)) == colour(0)
    assert len(open_dataset(tmp_path / "train")) == 2  # the folder of one split is a folder too
    with pytest.raises(ValueError, match="looked for metadata.jsonl"):
        open_dataset(tmp_path, split="test")


def test_sharegpt4v_json(tmp_path):
    write_images(tmp_path / "images", ["sam/1.jpg", "coco/2.jpg"])
    turns = [{"from": "human", "value": "<image>\nTell."}, {"from": "gpt", "value": "It is\n\nred. And long."}]
    rows = [{"id": name, "image": f"{name}.jpg", "conversations": turns} for name in ("sam/1", "coco/2")]
    rows.append({"id": "text only", "conversations": turns})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "share.json").write_text(json.dumps(rows))
    dataset = open_dataset(tmp_path / "data" / "share.json", image_root=tmp_path / "images")
    assert [example.caption for example in dataset] == ["It is red. And long."] * 2
    assert [skip.reason[:8] for skip in dataset.skipped] == ["no image"]
    write_lines(tmp_path / "share.jsonl", rows[:2])
    assert len(open_dataset(tmp_path / "share.jsonl")) == 2  # images/ beside the file


def test_rows_of_image_and_captions(tmp_path):
    write_images(tmp_path, ["a.png"])
    write_lines(tmp_path / "list.jsonl", [{"picture": "a.png", "long": ["One.", "Two."]}])
    dataset = open_dataset(tmp_path / "list.jsonl", image_column="picture", caption_column="long")
    assert summary(dataset) == [("One.", "a.png", (12, 8)), ("Two.", "a.png", (12, 8))]
    assert dataset[1].name == f"{tmp_path}/list.jsonl:1[1]"
    with pytest.raises(ValueError, match="nothing to use .1 skipped; .*list.jsonl:1: no caption: none of"):
        open_dataset(tmp_path / "list.jsonl", image_column="picture")


def test_docci(tmp_path):
    write_images(tmp_path / "images", ["train_0.jpg", "test_0.jpg"])
    rows = [
        {"example_id": f"{s}_0", "split": s, "image_file": f"{s}_0.jpg", "description": f"A {s} picture."}
        for s in ("train", "test")
    ]
    write_lines(tmp_path / "docci_descriptions.jsonlines", rows)
    assert summary(open_dataset(tmp_path)) == [("A train picture.", "train_0.jpg", (12, 8))]
    assert summary(open_dataset(tmp_path, split="test")) == [("A test picture.", "test_0.jpg", (12, 8))]
    with pytest.raises(ValueError, match="'qual_dev' has no usable row; the splits here are test, train"):
        open_dataset(tmp_path, split="qual_dev")


def test_urban1k(tmp_path):
    write_images(tmp_path / "image", ["1.jpg", "2.jpg", "lonely.jpg"])
    (tmp_path / "caption").mkdir()
    for name in ("1", "2", "no image"):
        (tmp_path / "caption" / f"{name}.txt").write_text(f"Street {name}.")
    dataset = open_dataset(tmp_path, split="test")
    assert summary(dataset) == [("Street 1.", "1.jpg", (12, 8)), ("Street 2.", "2.jpg", (12, 8))]
    assert {(Path(skip.name).name, skip.reason) for skip in dataset.skipped} == {
        ("no image.txt", "missing file no image.jpg"),
        ("lonely.jpg", "no caption"),
    }


def test_coco_annotations(tmp_path):
    write_images(tmp_path / "val2017", ["a.jpg", "b.jpg"])
    data = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"image_id": i, "id": n, "caption": f"{i} {n}"} for n, i in enumerate((2, 1, 1))],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps(data))
    dataset = open_dataset(tmp_path / "annotations" / "captions_val2017.json")
    assert [(e.caption, e.image_id) for e in dataset] == [("1 1", "a.jpg"), ("1 2", "a.jpg"), ("2 0", "b.jpg")]


def test_karpathy_splits(tmp_path):
    write_images(tmp_path / "val2014", ["a.jpg", "b.jpg", "c.jpg"])
    images = [
        {"filepath": "val2014", "filename": f"{name}.jpg", "split": split, "sentences": [{"raw": f"{name} one"}]}
        for name, split in (("a", "restval"), ("b", "test"), ("c", "val"))
    ]
    images[1]["sentences"].append({"raw": "b two"})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    captions = {
        split: [e.caption for e in open_dataset(tmp_path / "dataset_coco.json", split=split)]
        for split in ("train", "validation", "test")
    }
    assert captions == {"train": ["a one"], "validation": ["c one"], "test": ["b one", "b two"]}


def test_tables_of_the_datasets_library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    cells = [{"bytes": image_bytes(n), "path": None} for n in range(3)] + [{"bytes": b"broken", "path": None}]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": cells, "text": ["A", " ", "C", "D"]}, features=features)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "more")
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "train.parquet")
    for source, split in (("one", "train"), ("more", "test"), ("parquet", "train")):
        dataset = open_dataset(tmp_path / source, split=split)
        assert isinstance(dataset, TableDataset)
        assert [skip.name for skip in dataset.skipped] == [f"{tmp_path / source}:1"]
        assert [example.caption for example in dataset] == ["A", "C", "A"]  # D is broken: the next good one
        assert dataset[0].image.getpixel((0, 0)) == colour(0)
        assert dataset[2].skipped[0].reason.startswith("unreadable image")
    several = table.remove_columns("text").add_column("text", [["A", "B"], ["C"], ["D"], ["E"]])
    dataset = TableDataset(several, "flickr", None, None)
    assert [(dataset.record(i).caption, dataset.record(i).image_id) for i in range(2)] == [("A", "0"), ("B", "0")]
    with pytest.raises(ValueError, match="'train'"):
        open_dataset(tmp_path / "more", split="train")
    with pytest.raises(ValueError, match="has columns image, text: .* name them"):
        open_dataset(tmp_path / "one", caption_column="words")


def test_without_the_datasets_library_one_sentence_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        open_dataset("owner/long-captions")
    with pytest.raises(ValueError, match="imagefolder.*DOCCI.*Urban1k.*pip install datasets"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("source", ["nowhere/to be found", "nowhere/list.json", "nowhere/*.tar"])
def test_a_source_that_is_not_there(source):
    with pytest.raises(ValueError, match="no shard is at|is not there"):
        open_dataset(source)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "data.yaml").write_text("a: b")
    with pytest.raises(ValueError, match="data.yaml is of no known kind"):
        open_dataset(tmp_path / "data.yaml")
    (tmp_path / "data.json").write_text('[{"image": ')
    with pytest.raises(ValueError, match="data.json is not JSON"):
        open_dataset(tmp_path / "data.json")


# ---------------------------------------------------------------------------------------------------------- bad data


def test_what_is_bad_in_a_list_is_named_and_left_out(tmp_path):
    write_images(tmp_path, ["a.png"])
    rows = [
        '{"file_name": "a.png", "text": ',
        {"file_name": "a.png", "text": " \n "},
        {"file_name": "gone.png", "text": "Gone."},
        {"file_name": "a.png", "text": 7},
        {"file_name": "a.png", "text": "half \ud800 pair"},
        {"file_name": "a.png"},
        {"text": "No image."},
        "[1, 2]",
        "",
        {"file_name": "a.png", "text": "Good."},
    ]
    write_lines(tmp_path / "metadata.jsonl", rows)
    dataset = open_dataset(tmp_path)
    assert [example.caption for example in dataset] == ["Good."]
    found = {skip.name.rpartition(":")[2]: skip.reason.split(":")[0] for skip in dataset.skipped}
    assert found == {
        "1": "broken line",
        "2": "empty caption",
        "3": "missing file gone.png",
        "4": "the caption is not text",
        "5": "the caption is not text",
        "6": "no caption",
        "7": "no image",
        "8": "no JSON object",
    }


def test_an_unreadable_image_is_replaced_by_the_next_good_one(tmp_path):
    names = [f"{n}.png" for n in range(5)]
    write_images(tmp_path, names)
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "2.png").write_bytes(image_bytes(2)[:-40])
    (tmp_path / "4.png").write_bytes(b"no image at all")
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": n, "text": f"About {n}"} for n in names])
    dataset = open_dataset(tmp_path)
    assert [example.caption for example in dataset] == [f"About {n}.png" for n in (0, 3, 3, 3, 0)]
    assert [[skip.name.rpartition(":")[2] for skip in example.skipped] for example in dataset] == [
        [], ["2", "3"], ["3"], [], ["5"],
    ]  # fmt: skip
    assert dataset[(1, 7)].draw == 7
    (tmp_path / "3.png").unlink()  # after it was listed
    assert dataset[3].skipped[0].reason == "missing file"
    (tmp_path / "0.png").unlink()
    with pytest.raises(ValueError, match="5 examples in a row cannot be used"):
        dataset[0]


def test_images_are_turned_and_made_rgb(tmp_path):
    tall = Image.new("RGB", (4, 2), "red")
    exif = tall.getexif()
    exif[0x0112] = 6  # a quarter turn
    tall.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(str(tmp_path / "turned.jpg")).size == (2, 4)

    clear = Image.new("RGBA", (3, 3), (0, 0, 0, 0))
    clear.putpixel((1, 1), (255, 0, 0, 255))
    clear.save(tmp_path / "clear.png")
    seen = open_image(str(tmp_path / "clear.png"))
    assert seen.mode == "RGB"
    assert (seen.getpixel((0, 0)), seen.getpixel((1, 1))) == ((255, 255, 255), (255, 0, 0))
    clear.convert("LA").convert("PA").convert("P").save(tmp_path / "palette.gif", transparency=0)
    assert open_image(str(tmp_path / "palette.gif")).mode == "RGB"

    Image.fromarray(np.full((3, 3), 128 * 256, np.uint16)).save(tmp_path / "deep.png")
    assert open_image(str(tmp_path / "deep.png")).getpixel((0, 0)) == (128, 128, 128)
    Image.new("CMYK", (1, 1)).save(tmp_path / "print.jpg")
    assert open_image(str(tmp_path / "print.jpg")).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(image_bytes(3, size=(1, 1))).size == (1, 1)


def test_bombs_and_lines_are_unreadable(monkeypatch):
    with pytest.raises(Unusable, match="are a line"):
        open_image(image_bytes(0, size=(300, 2)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    for size in ((9, 9), (30, 30)):  # where Pillow warns, and where it raises
        with pytest.raises(Unusable, match="unreadable image.*decompression bomb"):
            open_image(image_bytes(0, size=size))


def test_the_skip_log_writes_each_once_and_stops_the_run(tmp_path):
    path = tmp_path / "skipped.jsonl"
    log = SkipLog(path, max_bad_fraction=0.02, total=100)
    log.add([Skip("a:1", "broken"), Skip("a:1", "broken")])
    log.add([Skip("a:1", "broken"), Skip("b:2", "empty")])
    lines = [{"name": "a:1", "reason": "broken"}, {"name": "b:2", "reason": "empty"}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines
    with path.open("a") as file:
        file.write('{"name": "c')  # the run is killed here

    log = SkipLog(path, max_bad_fraction=0.02, total=100)
    log.add([Skip("b:2", "empty")])
    SkipLog(path, write=False).add([Skip("x", "y")], seen=0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines
    with pytest.raises(ValueError, match="3 of 100 examples .* max_bad_fraction=0.02 .* a:1, b:2, c:3; "):
        log.add([Skip("c:3", "gone")])
    assert len(path.read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="3 of 100"):  # started again, it stops again
        SkipLog(path, max_bad_fraction=0.02, total=100).add([Skip("a:1", "broken")])
    with pytest.raises(ValueError, match=r"s:9, \.\.\.; "):
        SkipLog(tmp_path / "b.jsonl", 0.0, 100).add(Skip(f"s:{n}", "") for n in range(11))


def test_the_share_of_a_stream_counts_what_was_seen(tmp_path):
    log = SkipLog(tmp_path / "skipped.jsonl", max_bad_fraction=0.01)
    log.add([Skip(str(n), "") for n in range(10)], seen=5)  # of at least 1,000
    log.add([Skip(str(n), "") for n in range(20)], seen=2000)
    with pytest.raises(ValueError, match="21 of 2000"):
        log.add([Skip("more", "")], seen=2000)


def test_captions_of_a_row():
    assert captions_of({"caption": None, "text": "a"}) == ["a"]
    assert captions_of({"conversations": [{"from": "gpt", "value": "1"}, {"from": "gpt", "value": "2"}]}) == ["1"]
    for row in ({"conversations": [{"from": "human", "value": "1"}]}, {"captions": []}, {"captions": ["a", ""]}):
        with pytest.raises(Unusable, match="empty caption"):
            captions_of(row)


# ------------------------------------------------------------------------------------------------------------ scenes


def test_scenes_come_in_groups_of_near_duplicates():
    dataset = ScenesDataset(num_scenes=160)
    examples = [dataset[index] for index in range(160)]
    shown = [read(example.image) for example in examples]
    for first in range(0, 160, 8):
        objects = [sorted((o.shape, o.colour, o.size) for o in scene.objects) for scene in shown[first : first + 8]]
        assert all(moved == objects[0] for moved in objects[1:5])  # the same objects in other cells
        if len(objects[0]) > 1:
            cells = [[o.cell for o in scene.objects] for scene in shown[first : first + 8]]
            assert all(places == cells[0] for places in cells[5:])  # the same cells, other attributes
    few = [len(scene.objects) <= 3 for scene in shown[::8]]
    assert 0 < sum(few) < 12
    assert [example.image_id for example in examples] == [repr(scene) for scene in shown]
    assert (dataset.caption_lengths() == [len(scene.objects) for scene in shown]).all()
    told = ScenesDataset(num_scenes=160, wording="all")
    drawn = [len(told.caption(9, draw)) for draw in range(20)]
    assert told.drawn_lengths(np.repeat(9, 20), range(20)).tolist() == drawn and len(set(drawn)) > 10


def test_the_draw_words_the_caption_of_a_scene_anew():
    dataset, other = ScenesDataset(num_scenes=16, seed=1), ScenesDataset("test", 16, seed=1)
    assert dataset[(3, 5)].caption == dataset[(3, 5)].caption != dataset[(3, 6)].caption
    assert dataset[3].caption == dataset[(3, 0)].caption
    assert not {dataset[i].image_id for i in range(16)} & {other[i].image_id for i in range(16)}
    alone = ScenesDataset(num_scenes=4, seed=1, group_size=1)
    assert [alone[i].image_id for i in range(2)] == [dataset[i].image_id for i in (0, 8)]
    with pytest.raises(ValueError, match="validation"):
        open_dataset("scenes", split="validation")


# ----------------------------------------------------------------------------------------------------------- storage


def test_records_are_kept_as_they_are():
    records = [Record("a/b.png", "Ünï “code” 图\n", "b", "list:1"), Record(7, "row", "7", "table:7")]
    dataset = RecordDataset(records)
    assert [dataset.record(index) for index in range(2)] == records
    assert dataset.caption_lengths().tolist() == [13, 3]
    assert dataset.drawn_lengths(np.array([1, 0, 1]), [5, 6, 7]).tolist() == [3, 13, 3]
    assert len(RecordDataset([])) == 0
    with pytest.raises(IndexError):
        dataset[2]


def test_a_folder_of_nothing_known_is_not_listed(tmp_path):
    assert read_records(tmp_path, "train") is None
