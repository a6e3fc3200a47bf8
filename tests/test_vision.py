"""A vision-language model as judge, through the classes of a real one at a tiny size; and judges kept at work."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPTokenizer
from vision_model import ANSWERS, save_vision_model

from finelip_diffusion.evaluation.judging import Kept, ask, by_category, sheet_of, texts_of, verdicts
from finelip_diffusion.evaluation.preferences import load_preference
from finelip_diffusion.evaluation.questions import ONE_WORD, Answer, Question
from finelip_diffusion.evaluation.vision import SHOWS, YES_OR_NO, VisionJudge, load_vision_judge, whole
from finelip_diffusion.locations import BUNDLED_MODEL
from finelip_diffusion.scenes import render, sample_scene

QUESTIONS = (
    Question("Is there a star?"),
    Question("Is there a star in the very centre of it all?", answer="no"),
    Question("How many stars are there?", answer="two"),
    whole("A star."),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def judge(folder: Path) -> VisionJudge:
    return load_vision_judge("vqa", str(folder))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [render(sample_scene(seed)) for seed in range(4)]


def test_probabilities_are_those_of_the_first_token_of_an_answer(folder: Path, judge: VisionJudge, images: list):
    """Against the model called plainly, a question at a time and without padding, as GenEval 2's script generates."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    texts = [YES_OR_NO.format(QUESTIONS[0].text), YES_OR_NO.format(QUESTIONS[1].text),
             ONE_WORD.format(QUESTIONS[2].text), SHOWS.format("A star.")]  # fmt: skip
    forms = {"yes": ["Yes", "yes", " Yes", " yes"], "no": ["No", "no", " No", " no"], "two": ["two", " two", "2"]}
    found = judge(images, QUESTIONS)
    for image, text, question, answer in zip(images, texts, QUESTIONS, found, strict=True):
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        with torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
        row = out.scores[0].softmax(-1)[0]
        ids = processor.tokenizer.convert_tokens_to_ids(forms[question.answer])
        assert answer.probability == pytest.approx(float(row[ids].sum()), rel=1e-4, abs=1e-7), question
    assert len({answer.probability for answer in found}) == len(found)


def test_neighbors_in_a_batch_change_nothing(judge: VisionJudge, images: list):
    together = judge(images, QUESTIONS)
    alone = [judge([image], [question])[0] for image, question in zip(images, QUESTIONS, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one.right == other.right
        assert one.probability == pytest.approx(
            other.probability, rel=1e-3, abs=1e-7
        )  # padding moves sums by rounding


def test_yes_and_no_are_weighed_against_each_other(judge: VisionJudge, images: list):
    yes, no = judge(images[:1] * 2, [Question("Is it red?"), Question("Is it red?", answer="no")])
    assert yes.right != no.right
    assert (yes.probability > no.probability) == yes.right


def test_the_judge_has_a_revision(folder: Path, judge: VisionJudge, tmp_path: Path):
    again = load_vision_judge("other name", str(folder))
    other = load_vision_judge("vqa", str(save_vision_model(tmp_path, seed=1)))
    assert judge.revision == again.revision != other.revision


def test_what_cannot_judge_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="is not a vision-language model that transformers can load"):
        load_vision_judge("vqa", str(BUNDLED_MODEL / "clip"))
    with pytest.raises(ValueError, match="has no token for yes and no"):
        words = tuple(word for word in ANSWERS if word.strip().lower() not in ("yes", "no"))
        load_vision_judge("vqa", str(save_vision_model(tmp_path / "silent", words=words)))
    mute = save_vision_model(tmp_path / "mute")
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="it has no chat template"):
        load_vision_judge("vqa", str(mute))
    judge = load_vision_judge("vqa", str(folder))
    with pytest.raises(ValueError, match="has no token for 'ten'"):
        judge([Image.new("RGB", (32, 32))], [Question("How many?", answer="ten")])


# -------------------------------------------------------------------------------------------------- judges at work


def test_nothing_is_asked_twice(judge: VisionJudge, images: list, tokenizer: CLIPTokenizer, tmp_path: Path):
    sheet = sheet_of("A star. Two dots.", QUESTIONS[:2], tokenizer)
    kept = Kept(tmp_path)
    first = ask(judge, images[0], sheet, kept)
    file = tmp_path / "answers-0.jsonl"
    file.write_text(file.read_text() + '\n["half a li')  # a run that was killed
    lines = len(file.read_text().splitlines())
    again = Kept(tmp_path, process=1)
    assert ask(judge, images[0].copy(), sheet, again) == first
    assert not (tmp_path / "answers-1.jsonl").exists()
    ask(judge, images[1], sheet, again)  # another picture
    assert len(json.loads((tmp_path / "answers-1.jsonl").read_text())) == 2
    other = sheet_of("A star. Two dots.", QUESTIONS[:1], tokenizer)
    ask(judge, images[0], other, again)  # another question
    assert len(again.answers) == 3
    assert len(file.read_text().splitlines()) == lines


def test_a_set_with_questions_is_asked_them_and_one_without_sentence_by_sentence(
    judge: VisionJudge, tokenizer: CLIPTokenizer
):
    prompt = "A red star. Two blue dots."
    asked = texts_of(judge, sheet_of(prompt, QUESTIONS[:1], tokenizer))
    assert [question.text for question in asked] == ["Is there a star?", prompt]
    asked = texts_of(judge, sheet_of(prompt, (), tokenizer))
    assert [question.text for question in asked] == [prompt, "A red star.", "Two blue dots."]


def test_verdicts_on_several_pictures_of_a_prompt(judge: VisionJudge, tokenizer: CLIPTokenizer):
    questions = (Question("Is there a star?", category="e"), Question("Is the star red?", parents=(0,), category="c"))
    sheet = sheet_of("A red star. Two blue dots.", questions, tokenizer)
    said = [[[0.9, 1.0], [0.8, 1.0], [0.3, 0.0]], [[0.1, 0.0], [0.6, 1.0], [0.2, 0.0]]]
    found = verdicts(judge, sheet, said)
    assert found.figures["vqa"] == [1.0, 0.0]  # the second picture has no star, so no red one either
    assert found.figures["soft"] == pytest.approx([0.85, 0.35])
    assert found.figures["soft_gm"] == pytest.approx([(0.9 * 0.8) ** 0.5, (0.1 * 0.6) ** 0.5])
    assert found.figures["vqa_score"] == [0.3, 0.2]
    assert found.points["vqa"] == [(3, 1.0), (3, 1.0), (3, 0.0), (3, 0.0)]
    assert found.answers[1] == [Answer(0.1, False), Answer(0.6, True)]
    assert by_category([sheet], [found]) == {"c": [[1.0, 0.0]], "e": [[1.0, 0.0]]}
    # the script of DPG-Bench counts the last picture alone, without dependencies
    assert by_category([sheet], [found], last_picture_alone=True) == {"c": [[1.0]], "e": [[0.0]]}


def test_a_preference_scores_the_prompt_and_each_sentence(images: list, tokenizer: CLIPTokenizer, tmp_path: Path):
    from finelip_diffusion.evaluation.adherence import clip_scores, load_judge

    source = str(BUNDLED_MODEL / "clip")
    preference, clip = load_preference(f"pick_score={source}"), load_judge("clip", source)
    sheet = sheet_of("A red star. Two blue dots.", (), tokenizer)
    said = ask(preference, images[0], sheet, Kept(tmp_path))
    texts = ["A red star. Two blue dots.", "A red star.", "Two blue dots."]
    expected = clip_scores(clip.embed_images(images[:1] * 3), clip.embed_texts(texts))
    assert [value for (value,) in said] == pytest.approx(expected.tolist(), rel=1e-4)
    found = verdicts(preference, sheet, [said])
    assert found.figures == {"preference": said[0]}
    assert [token for token, _ in found.points["preference"]] == [4, 8]
    assert len(preference.revision) == 16


@pytest.mark.parametrize(("name", "package"), [("hps_v2", "hpsv2"), ("image_reward", "image-reward")])
def test_a_package_that_is_not_there_is_named(name: str, package: str):
    if not find_spec({"image-reward": "ImageReward"}.get(package, package)):
        with pytest.raises(ValueError, match=f"{name} needs the package {package}, which cannot be imported"):
            load_preference(name)
    with pytest.raises(ValueError, match="no preference model 'hps': choose among hps_v2, pick_score, image_reward"):
        load_preference("hps")
