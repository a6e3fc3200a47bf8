"""What answers add up to, against plain loops written from the authors' scripts; and where a prompt tells a thing."""

import random
from statistics import geometric_mean as statistics_gmean

import numpy as np
import pytest
from transformers import CLIPTokenizer

from finelip_diffusion.evaluation.adherence import Sentences, dense_scores
from finelip_diffusion.evaluation.questions import (
    TIIF_GROUPS,
    Answer,
    Question,
    arithmetic_mean,
    geometric_mean,
    group_mean,
    scene_answers,
    scene_questions,
    told_at,
    with_parents,
)
from finelip_diffusion.scenes import describe, read, render, sample_scene


def made_up(seed: int) -> tuple[list[Question], list[Answer]]:
    """Ten questions that hang on each other, also on later ones, and answers."""
    rng = random.Random(seed)
    questions = [
        Question(
            f"q{place}?",
            parents=tuple(rng.sample([other for other in range(10) if other != place], rng.randint(0, 2))),
        )
        for place in range(10)
    ]
    return questions, [Answer(probability := rng.random(), probability > 0.4) for _ in questions]


def dsg(questions: list[Question], answers: list[Answer]) -> list[float]:
    """DSG's vqa_utils.py, told plainly: parents count by what was answered about them."""
    scores = {place: float(answer.right) for place, answer in enumerate(answers)}
    filtered = dict(scores)
    for place, question in enumerate(questions):
        for parent in question.parents:
            if scores[parent] == 0:
                filtered[place] = 0.0
    return list(filtered.values())


def dpg(questions: list[Question], answers: list[Answer]) -> list[float]:
    """DPG-Bench's compute_dpg_bench.py, told plainly: zeros are written into what later questions look at."""
    scores = {place: float(answer.right) for place, answer in enumerate(answers)}
    for place, question in enumerate(questions):
        for parent in question.parents:
            if scores[parent] == 0:
                scores[place] = 0.0
                break
    return list(scores.values())


@pytest.mark.parametrize("seed", range(20))
def test_dependencies_are_those_of_the_authors_scripts(seed: int):
    questions, answers = made_up(seed)
    assert with_parents(answers, questions) == dsg(questions, answers)
    assert with_parents(answers, questions, cascade=True) == dpg(questions, answers)


def test_the_two_scripts_differ_in_grandchildren():
    questions = [Question("a?"), Question("b?", parents=(0,)), Question("c?", parents=(1,))]
    answers = [Answer(0.1, False), Answer(0.9, True), Answer(0.9, True)]
    assert with_parents(answers, questions) == [0, 0, 1]
    assert with_parents(answers, questions, cascade=True) == [0, 0, 0]


def test_soft_means_are_those_of_the_standard_library():
    _, answers = made_up(3)
    values = [answer.probability for answer in answers]
    assert arithmetic_mean(answers) == pytest.approx(sum(values) / len(values))
    assert geometric_mean(answers) == pytest.approx(statistics_gmean(values))
    assert geometric_mean([*answers, Answer(0.0, False)]) == 0


def test_tiif_is_a_mean_of_groups_of_types():
    rng = random.Random(0)
    types = [
        rng.choice(["negation", "comparison", "text", "style", "texture+color", "not in a group"]) for _ in range(60)
    ]
    scores = [[float(rng.random() < 0.7) for _ in range(rng.randint(1, 4))] for _ in types]
    groups = []
    for names in TIIF_GROUPS.values():  # eval/summary_results.py and eval/summary_dimension_results.py
        accuracies = []
        for name in names:
            own = [score for kind, some in zip(types, scores, strict=True) if kind == name for score in some]
            if own:
                accuracies.append(sum(own) / len(own))
        if accuracies:
            groups.append(sum(accuracies) / len(accuracies))
    found = group_mean(scores, types, TIIF_GROUPS)
    assert found["value"] == pytest.approx(sum(groups) / len(groups))
    assert found["low"] < found["value"] < found["high"]
    assert found["n"] == sum(map(len, scores))
    assert group_mean([[1.0]], ["elsewhere"], TIIF_GROUPS)["value"] is None


def test_where_a_prompt_tells_what_is_asked(tokenizer: CLIPTokenizer):
    prompt = "A tall oak stands by the road. Two red foxes sleep under it, and an owl watches. A red car passes."
    ids = tokenizer(prompt, add_special_tokens=False).input_ids

    def at(question: Question) -> str:
        (place,) = told_at([question], prompt, tokenizer)
        assert place is not None
        return tokenizer.decode([ids[place - 1]]).strip()  # the start token is 0

    assert at(Question("Is there a red car?")) == "car"
    assert at(Question("Are there two foxes?", words="red fox, ==2")) == "foxes"
    assert at(Question("Is the oak tall?")) == "oak"
    assert at(Question("Whatever?", end=prompt.index(" stands"))) == "oak"
    assert told_at([Question("Is there a zebra?")], prompt, tokenizer) == [None]
    assert told_at([Question("Is there a cat?")], "", tokenizer) == [None]


def test_what_is_asked_of_scenes_is_true_of_their_pictures():
    wrong = 0
    for seed in range(6):
        scene = sample_scene(seed, "test")
        caption, other = describe(scene, seed), sample_scene(seed + 50, "test")
        questions = scene_questions(caption)
        assert len(questions) == 3 * len(scene.objects)
        assert all(scene_answers(caption, read(render(scene))))
        answers = scene_answers(caption, read(render(other)))
        cells = {item.cell: item for item in other.objects}
        for place, fact in enumerate(caption.facts):
            item = cells.get(fact.object.cell)
            for number, name in enumerate(("shape", "colour", "size")):
                expected = item is not None and getattr(item, name) == getattr(fact.object, name)
                assert answers[3 * place + number] == expected
        wrong += answers.count(False)
    assert wrong > 20


@pytest.mark.parametrize("kept", [1.0, 0.3])
def test_dense_scores_are_those_of_longalign(kept: float):
    import torch

    torch.manual_seed(0)
    embeds = torch.nn.functional.normalize(torch.randn(7, 8), dim=-1)
    images = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    batch_ids = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    text = torch.zeros(3, 8)  # loss.py: dense_score
    for i in range(3):
        text[i] = embeds[batch_ids == i].mean(dim=0)
    if kept < 1:
        ortho = text.mean(dim=0)
        ortho = (ortho / ortho.norm())[None]
        text = text - (1 - 0.3) * torch.sum(text * ortho, dim=-1, keepdim=True) * ortho
    expected = 100 * torch.diagonal(text @ images.T)
    scores, points = dense_scores(images, Sentences(embeds, batch_ids, torch.arange(7), 3), kept)
    assert scores == pytest.approx(expected.tolist(), rel=1e-5)  # theirs is in float32
    assert [np.mean([value for _, value in own]) for own in points] == pytest.approx(scores)
    assert [[token for token, _ in own] for own in points] == [[0, 1, 2], [3], [4, 5, 6]]
