"""What several processes share, in two real ones: gradients that reach where they came from, and their mean."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scripts
import torch
import torch.distributed as dist
from torch import Tensor, nn

from finelip_diffusion.gathering import average_gradients, gather_with_gradients


def _be_one(task: Callable[[int], Any], folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(task(rank), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def in_two(task: Callable[[int], Any], folder: Path) -> list[Any]:
    """What a task, called with its rank, returns in each of two processes."""
    both = [scripts.FORKS.Process(target=_be_one, args=(task, folder, rank)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(200)
    assert [process.exitcode for process in both] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def tokens_of(rank: int) -> Tensor:
    """Two captions of one process, which are three or four tokens long."""
    return torch.randn(2, 3 + rank, 4, generator=torch.Generator().manual_seed(rank))


def _shared_gradient(rank: int) -> dict[str, Tensor]:
    own = tokens_of(0).requires_grad_()
    other = torch.ones(4, 3, 4, requires_grad=True)
    doubled = 2 * other  # made before the join, so that its gradient is taken after it
    joined = gather_with_gradients({"tokens": own})["tokens"]
    ((joined + doubled) * (rank + 1)).sum().backward()  # one and the same gradient goes to both
    return {"own": own.grad, "other": other.grad}  # type: ignore[dict-item]


def test_a_gradient_that_others_share_stays_as_it_is(tmp_path: Path) -> None:
    for rank, found in enumerate(in_two(_shared_gradient, tmp_path)):
        assert (found["own"] == 1 + 2).all()  # of both processes
        assert (found["other"] == 2 * (rank + 1)).all()  # of this one


def _joint_loss(rank: int) -> dict[str, Tensor]:
    own = tokens_of(rank).requires_grad_()
    scale = torch.tensor(2.0)
    joint = gather_with_gradients({"tokens": own, "scale": scale, "ids": torch.tensor([rank, rank])})
    joint["tokens"].flatten(0, 1).square().sum(0).prod().backward()
    return joint | {"tokens": joint["tokens"].detach(), "grad": own.grad}  # type: ignore[dict-item]


def test_joined_tokens_are_padded_to_the_longest(tmp_path: Path) -> None:
    found = in_two(_joint_loss, tmp_path)
    padded = nn.functional.pad(tokens_of(0), (0, 0, 0, 1))
    whole = torch.cat([padded, tokens_of(1)]).requires_grad_()
    whole.flatten(0, 1).square().sum(0).prod().backward()
    for rank, one in enumerate(found):
        assert torch.equal(one["tokens"], whole)
        assert one["scale"] == 2 and one["ids"].tolist() == [0, 0, 1, 1]
        # each process differentiates the joint loss: two of them make twice its gradient, and the mean halves it
        expected = 2 * whole.grad[2 * rank : 2 * rank + 2, : 3 + rank]  # type: ignore[index]
        torch.testing.assert_close(one["grad"], expected, rtol=1e-6, atol=0)


def _averaged(rank: int) -> tuple[list[Tensor | None], int]:
    generator = torch.Generator().manual_seed(rank)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (5, 7, 100, 1, 3)]
    parameters.append(nn.Parameter(torch.zeros(2, 2, dtype=torch.float64)))
    for place, parameter in enumerate(parameters):
        if place != 3:  # a frozen one
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    messages, reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *args: (messages.append(tensor), reduce(tensor, *args))
    average_gradients(parameters, bucket=200)
    return [parameter.grad for parameter in parameters], len(messages)


def test_gradients_are_averaged_in_few_messages(tmp_path: Path) -> None:
    (one, messages), (other, _) = in_two(_averaged, tmp_path)
    generators = [torch.Generator().manual_seed(rank) for rank in range(2)]
    for place, size in enumerate((5, 7, 100, 1, 3)):
        if place == 3:
            assert one[place] is None
            continue
        mean = sum(torch.randn(size, generator=generator) for generator in generators) / 2
        assert torch.equal(one[place], mean) and torch.equal(other[place], mean)
    assert torch.equal(one[5], other[5]) and one[5].dtype == torch.float64
    assert messages == 3  # up to the hundred, the three behind it, and the other dtype


@pytest.mark.parametrize("function", [gather_with_gradients, lambda found: average_gradients([]) or found])
def test_one_process_has_nothing_to_share(function: Any) -> None:
    tensor = tokens_of(0)
    assert function({"tokens": tensor})["tokens"] is tensor
