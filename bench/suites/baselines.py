"""The weight gradients of other methods, dW = Gᵀ X from about K of M rows, in plain PyTorch.

Written from the papers' formulas. X is [M, N] and G is [M, P]; a result is [P, N]. Where a paper's
released code and its formula differ in speed, the faster reading is the baseline; each docstring
lists what of the code was kept. All of them take the norms of rows by one reduction and gather with
`index_select`. Rows are sorted only where the authors sort them.

| name | rows | weights | unbiased | source |
|---|---|---|---|---|
| `authors` | top K of the memory | 1 | no | Hernandez, Rini, Duman, arXiv 2110.09164 |
| `crs` | K draws with replacement, p ∝ s | 1/(K p) | yes | Drineas, Kannan, Mahoney, SIAM J. Comput. 36(1), 2006 |
| `bernoulli-crs` | each with p = min(1, K s/Σs) | 1/p | yes | Adelman et al., NeurIPS 2021 |
| `bernoulli-crs-code` | the same, scaled as their code does | 1/p | yes | the same |
| `topk-crs` | top K | 1 | no | the same |
| `vcas` | each with p = min(1, λ s), Σp = K | 1/p | yes | Wang, Chen, Zhu, ICLR 2024 |
| `wta-crs` | top c, and K − c draws | 1; (1 − P_C)/((K − c) p) | yes | Liu et al., NeurIPS 2023 |

s_m = ‖x_m‖·‖g_m‖ throughout.
"""  # noqa: E501

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import vector_norm


class MemAOPGD:
    """Mem-AOP-GD with top-k selection, formulated as its authors' code is.

    The rows of X and G, times √η, are added to the memories out of place; the rows' squared
    products of norms are normalised and sorted; the outer products of the first K are summed; these
    rows are set to zero, and the memories are replaced by scaled copies. Each of these operations
    is a pass of its own over M(N + P) numbers, where an update in place needs one pass in all.

    Args:
        k: K.
        learning_rate: η. The result is η dW, since the authors' optimizer has a rate of 1.
        decay: Their memory decay rate α.
    """

    def __init__(self, k: int, learning_rate: float = 0.01, decay: float = 1.0) -> None:
        self.k = k
        self.learning_rate = learning_rate
        self.decay = decay
        self.memory: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, g: Tensor) -> Tensor:
        """η times the approximate weight gradient, [P, N]."""
        if self.memory is None:
            self.memory = torch.zeros_like(x), torch.zeros_like(g)
        root = self.learning_rate**0.5
        a = self.memory[0] + x * root
        b = self.memory[1] + g * root
        squared = (vector_norm(a, dim=1) * vector_norm(b, dim=1)).square()
        share = squared / squared.sum()
        chosen = share.argsort(descending=True)[: self.k]
        gradient = torch.einsum("kn,kp->np", a[chosen], b[chosen])
        a[chosen] = 0
        b[chosen] = 0
        self.memory = a.clone() * self.decay**0.5, b.clone() * self.decay**0.5
        return gradient.t()


def crs(x: Tensor, g: Tensor, k: int) -> Tensor:
    """Column-row sampling: `k` draws with replacement, p = s/Σs, each weighted 1/(k p).

    The estimator of Drineas et al., algorithm BASICMATRIXMULTIPLICATION with their optimal
    probabilities. Draws come in the order in which `multinomial` makes them.
    """
    scores = _scores(x, g)
    probabilities = scores / scores.sum()
    chosen = probabilities.multinomial(k, replacement=True)
    return _weighted_product(x, g, chosen, 1 / (k * probabilities[chosen]))


# The part of uniform sampling in the probabilities of Adelman et al.'s code, its epsilon.
_UNIFORM_SHARE = 0.1


def bernoulli_crs(x: Tensor, g: Tensor, k: int) -> Tensor:
    """Bernoulli-CRS: every row is kept on its own with p = min(1, k s/Σs), and weighted 1/p.

    As in the authors' code a tenth of p is uniform (1/M, which keeps the weights bounded), and what
    is kept is compacted by `nonzero`. Fewer than `k` rows are expected where a p is cut to 1. Here
    the rows are multiplied by their weights; `bernoulli_crs_code` does what the code does.
    """
    chosen, weights = _bernoulli(x, g, k)
    return _weighted_product(x, g, chosen, weights)


def bernoulli_crs_code(x: Tensor, g: Tensor, k: int) -> Tensor:
    """Bernoulli-CRS with the weights applied as in the authors' code, by a product with `diag`.

    That product costs as many FLOPs as the weight gradient of a square layer where K = P. The
    rows of X are gathered as columns of Xᵀ, as their linear layer passes them.
    """
    chosen, weights = _bernoulli(x, g, k)
    columns = x.t().index_select(1, chosen) @ torch.diag(weights)
    return (columns @ g.index_select(0, chosen)).t()


def topk_crs(x: Tensor, g: Tensor, k: int) -> Tensor:
    """Top-k sampling of Adelman et al.: the `k` rows with the largest s, not scaled, biased."""
    chosen = _scores(x, g).topk(k).indices
    return g.index_select(0, chosen).t() @ x.index_select(0, chosen)


def vcas(x: Tensor, g: Tensor, k: int) -> Tensor:
    """VCAS's weight sampler at a fixed ratio: Poisson sampling with p = min(1, λ s), Σp = `k`.

    λ follows from sorted scores and their prefix sums; rows are kept independently, compacted by
    `nonzero` and weighted 1/p, as in the authors' code. It does not adapt the ratio to a variance
    during training.
    """
    probabilities = poisson_probabilities(_scores(x, g), k)
    chosen = (torch.rand_like(probabilities) < probabilities).nonzero().squeeze(1)
    return _weighted_product(x, g, chosen, 1 / probabilities[chosen])


def poisson_probabilities(scores: Tensor, k: int) -> Tensor:
    """p = min(1, λ s) with Σp = `k` for positive scores [M], `k` < M."""
    rows = scores.numel()
    ascending = scores.sort().values
    below = ascending.cumsum(0)
    # With the t largest certain, λ = (k − t)/Σ of the others; t grows until no p exceeds 1.
    certain = torch.arange(rows - 1, -1, -1, device=scores.device)
    fits = (k - certain) * ascending <= below
    last = (fits & (certain < k)).nonzero()[-1, 0]
    return (scores * ((k - certain[last]) / below[last])).clamp(max=1)


def wta_crs(x: Tensor, g: Tensor, k: int) -> Tensor:
    """Winner-take-all CRS: the top c rows for certain, and `k` − c draws from the others.

    c minimises (1 − P_c)/(k − c), the factor of the variance bound, where P_c is the share of the
    top c scores; draws are with replacement, weighted (1 − P_c)/((k − c) p), and both sets are
    sorted, as in the authors' code. It multiplies the two sets by two GEMMs and adds; here they
    are one GEMM, which is faster. The code stores sampled rows in the forward pass and so uses the
    last step's norms of G; here they are this step's.
    """
    chosen, weights = draw_winners_and_others(_scores(x, g), k)
    return _weighted_product(x, g, chosen, weights)


def draw_winners_and_others(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The rows of `wta_crs` for scores [M], and their weights: int64 [k], and [k]."""
    probabilities = scores / scores.sum()
    largest, order = probabilities.topk(k)
    share = torch.cat([largest.new_zeros(1), largest.cumsum(0)[:-1]])  # P_c for c = 0 … k − 1
    draws = k - torch.arange(k, device=scores.device)
    certain = int(((1 - share) / draws).argmin())
    winners = order[:certain].sort().values
    rest = probabilities.index_fill(0, winners, 0)
    drawn = rest.multinomial(k - certain, replacement=True).sort().values
    mass = 1 - share[certain]
    weights = torch.cat(
        [torch.ones_like(largest[:certain]), mass / ((k - certain) * probabilities[drawn])]
    )
    return torch.cat([winners, drawn]), weights


def _scores(x: Tensor, g: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    scores: Tensor = vector_norm(x, dim=1, dtype=dtype) * vector_norm(g, dim=1, dtype=dtype)
    return scores


def _bernoulli(x: Tensor, g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores = _scores(x, g)
    probabilities = (k * scores / scores.sum()).clamp(max=1)
    probabilities = (1 - _UNIFORM_SHARE) * probabilities + _UNIFORM_SHARE / scores.numel()
    chosen = probabilities.bernoulli().nonzero().squeeze(1)
    return chosen, (1 / probabilities[chosen]).to(x.dtype)


def _weighted_product(x: Tensor, g: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Σ_j w_j g[i_j]ᵀ x[i_j]."""
    scaled = g.index_select(0, chosen).mul_(weights.to(g.dtype).unsqueeze(1))
    return scaled.t() @ x.index_select(0, chosen)


#: Those that keep nothing between calls, by name.
STATELESS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "crs": crs,
    "bernoulli-crs": bernoulli_crs,
    "bernoulli-crs-code": bernoulli_crs_code,
    "topk-crs": topk_crs,
    "vcas": vcas,
    "wta-crs": wta_crs,
}


def make(name: str, k: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A method as a function of X and G that computes about `k` of their rows.

    `topk-compiled` is `topk-crs` by `torch.compile`; what `authors` keeps between calls belongs
    to the function.
    """
    if name == "authors":
        return MemAOPGD(k)
    if name == "topk-compiled":
        return torch.compile(functools.partial(topk_crs, k=k), dynamic=False)
    method = STATELESS[name]
    return lambda x, g: method(x, g, k)
