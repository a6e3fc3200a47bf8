"""Reading objects from text states: where captions state them, and a linear classifier of them."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_diffusion.probing import CLASSES, FactProbe, fit_probe, mean_states, stated_facts
from finelip_diffusion.scenes import ATTRIBUTES, describe, sample_for, telling


@pytest.fixture(scope="module")
def captions() -> list[str]:
    """In many wordings and with typos; one states nothing."""
    told = [describe(sample_for("sentences", seed), seed, **telling("all")) for seed in range(40)]
    return [*told[:3], "a witch in a forest", *told[3:]]


def test_facts_stand_where_their_words_are(captions, tokenizer):
    facts = stated_facts(captions, tokenizer, 248)
    assert 3 not in facts[:, 0] and len(facts) == sum(len(getattr(caption, "facts", ())) for caption in captions)
    stated = [(row, fact) for row, caption in enumerate(captions) for fact in getattr(caption, "facts", ())]
    for (row, fact), (caption, first, last, *classes) in zip(stated, facts.tolist(), strict=True):
        assert caption == row
        words = tokenizer.decode(tokenizer(str(captions[row])).input_ids[first : last + 1])
        inner, outer = (re.sub(r"\W", "", text.lower()) for text in (words, captions[row][fact.start : fact.end]))
        assert inner in outer and len(inner) > 0.5 * len(outer)
        values = {name: values[place] for (name, values), place in zip(ATTRIBUTES.items(), classes, strict=True)}
        assert values == {name: getattr(fact.object, name) for name in ATTRIBUTES}


def test_what_lies_beyond_the_window_is_left_out(captions, tokenizer):
    every, some = (stated_facts(captions, tokenizer, length) for length in (248, 60))
    assert torch.equal(some, every[every[:, 2] < 59]) and 0 < len(some) < len(every)
    assert stated_facts([str(caption) for caption in captions], tokenizer, 248).shape == (0, 7)


@pytest.fixture
def states_and_facts() -> tuple[Tensor, Tensor]:
    """Four captions of 20 tokens, the second without facts, and facts anywhere in the others."""
    generator = torch.Generator().manual_seed(0)
    row = torch.tensor([0, 0, 0, 2, 3, 3])
    first = torch.randint(1, 10, (6,), generator=generator)
    last = first + torch.randint(0, 9, (6,), generator=generator)
    classes = [torch.randint(0, count, (6,), generator=generator) for count in CLASSES]
    return torch.randn(4, 20, 16, generator=generator), torch.stack([row, first, last, *classes], 1)


def test_the_loss_is_a_mean_over_attributes_facts_and_captions(states_and_facts):
    states, facts = states_and_facts
    states.requires_grad_(True)
    torch.manual_seed(0)
    probe, losses = FactProbe(16), [list[Tensor]() for _ in range(4)]
    for row, first, last, *classes in facts.tolist():
        mean = torch.stack([states[row, token] for token in range(first, last + 1)]).mean(0)
        torch.testing.assert_close(mean_states(states, facts)[sum(map(len, losses))], mean)
        parts = probe.linear(mean).split(CLASSES)
        each = [-F.log_softmax(part, 0)[place] for part, place in zip(parts, classes, strict=True)]
        losses[row].append(torch.stack(each).mean())
    plain = sum(torch.stack(own).mean() for own in losses if own) / 4
    torch.testing.assert_close(probe(states, facts), plain)
    gradient, plain_gradient = (torch.autograd.grad(loss, states)[0] for loss in (probe(states, facts), plain))
    torch.testing.assert_close(gradient, plain_gradient)
    assert not gradient[1].any() and not any(weight.requires_grad for weight in probe.parameters())


def test_a_batch_in_parts_has_the_same_loss(states_and_facts):
    """Two processes have the gradient of one."""
    states, facts = states_and_facts
    probe, halves = FactProbe(16), []
    for start in (0, 2):
        own = facts[(facts[:, 0] >= start) & (facts[:, 0] < start + 2)].clone()
        own[:, 0] -= start
        halves.append(probe(states[start : start + 2], own))
    torch.testing.assert_close(torch.stack(halves).mean(), probe(states, facts))
    assert probe(states, facts[:0]) == 0


def test_a_fitted_probe_reads_what_is_there_and_nothing_else(states_and_facts):
    """Of states that hold the attributes, at any scale; of others it reads no more than chance."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.randn(sum(CLASSES), 48, generator=generator)

    def drawn(count: int, holds: bool) -> tuple[Tensor, Tensor]:
        classes = torch.stack([torch.randint(0, each, (count,), generator=generator) for each in CLASSES], 1)
        starts = torch.tensor([0, *CLASSES[:-1]]).cumsum(0)
        states = 0.3 * torch.randn(count, 5, 48, generator=generator)
        if holds:
            states = states + spread[classes + starts].sum(1)[:, None]
        places = torch.tensor([[row, 1, 3] for row in range(count)])
        return 7 * states + 100, torch.cat([places, classes], 1)

    for holds, least, most in ((True, 0.99, 1.0), (False, 0.0, 0.6)):
        probe = fit_probe(drawn(300, holds) for _ in range(3))
        right = probe.right(*drawn(500, holds)).double().mean(0)
        assert (right >= least).all() and (right <= most).all(), right


def test_captions_that_state_nothing_are_refused():
    with pytest.raises(ValueError, match="no caption says where it states an object: give scenes"):
        fit_probe([(torch.randn(2, 5, 8), torch.empty(0, 7, dtype=torch.long))])
