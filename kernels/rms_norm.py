"""Root mean square layer normalisation (Zhang & Sennrich, 2019)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.native import function


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last dimension, computed in float32.

    x: [..., D]; weight: [D], or [N, D] with a row for each of x's last-but-one dimension; returns x's shape and dtype.
    """
    run = function("penstock_rms_norm", "ppqfqqp")
    if run is not None and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        x, weight = x.contiguous(), weight.contiguous()
        out, size = torch.empty_like(x), x.shape[-1]
        num_weights, num_rows = weight.numel() // size, x.numel() // size
        run(x.data_ptr(), weight.data_ptr(), num_weights, eps, num_rows, size, out.data_ptr())
        return out
    if weight.dim() == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight
