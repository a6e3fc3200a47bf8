"""Findings against a hand count, the linear probe against a problem with a known answer."""

import torch

from finelip_diffusion.metrics import fact_tokens, findings, linear_probe
from finelip_diffusion.scenes import Scene, describe, read, render, sample_scene


def test_a_rendered_scene_shows_all_of_its_caption_and_another_does_not(tokenizer) -> None:
    scene, other = sample_scene(1), sample_scene(2)
    caption = describe(scene, 1)
    right = findings(caption, read(render(scene)), tokenizer)
    assert len(right) == len(scene.objects)
    assert all(finding.found for finding in right)
    assert not all(finding.found for finding in findings(caption, other, tokenizer))
    assert not any(finding.filled for finding in findings(caption, Scene("grey", ()), tokenizer))


def test_facts_are_behind_when_a_77_token_encoder_cuts_them(tokenizer) -> None:
    for seed in range(20):
        caption = describe(sample_scene(seed), seed)
        for finding, fact in zip(findings(caption, sample_scene(0), tokenizer), caption.facts, strict=True):
            cut = len(tokenizer(caption[: fact.end]).input_ids) > 77
            assert finding.behind == cut


def test_fact_tokens_cover_the_words_of_the_fact(tokenizer) -> None:
    caption = describe(sample_scene(3), 3)
    ids = tokenizer(str(caption)).input_ids
    for fact, (first, last) in zip(caption.facts, fact_tokens(caption, tokenizer), strict=True):
        words = tokenizer.decode(ids[first : last + 1])
        assert words.replace(" ", "") == caption[fact.start : fact.end].lower().replace(" ", "")


def test_the_probe_reads_what_is_linear_and_nothing_from_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, test_labels = torch.randint(4, (800,), generator=generator), torch.randint(4, (400,), generator=generator)
    directions = torch.randn(4, 16, generator=generator)

    def states(classes: torch.Tensor) -> torch.Tensor:
        return 100 + 5 * directions[classes] + 0.1 * torch.randn(len(classes), 16, generator=generator)

    assert linear_probe(states(labels), labels, states(test_labels), test_labels) == 1.0
    noise = torch.randn(1200, 16, generator=generator)
    assert linear_probe(noise[:800], labels, noise[800:], test_labels) < 0.35
