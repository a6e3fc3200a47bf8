"""Layers that are trained by their singular values alone (CLIP-SVD, arXiv 2509.03740, section 3.2)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

VALUES = ".parametrizations.weight.original"
"""What the names of trained singular values end with."""


class SingularValues(nn.Module):
    """A matrix by its singular values (R,); its singular vectors are constants."""

    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor):
        """Args: the vectors, (O, R) and (R, I)."""
        super().__init__()
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    def forward(self, values: Tensor) -> Tensor:
        """(R,) -> (O, I)."""
        return (self.left * values) @ self.right

    def right_inverse(self, weight: Tensor) -> Tensor:
        """(O, I) -> (R,)."""
        return ((self.left.T @ weight) * self.right).sum(1)


@torch.no_grad()
def train_singular_values(layers: Iterable[nn.Linear]) -> None:
    """Replaces the weight of each layer by its singular values, which are what is trained then; a bias is not.

    The layer computes the same up to rounding, and takes twice the memory: the vectors are as large as the weight.
    """
    for layer in layers:
        left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
        layer.requires_grad_(False)
        parametrize.register_parametrization(layer, "weight", SingularValues(left, right))
        parametrizations: Any = layer.parametrizations
        parametrizations.weight.original = nn.Parameter(values)


def multiplied_out(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with plain weights in place of singular values and vectors."""
    result = {}
    for name, tensor in state.items():
        stem, found, part = name.partition(".parametrizations.weight.")
        if not found:
            result[name] = tensor
        elif part == "original":
            vectors = (state[f"{stem}.parametrizations.weight.0.{side}"] for side in ("left", "right"))
            result[f"{stem}.weight"] = SingularValues(*vectors)(tensor)
    return result
