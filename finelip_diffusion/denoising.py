"""The terms of image tuning: what a frozen UNet's predictions, and the states that it reads, are held to."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

TimestepSampling = Literal["uniform", "high_noise"]


def sample_timesteps(number: int, total: int, how: TimestepSampling, generator: torch.Generator) -> Tensor:
    """Draws timesteps, (number,), in 0..total - 1.

    Args:
        number: How many.
        total: Of the noise schedule, `num_train_timesteps`.
        how: `"uniform"`, or `"high_noise"`: (1 - u²) total with u uniform, which leans to the high end, where the
            layout is decided.
        generator: On the CPU.

    Raises:
        ValueError: For another way.
    """
    if how not in get_args(TimestepSampling):
        raise ValueError(f"timestep_sampling={how!r} is not one of {', '.join(get_args(TimestepSampling))}.")
    share = torch.rand(number, generator=generator)
    share = 1 - share.square() if how == "high_noise" else share
    return (share * total).long().clamp(max=total - 1)


def denoising_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet is to predict, by the scheduler's own prediction type.

    Args:
        scheduler: Of diffusers.
        latents: (B, C, H, W), scaled.
        noise: (B, C, H, W).
        timesteps: (B,).

    Raises:
        ValueError: For a prediction type that is neither epsilon nor v_prediction nor sample.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    raise ValueError(f"the scheduler's prediction type is {kind!r}, not epsilon, v_prediction or sample.")


def min_snr_weights(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Weights of the denoising loss, (B,): min-SNR (arXiv 2303.09556), min(SNR, gamma) of the clean image's error.

    For epsilon that is min(SNR, gamma) / SNR, for v_prediction min(SNR, gamma) / (SNR + 1) (section 3.4 there), for
    sample min(SNR, gamma). At SNR 0, the end of a schedule of zero terminal SNR, the weight of epsilon is 1, its
    limit.

    Args:
        scheduler: Of diffusers.
        timesteps: (B,).
        gamma: The bound, 5 in the paper.
    """
    share = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()  # of the signal's variance
    ratio = share / (1 - share)
    least = ratio.clamp(max=gamma)
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return least
    if kind == "v_prediction":
        return least / (ratio + 1)
    return torch.where(ratio > gamma, gamma / ratio, torch.ones_like(ratio))


def squared_error(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error, a scalar, in single precision.

    Args:
        prediction: (B, ...).
        target: (B, ...); no gradient reaches it.
        weights: (B,), of the examples; None is 1 for each.
    """
    if weights is None:
        return F.mse_loss(prediction.float(), target.detach().float())
    errors = (prediction.float() - target.detach().float()).square().flatten(1).mean(1)  # (B,)
    return (weights * errors).mean()
