"""What experts put out, in sums from which every score is arithmetic."""

import torch

from lowmem_wanda.errors import NumberError

# for each expert: the tokens that it was given; the sums of their gates g, of the norms |f| of its outputs, of |f|^2,
# of g |f| and of (g |f|)^2; and the largest |value| of an output
SUMS = ("tokens", "gates", "norms", "squares", "gated", "gated_squares", "largest")


class ExpertSums:
    """The sums of a layer of experts, float64 (7, experts), in the order of SUMS.

    An output f is that of an expert for a token, before the gate g, the number that the model multiplies it by.
    """

    def __init__(self, experts: int, device: torch.device) -> None:
        place = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        self.sums = torch.zeros(len(SUMS), experts, dtype=torch.float64, device=place)

    def add(self, expert: int, outputs: torch.Tensor, gates: torch.Tensor) -> None:
        """Adds the outputs (tokens, width) of an expert, each with its gate (tokens, 1)."""
        if not len(outputs):
            return
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32).to(self.sums.device).double()
        gates = gates.reshape(-1).to(self.sums.device).double()
        gated = gates * norms
        found = [gates.sum(), norms.sum(), norms.square().sum(), gated.sum(), gated.square().sum()]
        self.sums[0, expert] += len(outputs)
        self.sums[1:6, expert] += torch.stack(found)
        self.sums[6, expert] = torch.maximum(self.sums[6, expert], outputs.abs().max().to(self.sums))

    def record(self) -> dict[str, list[float]]:
        """{name of SUMS: a number for each expert}. Raises NumberError where one is none."""
        found = dict(zip(SUMS, self.sums.tolist(), strict=True))
        if not bool(torch.isfinite(self.sums).all()):
            wrong = next(expert for expert, column in enumerate(self.sums.t()) if not torch.isfinite(column).all())
            raise NumberError(f"expert {wrong}: puts out NaN or infinity")
        return found
