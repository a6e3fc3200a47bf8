"""Findings against a hand count, the linear probe against a problem with a known answer, drift against a loop."""

import pytest
import torch
from tiny_models import LAYERS, WIDTH, tiny_text_encoder

from finelip_diffusion.metrics import linear_probe, state_drift
from finelip_diffusion.scenes import Scene, describe, fact_tokens, findings, read, render, sample_scene


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
            assert finding.after == cut


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


def test_drift_is_none_against_oneself_and_the_plain_difference_otherwise(tokenizer) -> None:
    """Compared with a loop over tokens; float32 states, summed in float64."""
    stock, moved = tiny_text_encoder(0), tiny_text_encoder(0, positions=248)
    with torch.no_grad():
        moved.load_state_dict(stock.state_dict() | {
            name: torch.cat([table, torch.zeros(171, WIDTH)])
            for name, table in stock.state_dict().items() if "position_embedding" in name
        })  # fmt: skip
    prompts = ["a red cat", "two blue dogs asleep under a tree", "a"]
    for layer in state_drift(moved, stock, tokenizer, prompts).values():
        assert layer["rms"] == 0
        assert layer["cosine"] == pytest.approx(1)
    with torch.no_grad():
        for name, weight in moved.named_parameters():
            if "position_embedding" in name or "layers.2.mlp.fc2" in name:
                weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    drift = state_drift(moved, stock, tokenizer, prompts)
    names = [f"hidden_states[{index}]" for index in range(LAYERS + 1)] + ["last_hidden_state"]
    assert list(drift) == names
    for index, name in enumerate(names):
        squares, sizes, cosines = [], [], []
        for number, prompt in enumerate(prompts):
            with torch.no_grad():
                ids = tokenizer(prompt, return_tensors="pt").input_ids
                outputs = [encoder(ids, output_hidden_states=True) for encoder in (moved, stock)]
            new, old = (
                (output.hidden_states[index] if index <= LAYERS else output.last_hidden_state)[0].double()
                for output in outputs
            )
            tokens = range(1, ids.shape[1])
            square = sum((new[t] - old[t]).square().sum() for t in tokens)
            size = sum(old[t].square().sum() for t in tokens)
            cosine = [new[t] @ old[t] / (new[t].norm() * old[t].norm()) for t in tokens]
            assert drift[name]["prompt_rms"][number] == pytest.approx(float((square / size).sqrt()))
            assert drift[name]["prompt_cosine"][number] == pytest.approx(float(sum(cosine) / len(cosine)))
            squares.append(square), sizes.append(size), cosines.extend(cosine)
        assert drift[name]["rms"] == pytest.approx(float((sum(squares) / sum(sizes)).sqrt()))
        assert drift[name]["cosine"] == pytest.approx(float(sum(cosines) / len(cosines)))


def test_drift_is_measured_on_prompts_that_both_read(tokenizer, text_of) -> None:
    stock = tiny_text_encoder(0)
    with pytest.raises(ValueError, match="A prompt has 78 tokens: .* 3 to 77 tokens"):
        state_drift(stock, stock, tokenizer, ["a red cat", text_of(76)])
    with pytest.raises(ValueError, match="A prompt has 2 tokens"):
        state_drift(stock, stock, tokenizer, [""])
    with pytest.raises(ValueError, match="There is no prompt"):
        state_drift(stock, stock, tokenizer, [])
    with pytest.raises(ValueError, match=r"\(4, 32\) and \(4, 16\)"):
        state_drift(stock, tiny_text_encoder(0, width=16), tokenizer, ["a"])
