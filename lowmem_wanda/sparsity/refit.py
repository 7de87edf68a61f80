"""The outputs of kept experts are fitted to those of a whole layer, by least squares."""

from collections.abc import Callable, Mapping

import torch

RIDGE = 0.05  # of the mean of the diagonal, so that few tokens move weights little
SWEEPS = 3

# an expert, its tokens -> the inputs of its down projection (tokens, columns)
Inner = Callable[[int, torch.Tensor], torch.Tensor]
Routes = Mapping[int, tuple[torch.Tensor, torch.Tensor]]  # {expert: (its tokens, their gates (tokens, 1))}


def fit_outputs(left: torch.Tensor, routes: Routes, inner: Inner) -> dict[int, torch.Tensor]:
    """{expert: what is added to its down projection, float32 (outputs, columns)}, in SWEEPS sweeps over the experts.

    `left` (tokens, outputs) is what the whole layer puts out and the kept experts do not; it is changed in place to
    what they do not put out afterwards. For each expert in turn

        min over D of || left - g h D^T ||^2 + ridge ||D||^2

    with h what its down projection is given, and the ridge a share of the mean of the diagonal of (g h)^T (g h).
    """
    moved: dict[int, torch.Tensor] = {}
    for _ in range(SWEEPS):
        for expert, (tokens, gates) in routes.items():
            weighted = inner(expert, tokens).float() * gates.float()
            products = weighted.t() @ weighted
            ridge = RIDGE * float(products.diagonal().mean())
            if not ridge > 0:
                continue
            products.diagonal().add_(ridge)
            change = torch.linalg.solve(products, weighted.t() @ left[tokens]).t()
            left.index_add_(0, tokens, weighted @ change.t(), alpha=-1)
            moved[expert] = moved[expert] + change if expert in moved else change
    return moved
