"""Sets of prompts as published: written here in their authors' formats, read, drawn, laid out, and found again."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from finelip_diffusion.evaluation.promptsets import (
    PROMPT_SETS,
    cut,
    find_pictures,
    read_dpg,
    read_set,
    split_source,
    write_pictures,
)

COLUMNS = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed",
           "tuple", "question_natural_language"]  # fmt: skip
ROWS = [
    ["a", "A red fox under an oak.", "fox", "1", "0", "entity", "whole", "entity - whole (fox)", "Is there a fox?"],
    ["a", "A red fox under an oak.", "fox, red", "2", "1", "attribute", "color", "attribute - color (fox, red)",
     "Is the fox red?"],
    ["a", "A red fox under an oak.", "fox, oak, under", "3", "1,2", "relation", "spatial",
     "relation - spatial (fox, oak, under)", "Is the fox under the oak?"],
    ["b10", "A boat.", "boat", "1", "0", "entity", "whole", "entity - whole (boat)", "Is there a boat?"],
    ["b2", "A lake.", "lake", "1", "0", "entity", "whole", "entity - whole (lake)", "Is there a lake?"],
]  # fmt: skip


def write_csv(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([COLUMNS, *ROWS])


def write_jsonl(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_dpg(folder: Path) -> None:
    write_csv(folder / "dpg_bench.csv")
    (folder / "prompts").mkdir()
    for name, text in {row[0]: row[1] for row in ROWS}.items():
        (folder / "prompts" / f"{name}.txt").write_text(f"{text}\n")


def write_dsg(folder: Path) -> None:
    write_csv(folder / "dsg-1k-anns.csv")


def write_tiif(folder: Path) -> None:
    for kind, number in (("negation", 2), ("action+3d", 1)):
        prompts = [
            {"type": kind, "short_description": f"{kind} {i}.", "long_description": f"A long {kind} {i}."}
            for i in range(number)
        ]
        asked = [
            {"type": kind, "yn_question_list": ["Is it? ", "Is it not?"], "yn_answer_list": ["Yes", "no"]}
        ] * number
        write_jsonl(folder / "testmini_prompts" / f"{kind}_prompts.jsonl", prompts)
        write_jsonl(folder / "testmini_eval_prompts" / f"{kind}_eval_prompts.jsonl", asked)


def write_geneval2(folder: Path) -> None:
    row = {"prompt": "two green toys", "atom_count": 3, "skills": ["count", "attribute", "object"],
           "vqa_list": [["How many toys are in the image?", "two"], ["Are the toys green?", "Yes"],
                        ["Are there any toys in the image?", "Yes"]]}  # fmt: skip
    write_jsonl(folder / "geneval2_data.jsonl", [row, {**row, "prompt": "two red toys"}])


def write_detailmaster(folder: Path) -> None:
    rows = [{"image_id": "000000238708.jpg", "ori_prompt": "bowls", "polished_prompt": "Bowls on a table.",
             "character_attributes": [], "character_locations": [], "scene_attributes": [],
             "dataset_target": "ln_coco"}]  # fmt: skip
    (folder / "DetailMaster_benchmark.json").write_text(json.dumps(rows))


def write_longbench(folder: Path) -> None:
    write_jsonl(
        folder / "data" / "instruction.jsonl", [{"instruction": "A long text.", "label": [{"Object": "It."}]}] * 2
    )


def write_compbench(folder: Path) -> None:
    (folder / "color_val.txt").write_text("a green bench and a blue bowl\na red dog\t1\n")
    (folder / "color_train.txt").write_text("not this one\n")


WRITERS: dict[str, Callable[[Path], None]] = {
    "dpg": write_dpg,
    "dsg": write_dsg,
    "tiif": write_tiif,
    "detailmaster": write_detailmaster,
    "longbench": write_longbench,
    "geneval2": write_geneval2,
    "compbench": write_compbench,
}
PLACES = {  # where the authors' scripts look, in the words of their own code
    "dpg": ["m/a.png", "m/b10.png", "m/b2.png"],
    "dsg": ["a_m.jpg", "b10_m.jpg", "b2_m.jpg"],
    "tiif": [f"output/{kind}/m/{which}_description/{i}.png" for kind, i in
             (("negation", 0), ("negation", 1), ("action+3d", 0)) for which in ("long", "short")],
    "detailmaster": ["m/ln_coco_000000238708-0.png"],
    "longbench": ["outputs/m/0/step1/generated_image_0.jpg", "outputs/m/1/step1/generated_image_0.jpg"],
    "geneval2": ["m/000000.png", "m/000001.png"],
    "compbench": ["m/color_val/samples/a green bench and a blue bowl_000000.png",
                  "m/color_val/samples/a red dog_000001.png"],
}  # fmt: skip


def test_every_set_has_a_test():
    assert WRITERS.keys() == PLACES.keys() == PROMPT_SETS.keys()


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_a_set_is_read_laid_out_and_found_again(name: str, tmp_path: Path):
    WRITERS[name](tmp_path)
    source = tmp_path / "testmini_prompts" if name == "tiif" else tmp_path
    items = read_set(name, source)
    assert all(item.text for item in items)
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    pictures = []
    for number, item in enumerate(items):
        for kind in ("long", "short") if item.short else ("long",):
            file = drawn / f"{number}-{kind}.png"
            Image.new("RGB", (16, 16), (40 * number, 0, 200 if kind == "long" else 0)).save(file)
            pictures.append((item, kind, [file]))
    written = write_pictures(name, pictures, "m", tmp_path / "out")
    assert sorted(str(file.relative_to(tmp_path / "out")) for file in written) == sorted(PLACES[name])
    model = tmp_path / "out" / "m" if (tmp_path / "out" / "m").is_dir() else tmp_path / "out"
    for folder in {tmp_path / "out", model}:
        found = list(find_pictures(name, items, folder))
        assert [(item.name, kind) for item, kind, _ in found] == [(item.name, kind) for item, kind, _ in pictures]
        assert {file.resolve() for _, _, file in found} == {file.resolve() for file in written}
        for (_, _, file), (_, _, (original,)) in zip(found, pictures, strict=True):
            with Image.open(file) as ours, Image.open(original) as theirs:
                pairs = zip(ours.convert("RGB").getpixel((5, 5)), theirs.getpixel((5, 5)), strict=True)  # type: ignore
                assert max(abs(a - b) for a, b in pairs) <= 3, "JPEG moves a plain color by a level or two"


def test_questions_hang_on_each_other_as_their_ids_say(tmp_path: Path):
    write_dpg(tmp_path)
    items = read_set("dpg", tmp_path)
    assert [item.name for item in items] == ["a", "b2", "b10"]
    assert [question.parents for question in items[0].questions] == [(), (0,), (0, 1)]
    assert [question.category for question in items[0].questions] == [
        "entity - whole", "attribute - color", "relation - spatial"
    ]  # fmt: skip
    assert items[0].text == "A red fox under an oak."


def test_words_among_the_ids_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """As in nine lines of DSG-1k; an id that is not there is counted in a warning."""
    write_dsg(tmp_path)
    file = tmp_path / "dsg-1k-anns.csv"
    file.write_text(file.read_text().replace('"1,2"', '"1, right"'))
    assert [question.parents for question in read_set("dsg", tmp_path)[0].questions] == [(), (0,), (0,)]
    assert not caplog.records
    file.write_text(file.read_text().replace('"1, right"', '"1,7"'))
    assert [question.parents for question in read_set("dsg", tmp_path)[0].questions] == [(), (0,), (0,)]
    assert "1 questions hang on one that is not there" in caplog.text


def test_the_script_of_dpg_loses_its_first_prompt(tmp_path: Path):
    """It skips the first line of the CSV; what hangs on it then fails, and the prompt is left out."""
    write_dpg(tmp_path)
    assert [item.name for item in read_dpg(tmp_path, quirks=True)] == ["b2", "b10"]


def test_answers_of_tiif_and_geneval2_are_words_that_a_judge_knows(tmp_path: Path):
    write_tiif(tmp_path)
    write_geneval2(tmp_path)
    tiif = read_set("tiif", tmp_path / "testmini_prompts")
    assert [question.answer for question in tiif[0].questions] == ["yes", "no"]
    assert [item.category for item in tiif] == ["action+3d", "negation", "negation"]
    questions = read_set("geneval2", tmp_path)[0].questions
    assert [question.answer for question in questions] == ["two", "yes", "yes"]
    assert questions[1].asked == "Are the toys green? Answer in one word."


def test_images_of_dpg_are_one_grid_and_back(tmp_path: Path):
    write_dpg(tmp_path)
    item = read_set("dpg", tmp_path)[0]
    files = []
    for copy in range(4):
        files.append(tmp_path / f"{copy}.png")
        Image.new("RGB", (8, 6), (60 * copy, 0, 0)).save(files[-1])
    (grid,) = write_pictures("dpg", [(item, "long", files)], "m", tmp_path / "out")
    with Image.open(grid) as image:
        assert image.size == (16, 12)
        for copy, (left, top) in enumerate([(0, 0), (8, 0), (0, 6), (8, 6)]):  # crop_tuples_list of their script
            assert image.getpixel((left, top)) == (60 * copy, 0, 0)
            assert cut(image, copy, 4).getcolors() == [(48, (60 * copy, 0, 0))]


def test_lists_of_pictures_are_those_that_scripts_read(tmp_path: Path):
    for name, file in (("geneval2", "image_paths.json"), ("detailmaster", "image_info.json")):
        WRITERS[name](tmp_path)
        items = read_set(name, tmp_path)
        Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
        write_pictures(name, [(item, "long", [tmp_path / "x.png"]) for item in items], "m", tmp_path / name)
        found = json.loads((tmp_path / name / "m" / file).read_text())
        if name == "geneval2":
            assert list(found) == ["two green toys", "two red toys"]
            assert all(Path(path).is_file() for path in found.values())
        else:
            assert found == [
                {"image_id": "ln_coco_000000238708.jpg", "output_image_name": "ln_coco_000000238708-0.png"}
            ]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "dpg_bench.csv").unlink(), "holds no dpg_bench.csv"),
        (lambda folder: (folder / "dpg_bench.csv").write_text("item_id,text\na,b\n"), "as published: KeyError"),
        (lambda folder: write_csv(folder / "twice" / "dpg_bench.csv"), "holds 2 files dpg_bench.csv"),
    ],
)
def test_what_is_not_as_published_is_told(tmp_path: Path, spoil: Callable[[Path], object], message: str):
    write_dpg(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_set("dpg", tmp_path)


def test_refusals_name_what_to_do(tmp_path: Path):
    write_tiif(tmp_path)
    write_jsonl(tmp_path / "test_prompts" / "negation_prompts.jsonl", [])
    with pytest.raises(ValueError, match="holds several sets: give one of .*test_prompts"):
        read_set("tiif", tmp_path)
    (tmp_path / "testmini_eval_prompts" / "negation_eval_prompts.jsonl").write_text("")
    with pytest.raises(ValueError, match="belong together line by line"):
        read_set("tiif", tmp_path / "testmini_prompts")
    with pytest.raises(ValueError, match="no prompt set 'dbg'"):
        read_set("dbg", tmp_path)
    with pytest.raises(ValueError, match="does not exist: give the folder of GenEval 2"):
        read_set("geneval2", tmp_path / "nowhere")
    assert split_source("dpg:a/b") == ("dpg", "a/b")
    assert split_source("scenes:list") is None
    assert split_source("dpg") is None
