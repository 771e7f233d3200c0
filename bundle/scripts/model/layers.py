"""Layers shared by the parts of the network, their initialisation, and folding of batch norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class SafeConv3d(nn.Conv3d):
    """A convolution that avoids two faults of torch 2.13 on CPU.

    oneDNN's bfloat16 kernel for AVX-512 (jit_bf16) does not write the gradient of a 3x3x3 weight on maps of depth 2. In
    training such maps, which are tiny, are computed in the weight's precision.

    At inference in float32, torch uses a kernel several times slower than oneDNN's for a single small map (and on one
    thread for every 1x1x1 convolution); here all use oneDNN.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, r, r, r) -> (B, C_out, r, r, r)."""
        if self.training and x.shape[2] == 2 and x.device.type == "cpu":
            with torch.autocast("cpu", enabled=False):
                return self._conv_forward(x.to(self.weight.dtype), self.weight, self.bias)
        if not torch.jit.is_scripting():  # TorchScript leaves this branch out
            alone = onednn_alone(x)
            if alone:
                layout = (self.stride, self.dilation, self.groups)
                return torch.mkldnn_convolution(x, self.weight, self.bias, self.padding, *layout)  # type: ignore[arg-type]
        return self._conv_forward(x, self.weight, self.bias)


def onednn_alone(x: Tensor) -> bool:
    """Whether a convolution of ``x`` may call oneDNN itself: eager float32 on CPU, without a gradient."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    eager = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return eager and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


class FullPrecisionLinear(nn.Linear):
    """A linear layer that autocast leaves alone.

    Half precision would not be faster for such small layers, and would give patients tied log hazards. Product and sum
    are not autocast, and can be exported and scripted.

    Example:
        >>> layer = FullPrecisionLinear(3, 2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     y = layer(torch.rand(4, 3))
        >>> y.dtype, tuple(y.shape)
        (torch.float32, (4, 2))
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) -> (B, out), in the weight's own precision."""
        return (x.to(self.weight.dtype).unsqueeze(1) * self.weight).sum(dim=2) + self.bias


def global_average(x: Tensor) -> Tensor:
    """Mean over the three spatial axes, summed in float32 at least: (B, C, r, r, r) -> (B, C)."""
    return x.mean(dim=(2, 3, 4), dtype=torch.promote_types(x.dtype, torch.float32))


def initialise(module: nn.Module) -> None:
    """Keras' defaults, as in the published network: Glorot uniform weights, zero biases, unit batch norms."""
    if isinstance(module, nn.Conv3d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def fuse(convolution: nn.Module, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A convolution that does both, and an identity."""
    if isinstance(norm, nn.Identity):
        return convolution, norm
    return fuse_conv_bn_eval(convolution, norm), nn.Identity()  # type: ignore[type-var,arg-type]
