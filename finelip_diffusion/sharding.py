"""Weights and optimizer shared out over processes (FSDP2), for towers that do not fit one device."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from .gathering import average_gradients

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
AS_FAR_AS_TRAINED = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
"""Of an optimizer, which knows nothing of a parameter without gradients: the factor of the cosines under a hinge."""


class Sharded:
    """A training step whose weights are shared out: each process keeps its part of every matrix, and gathers a layer
    when it is computed. Numbers that are scalars (the factor of the cosines, a bias) stay whole in every process.

    Attributes:
        step: The module; call it as ever.
    """

    def __init__(self, step: nn.Module):
        """Shares out a module in place; the optimizer is made afterwards.

        Args:
            step: On the device where it is trained, with the same weights in all processes.

        Raises:
            ValueError: Before torch 2.7, which cannot leave scalars whole.
        """
        self.step = step
        scalars = {parameter for parameter in step.parameters() if parameter.ndim == 0}
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
            raise ValueError(f"--shard needs torch 2.7 or newer, and this is {torch.__version__}: leave it out.")
        for module in step.modules():
            if isinstance(module, CLIPEncoderLayer):
                fully_shard(module)
        fully_shard(step, ignored_params=scalars)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Gradients of a batch, added up; with the last batch of an update processes share their mean."""
        assert isinstance(self.step, FSDPModule)
        self.step.set_requires_gradient_sync(last)
        loss.backward()
        if last:
            average_gradients(parameter for parameter in self.step.parameters() if parameter.ndim == 0)

    def weights(self) -> dict[str, Tensor]:
        """Whole weights, in the first process alone; all of them must ask."""
        state: dict[str, Any] = get_model_state_dict(self.step, options=WHOLE)
        return {name: tensor if tensor.ndim else tensor.clone() for name, tensor in state.items()}  # scalars are ours


class ShardedState:
    """Weights and optimizer of a sharded step as one whole state, for checkpoints of accelerate."""

    def __init__(self, step: nn.Module, optimizer: torch.optim.Optimizer):
        self.step, self.optimizer = step, optimizer

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": get_model_state_dict(self.step, options=WHOLE),
            "optimizer": get_optimizer_state_dict(self.step, self.optimizer, options=WHOLE),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.step, state["step"], options=WHOLE)
        set_optimizer_state_dict(self.step, self.optimizer, state["optimizer"], options=AS_FAR_AS_TRAINED)


def clip_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Cuts gradients, whole ones and shared ones, where their joint norm exceeds `max_norm`.

    Returns:
        The norm before.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [[each for each in gradients if hasattr(each, "full_tensor") == shared] for shared in (False, True)]
    norms = [torch.nn.utils.get_total_norm(part) for part in parts if part]
    norm = float(torch.stack([each.full_tensor() if hasattr(each, "full_tensor") else each for each in norms]).norm())
    for gradient in gradients:
        gradient.mul_(min(1.0, max_norm / (norm + 1e-6)))
    return norm
