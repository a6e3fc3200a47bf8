"""Weights shared out over two real processes train as whole ones do, and are saved whole."""

import io
from pathlib import Path
from typing import Any

import pytest
import test_objective
import torch
import torch.distributed as dist
from test_gathering import in_two
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from finelip_diffusion.gathering import gather_with_gradients
from finelip_diffusion.objective import TrainingStep
from finelip_diffusion.sharding import Sharded, ShardedState, clip_norm

ROWS = 3  # of a process
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)
needs_sharding = pytest.mark.skipif(OLD, reason="torch 2.6 cannot leave scalars whole: --shard says so")
CLIP = 50.0  # below the norms of the first updates


def batch_of(rank: int) -> dict[str, Tensor]:
    """A process's part of a batch of scenes."""
    batch = test_objective.make_batches()("finelip", torch.float32)
    return {name: tensor[ROWS * rank :][:ROWS] for name, tensor in batch.items()}


def start() -> TrainingStep:
    step = test_objective.make_step("finelip", torch.float32)
    step.gather = gather_with_gradients
    return step


def optimizer_of(step: TrainingStep) -> torch.optim.Optimizer:
    """Updates in proportion to gradients, which AdamW's are not where a gradient is nothing but rounding."""
    scalars = [[p for p in step.parameters() if (p.ndim == 0) == whole] for whole in (True, False)]
    return torch.optim.AdamW([{"params": part, "name": str(len(part))} for part in scalars], lr=0.1, eps=1)


def update(call: Any, backward: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> list[float]:
    loss = torch.stack(list(call(batch).values())).sum()
    backward(loss)
    norm = clip_norm([p for group in optimizer.param_groups for p in group["params"]], CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return [loss.item(), norm]


def _three_updates_both_ways(rank: int) -> dict[str, Any]:
    batch, found = batch_of(rank), dict[str, Any]()
    step = start()
    whole, optimizer = DistributedDataParallel(step, find_unused_parameters=True), optimizer_of(step)
    found["whole"] = [update(whole, Tensor.backward, optimizer, batch) for _ in range(3)], step.state_dict()

    step = start()
    sharded = Sharded(step)
    optimizer = optimizer_of(step)
    figures = [update(step, lambda loss: sharded.backward(loss, True), optimizer, batch) for _ in range(3)]
    found["sharded"] = figures, sharded.weights()
    local = step.model.clip.visual_projection.weight.to_local()  # type: ignore[operator]
    found["share"] = local.numel() / step.model.clip.visual_projection.weight.numel()

    file = io.BytesIO()
    torch.save(ShardedState(step, optimizer).state_dict(), file)
    box = [file.getvalue()]
    dist.broadcast_object_list(box)  # the first process has it
    other = start()
    again = Sharded(other)
    other_optimizer = optimizer_of(other)
    state = torch.load(io.BytesIO(box[0]), weights_only=True)  # as accelerate reads it
    ShardedState(other, other_optimizer).load_state_dict(state)
    for part, module, its in ((sharded, step, optimizer), (again, other, other_optimizer)):
        update(module, lambda loss, part=part: part.backward(loss, True), its, batch)
    found["on"], found["resumed"] = sharded.weights(), again.weights()
    return found


@pytest.mark.skipif(not OLD, reason="torch 2.7 and newer share out")
def test_an_older_torch_is_told_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="--shard needs torch 2.7 or newer, and this is 2.6"):
        Sharded(start())


@needs_sharding
def test_sharded_weights_train_as_whole_ones(tmp_path: Path) -> None:
    """Losses, norms, weights: the same sums in another order. Then one more update, from memory and from a file."""
    for rank, found in enumerate(in_two(_three_updates_both_ways, tmp_path)):
        (figures, weights), (sharded_figures, sharded) = found["whole"], found["sharded"]
        torch.testing.assert_close(torch.tensor(sharded_figures), torch.tensor(figures), rtol=1e-4, atol=0)
        assert figures[0][1] > CLIP and figures[2][0] < figures[0][0]
        assert found["share"] == 0.5
        assert sharded.keys() == (weights.keys() if rank == 0 else set())
        for name, tensor in sharded.items():
            assert (tensor - weights[name]).abs().max() < 1e-5, name
        for name, tensor in found["on"].items():
            assert torch.equal(found["resumed"][name], tensor), name
