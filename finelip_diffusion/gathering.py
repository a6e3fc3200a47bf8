"""What several processes share: their batches joined, with gradients, and the mean of their gradients."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

BUCKET = 2**25
"""Bytes of gradients that are averaged in one message, about what DistributedDataParallel sends at a time."""


class _Join(torch.autograd.Function):
    """The tensors of all processes, in the order of their ranks; each gets the gradients that all have for its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may have given it to others, too
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_gradients(representations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joins the batches of all processes in the order of their ranks; a gradient goes back to where it came from.

    Token tensors are padded to the longest of all processes; scalars are every process's own.

    Args:
        representations: (B, ...) or (), by name; the names are the same in every process.

    Returns:
        (processes * B, ...) or (), by name.
    """
    if not _several():
        return dict(representations)
    joint = {}
    for name, tensor in sorted(representations.items()):
        if tensor.ndim >= 2:
            length = torch.tensor(tensor.shape[1], device=tensor.device)
            dist.all_reduce(length, dist.ReduceOp.MAX)
            missing = int(length) - tensor.shape[1]
            tensor = F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing))
        joint[name] = _Join.apply(tensor.contiguous()) if tensor.ndim else tensor
    return joint


def average_gradients(parameters: Iterable[nn.Parameter], bucket: int = BUCKET) -> None:
    """What DistributedDataParallel does after a plain backward pass.

    Args:
        parameters: the same ones in every process, with gradients or without.
        bucket: bytes of a message, about.
    """
    if not _several():
        return
    waiting: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            same = waiting.setdefault(parameter.grad.dtype, [])
            same.append(parameter.grad)
            if sum(gradient.nbytes for gradient in same) >= bucket:
                _average(waiting.pop(parameter.grad.dtype))
    for rest in waiting.values():
        _average(rest)


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _average(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def longest_of_all(length: int, device: torch.device | str = "cpu") -> int:
    """The largest of the lengths of all processes."""
    if not _several():
        return length
    longest = torch.tensor(length, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return int(longest)
