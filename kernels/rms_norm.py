"""Root mean square layer normalisation (Zhang & Sennrich, 2019)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last dimension, computed in float32.

    x: [..., D]; weight: [D], or [N, D] with a row for each of x's last-but-one dimension; returns x's shape and dtype.
    """
    if weight.dim() == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight
