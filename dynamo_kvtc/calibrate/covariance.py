"""Mean and covariance of a stream of channel rows, in one pass and P x P memory."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamo_kvtc.errors import TooFewTokensError


class StreamingCovariance:
    """Accumulates sum and scatter around the first batch's mean, so that large means do not cancel small variances.

    Memory: one float32 [P, P] and two float64 [P], however many tokens pass through.
    """

    def __init__(self, channels: int, device: torch.device | str) -> None:
        self.tokens = 0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(channels, channels, dtype=torch.float32, device=device)

    def add(self, rows: Tensor) -> None:
        """rows: float32 [n, P], finite."""
        if self._shift is None:
            self._shift = rows.mean(dim=0)
        centred = rows - self._shift
        self._sum += centred.sum(dim=0, dtype=torch.float64)
        self._scatter.addmm_(centred.T, centred)
        self.tokens += len(rows)

    def finish(self) -> tuple[Tensor, Tensor]:
        """mean float32 [P] and covariance float32 [P, P]; the accumulator's memory becomes the covariance.

        Raises TooFewTokensError with fewer than two rows.
        """
        if self.tokens < 2 or self._shift is None:
            raise TooFewTokensError(f"{self.tokens} tokens give no covariance; use at least 2")
        offset = self._sum / self.tokens
        covariance = self._scatter.div_(self.tokens)
        covariance.addr_(offset.float(), offset.float(), alpha=-1.0)
        return (self._shift.double() + offset).float(), covariance


def eigenbasis(covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors of a symmetric float32 [P, P], which is overwritten.

    Returns basis float32 [P, rank], orthonormal columns by falling eigenvalue, and eigenvalues float32 [P], falling.
    Each column's largest entry is made positive, so that the sign does not depend on the solver.
    """
    # The triangular halves can differ in the last bit after accumulation; the solvers read one of them.
    covariance.add_(covariance.T.clone()).mul_(0.5)
    values, vectors = torch.linalg.eigh(covariance)
    basis = vectors[:, -rank:].flip(1).contiguous()
    peak = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return basis.mul_(torch.sign(peak)), values.flip(0).clamp(min=0)
