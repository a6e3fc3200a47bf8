"""Modules that condense tokens before they are compared: FineLIP's refinement, FLAIR's text-conditioned pooling."""

import torch
from torch import Tensor, nn

HIDDEN_SHARE = 0.2  # width of the refinement's hidden layer, as a share of the tokens' width


class TokenRefinement(nn.Module):
    """FineLIP's adaptive token refinement (ATRM), section 3.2: K learned mixtures of the tokens.

    weights = softmax over tokens of scale * MLP(LayerNorm(x)), with MLP: E -> 0.2 E -> GELU -> K;
    refined token k = sum over tokens n of weights[n, k] * x[n].
    """

    def __init__(self, width: int, num_tokens: int):
        """Args: width of the tokens, E; num_tokens that come out, K."""
        super().__init__()
        hidden = max(1, int(HIDDEN_SHARE * width))
        self.weigh = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, num_tokens)
        )
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Condenses tokens.

        Args:
            tokens: (B, N, E).
            mask: (B, N), True = keep; what is masked has no weight, whatever it holds. Each row keeps a token or more.

        Returns:
            (B, K, E).
        """
        return self.refine(tokens, mask)[0]

    def refine(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Refined tokens as `forward` makes them, and by which weights of the tokens: (B, K, E), (B, N, K)."""
        if mask is not None:
            tokens = tokens.masked_fill(~mask[..., None], 0)  # 0 * inf would be NaN
        logits = self.scale * self.weigh(tokens)  # (B, N, K)
        if mask is not None:
            logits = logits.masked_fill(~mask[..., None], float("-inf"))
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights = logits.softmax(dim=1, dtype=wide)
        return weights.to(tokens.dtype).transpose(1, 2) @ tokens, weights  # (B, K, N) @ (B, N, E) -> (B, K, E)


@torch.no_grad()
def adaptive_mask(weights: Tensor, share: float) -> Tensor:
    """Which refined tokens of an example count, where that follows from how many tokens its refinement looks at.

    The tokens looked at are the perplexity, exp(entropy), of the mean weights: N where all weigh alike, 1 where all
    refined tokens are one and the same token. The first ceil(share * perplexity) refined tokens count. This project's
    own: FineLIP names the choice of K as open.

    Args:
        weights: (B, N, K), each column a distribution over tokens.
        share: Refined tokens for a token that is looked at, above 0.

    Returns:
        (B, K), True = counts; one or more of a row do.
    """
    mean = weights.mean(2)  # (B, N)
    perplexity = torch.special.entr(mean).sum(1).exp()
    count = (share * perplexity - 1e-4).ceil().clamp(min=1)  # rounding does not add a token
    return torch.arange(weights.shape[2], device=weights.device) < count[:, None]


class AttentionPooling(nn.Module):
    """FLAIR's pooling, section 3.2: captions query the patches of an image, and an all-zero token, to look away."""

    def __init__(self, width: int, num_heads: int = 8):
        super().__init__()
        self.norm_queries, self.norm_tokens, self.norm_values = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True, add_zero_attn=True)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """(B, Q, E) queries over (B, P, E) tokens -> (B, Q, E)."""
        return self.attention(
            self.norm_queries(queries), self.norm_tokens(tokens), self.norm_values(tokens), need_weights=False
        )[0]
