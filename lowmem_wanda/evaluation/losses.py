"""What logits say of the tokens that follow, a slice of the vocabulary at a time; and the figures made of it.

Errors are standard errors of a mean that take tokens as independent, as llama.cpp's `perplexity` gives them.
"""

from typing import Any

import numpy as np
import torch


class Softmax:
    """The softmax of `count` tokens: its normalizer, the target's logit and the highest one, over slices of logits."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.precision = torch.float32 if device.type == "mps" else torch.float64
        self.highest = torch.full((count,), torch.finfo(torch.float32).min, device=device)
        self.sums = torch.zeros(count, dtype=self.precision, device=device)
        self.target = torch.zeros(count, device=device)
        self.top = torch.zeros(count, dtype=torch.int64, device=device)

    def add(
        self, where: slice, logits: torch.Tensor, targets: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds float32 logits (tokens, slice) of the ids from `start` on for the tokens `where`, whose next ids are
        `targets` (tokens,). Gives exp(logit - highest so far), in float32, and what earlier sums were scaled by."""
        highest, ids = logits.max(dim=1)
        before = self.highest[where]
        self.top[where] = torch.where(highest > before, ids + start, self.top[where])
        now = torch.maximum(before, highest)
        exponentials = (logits - now[:, None]).exp_()
        scale = (before - now).to(self.precision).exp_()
        self.sums[where] = self.sums[where] * scale + exponentials.sum(dim=1, dtype=self.precision)
        self.highest[where] = now
        place = targets - start
        inside = (place >= 0) & (place < logits.shape[1])
        picked = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.target[where] = torch.where(inside, picked, self.target[where])
        return exponentials, scale

    def normalizer(self) -> torch.Tensor:
        """log of the sum of exp(logit), (tokens,)."""
        return self.highest.to(self.precision) + self.sums.log()

    def losses(self) -> torch.Tensor:
        """-log p(target), (tokens,)."""
        return self.normalizer() - self.target


class Divergence:
    """KL(p || q) of `count` tokens, p and q given by slices of logits that go through two `Softmax` as well."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.sums = torch.zeros_like(Softmax(count, device).sums)

    def add(
        self, where: slice, logits: torch.Tensor, others: torch.Tensor, added: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Adds logits of p and q (tokens, slice); `added` is what adding those of p to its `Softmax` gave."""
        exponentials, scale = added
        products = (logits - others).mul_(exponentials)
        self.sums[where] = self.sums[where] * scale + products.sum(dim=1, dtype=self.sums.dtype)

    def values(self, p: Softmax, q: Softmax) -> torch.Tensor:
        """KL(p || q) in nats, (tokens,)."""
        return self.sums / p.sums - p.normalizer() + q.normalizer()


def perplexity(losses: np.ndarray) -> tuple[float, float]:
    """exp of the mean of -log p (tokens,), and its standard error."""
    mean, error = _mean(losses)
    return float(np.exp(mean)), float(np.exp(mean) * error)


def against(losses: np.ndarray, dense: np.ndarray, divergence: np.ndarray, same: np.ndarray) -> dict[str, Any]:
    """What llama.cpp's `--kl-divergence` reports, from the losses of a model and of the dense one, KL(dense || model)
    and whether both find the same id most likely, each (tokens,)."""
    ratio, ratio_error = perplexity(losses - dense)
    kl, kl_error = _mean(divergence)
    agreement, agreement_error = _mean(same.astype(np.float64))
    change = np.exp(-losses) - np.exp(-dense)
    return {
        "kl_mean": kl,
        "kl_mean_stderr": kl_error,
        "kl_median": float(np.median(divergence)),
        "kl_p99": float(np.percentile(divergence, 99)),
        "kl_max": float(divergence.max()),
        "top1_agreement": agreement,
        "top1_agreement_stderr": agreement_error,
        "perplexity_ratio": ratio,
        "perplexity_ratio_stderr": ratio_error,
        "target_probability_change_mean": float(change.mean()),
        "target_probability_change_rms": float(np.sqrt(np.square(change).mean())),
    }


def _mean(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), float(values.std() / np.sqrt(max(1, len(values) - 1)))
