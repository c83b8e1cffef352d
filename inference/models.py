"""The forward passes of the table's three families, over named tensors instead of modules.

A job needs no constructor, no initialisation and no import of timm, which together cost more than a small job's forward
pass. Tensor names are timm's; tests hold every backbone equal to timm's own module. All folds run in one pass: a tensor
that an adapter changes comes with a leading fold axis, everything else is shared.

Shapes: G is 1 until the first adapted layer and F (folds) from there, B crops x views, T tokens, C channels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from .backbones import Backbone
    from .weights import Weights


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(G, ..., C) to (G, ..., O); with a weight per fold (F, O, C) to (F, ..., O), whatever G is.

    One product per fold, written into its slice: on the CPU a batched product would run each fold on fewer cores.
    """
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    out = x.new_empty(len(weight), *x.shape[1:-1], weight.shape[1])
    for f, rows in enumerate(out.flatten(1, -2)):
        columns, biases = x[f % len(x)].flatten(0, -2), bias if bias is None or bias.ndim == 1 else bias[f]
        if biases is None:
            torch.mm(columns, weight[f].mT, out=rows)
        else:
            torch.addmm(biases, columns, weight[f].mT, out=rows)
    return out


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, padding: int = 0, groups: int = 1
) -> torch.Tensor:
    """(G, B, C, H, W) to (G, B, O, H', W'); with a weight per fold (F, O, C, K, K) to (F, B, O, H', W')."""
    if weight.ndim == 4:
        out = F.conv2d(x.flatten(0, 1), weight, bias, stride, padding, groups=groups)
        return torch.unflatten(out, 0, x.shape[:2])
    biases = [bias if bias is None or bias.ndim == 1 else bias[f] for f in range(len(weight))]
    return torch.stack(
        [F.conv2d(x[f % len(x)], kernel, biases[f], stride, padding, groups=groups) for f, kernel in enumerate(weight)]
    )


def layer_norm(x: torch.Tensor, w: Weights, name: str, eps: float) -> torch.Tensor:
    """Normalise the fp32 residual stream; the result is in the weights' precision."""
    weight, bias = w.fp32(f"{name}.weight"), w.fp32(f"{name}.bias")
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(w.dtype)


def add(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x + scale * y on the residual stream, in place unless y is the first with a fold axis."""
    return x.addcmul_(y, scale) if x.shape == y.shape else torch.addcmul(x, y, scale)


def layer_scale(w: Weights, name: str, like: torch.Tensor) -> torch.Tensor:
    """A branch's factors (C,), or 1 where the backbone has no LayerScale, as the original ViT."""
    return w.fp32(name) if name in w.names else like.new_ones((), dtype=torch.float32)


def dense(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    return linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def depth_of(w: Weights) -> int:
    """Number of blocks (or stages) that the base holds."""
    return 1 + max(int(name.split(".")[1]) for name in w.names if name.startswith("blocks."))


def attention(
    x: torch.Tensor,
    w: Weights,
    name: str,
    heads: int,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    queries: int | None,
) -> torch.Tensor:
    """Self-attention over (G, B, T, C), fold by fold; only the first `queries` tokens are queries, if given."""
    weight, bias = w[f"{name}.qkv.weight"], w.get(f"{name}.qkv.bias")
    folds = range(len(weight) if weight.ndim == 3 else len(x))
    out = []
    for f in folds:
        qkv = F.linear(
            x[f % len(x)],
            weight[f] if weight.ndim == 3 else weight,
            bias[f] if bias is not None and bias.ndim == 2 else bias,
        )
        q, k, v = torch.unflatten(qkv, -1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, T, C / heads)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out.append(attend(q[:, :, :queries], k, v).transpose(1, 2).flatten(2))  # (B, T, C)
    return dense(torch.stack(out), w, f"{name}.proj")


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, each (B, heads, T, D).

    On the CPU as two matrix products: twice as fast here as PyTorch's fused kernel at a crop's few hundred tokens.
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    return torch.matmul(torch.matmul(q * q.shape[-1] ** -0.5, k.mT).softmax(-1), v)


def gated(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """silu(gate) * value, in place unless only `value` has a fold axis."""
    gate = F.silu(gate, inplace=True)
    return gate * value if len(value) > len(gate) else gate.mul_(value)


def mlp(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    """GELU, packed SwiGLU (fc1 holds gate and value) or split SwiGLU (fc1_g, fc1_x), by the names and widths found."""
    if f"{name}.fc1_g.weight" in w.names:
        hidden = gated(dense(x, w, f"{name}.fc1_g"), dense(x, w, f"{name}.fc1_x"))
    else:
        hidden = dense(x, w, f"{name}.fc1")
        if hidden.shape[-1] == w.shape(f"{name}.fc2.weight")[-1]:
            hidden = F.gelu(hidden)
        else:
            hidden = gated(*hidden.chunk(2, -1))
    return dense(hidden, w, f"{name}.fc2")


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of the patch tokens of (B, heads, T, D); the first T - len(cos) tokens have none."""
    patches = x[:, :, -len(cos) :].float()
    left, right = patches.chunk(2, -1)
    turned = patches * cos + torch.cat([-right, left], -1) * sin
    return torch.cat([x[:, :, : -len(cos)], turned.to(x.dtype)], 2)


def dinov3_rope(grid: int, head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """DINOv3's axial rotary embedding (temperature 100) of grid x grid patches: cos, sin (grid^2, head_dim)."""
    periods = 100 ** (torch.arange(head_dim // 4) / (head_dim // 4))
    axis = (torch.arange(grid) + 0.5) / grid * 2 - 1
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, 2, 1)
    angles = (2 * math.pi * places / periods).flatten(1).repeat(1, 2).to(device)
    return angles.cos(), angles.sin()


def position_embedding(w: Weights, grid: int, prefix: int) -> torch.Tensor:
    """The learned positions (1, T, C) in fp32, resampled as the manifest says where the grid is not the base's own."""
    table = w.fp32("pos_embed")
    native = math.isqrt(table.shape[1])
    prefix = 0 if native**2 == table.shape[1] else prefix
    native = math.isqrt(table.shape[1] - prefix)
    if native == grid:
        return table
    square = torch.unflatten(table[:, prefix:], 1, (native, native)).permute(0, 3, 1, 2)
    square = F.interpolate(square, (grid, grid), mode="bicubic", antialias=w.positions == "antialiased")
    return torch.cat([table[:, :prefix], square.flatten(2).mT], 1)


def vit(x: torch.Tensor, w: Weights, backbone: Backbone, pool: str) -> torch.Tensor:
    """ViT and DINOv3: (B, 3, S, S) to pooled features (G, B, C) or (G, B, 2C)."""
    dinov3, heads, eps = backbone.family == "dinov3", backbone.heads, backbone.eps
    scale = ("gamma_1", "gamma_2") if dinov3 else ("ls1.gamma", "ls2.gamma")
    kernel = w["patch_embed.proj.weight"]
    patches = conv2d(x.to(w.dtype)[None], kernel, w["patch_embed.proj.bias"], kernel.shape[-1])
    grid = patches.shape[-1]
    tokens = patches.flatten(3).mT.float()  # (G, B, T, C); the residual stream stays in fp32
    prefix = [w.fp32(name).expand(*tokens.shape[:2], -1, -1) for name in ("cls_token", "reg_token") if name in w.names]
    count = sum(token.shape[2] for token in prefix)
    rope = None
    if dinov3:
        rope = dinov3_rope(grid, tokens.shape[-1] // heads, x.device)
        x = torch.cat([*prefix, tokens], 2)
    else:
        positions = position_embedding(w, grid, count)
        if positions.shape[1] == grid**2:  # there are positions for patches only
            x = torch.cat([*prefix, tokens + positions], 2)
        else:
            x = torch.cat([*prefix, tokens], 2) + positions
    depth = depth_of(w)
    for n in range(depth):
        block = f"blocks.{n}"
        # the last block's output is needed only for the tokens that are pooled
        queries = 1 if pool == "token" and n == depth - 1 else None
        y = attention(layer_norm(x, w, f"{block}.norm1", eps), w, f"{block}.attn", heads, rope, queries)
        x = add(x[:, :, :queries], y, layer_scale(w, f"{block}.{scale[0]}", y))
        y = mlp(layer_norm(x, w, f"{block}.norm2", eps), w, f"{block}.mlp")
        x = add(x, y, layer_scale(w, f"{block}.{scale[1]}", y))
    x = F.layer_norm(x, x.shape[-1:], w.fp32("norm.weight"), w.fp32("norm.bias"), eps)
    parts = {"token": x[:, :, 0], "avg": x[:, :, count:].mean(2)} if pool != "token" else {"token": x[:, :, 0]}
    return torch.cat([parts[part] for part in pool.split("+")], -1)


LITE_STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of each stage's first block


def same_pad(x: torch.Tensor, kernel: int, stride: int) -> tuple[torch.Tensor, int]:
    """TensorFlow's SAME padding of (..., H, W, C): returns the padding that is left to the convolution, on all sides.

    An odd pixel goes after the image, which a convolution cannot do; only then is a copy made.
    """
    needs = [max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in (x.shape[-2], x.shape[-3])]
    if needs[0] == needs[1] and needs[0] % 2 == 0:
        return x, needs[0] // 2
    return F.pad(x, [0, 0, *(part for need in needs for part in (need // 2, need - need // 2))]), 0


def convolution(
    x: torch.Tensor, w: Weights, conv: str, norm: str, stride: int = 1, depthwise: bool = False, relu6: bool = True
) -> torch.Tensor:
    """Convolution with its batch normalisation folded in: (G, B, H, W, C) to (G or F, B, H', W', O)."""
    weight, bias = w.convolution(conv, norm)
    kernel = weight.shape[-1]
    if kernel == 1 and stride == 1:
        x = linear(x, weight[..., 0, 0], bias)
    else:  # channels-last memory, seen as (G, B, C, H, W)
        x, padding = same_pad(x, kernel, stride)
        groups = x.shape[-1] if depthwise else 1
        x = conv2d(x.permute(0, 1, 4, 2, 3), weight, bias, stride, padding, groups).permute(0, 1, 3, 4, 2)
    return x.clamp_(0, 6) if relu6 else x


def efficientnet(x: torch.Tensor, w: Weights, backbone: Backbone, pool: str) -> torch.Tensor:
    """EfficientNet-Lite: (B, 3, S, S) to pooled features (G, B, C)."""
    x = x.to(w.dtype).permute(0, 2, 3, 1).contiguous()[None]  # (G, B, H, W, C)
    x = convolution(x, w, "conv_stem", "bn1", stride=2)
    for stage in range(depth_of(w)):
        blocks = 1 + max(int(name.split(".")[2]) for name in w.names if name.startswith(f"blocks.{stage}."))
        for n in range(blocks):
            block, entering = f"blocks.{stage}.{n}", x
            stride = LITE_STRIDES[stage] if n == 0 else 1
            if f"{block}.conv_pwl.weight" in w.names:  # expand, filter, project
                x = convolution(x, w, f"{block}.conv_pw", f"{block}.bn1")
                x = convolution(x, w, f"{block}.conv_dw", f"{block}.bn2", stride, depthwise=True)
                x = convolution(x, w, f"{block}.conv_pwl", f"{block}.bn3", relu6=False)
            else:  # the first stage only filters and projects
                x = convolution(x, w, f"{block}.conv_dw", f"{block}.bn1", stride, depthwise=True)
                x = convolution(x, w, f"{block}.conv_pw", f"{block}.bn2", relu6=False)
            if stride == 1 and x.shape[-1] == entering.shape[-1]:
                x = x + entering
    x = convolution(x, w, "conv_head", "bn2")
    return x.float().mean((2, 3))


def other(x: torch.Tensor, w: Weights, backbone: Backbone, pool: str) -> torch.Tensor:
    """Any other backbone, by timm's own module, fold after fold: (B, 3, S, S) to pooled features (F, B, C).

    Slower to start (timm is imported, and initialises the module once), and folds share memory but no computation.
    """
    from torch.func import functional_call

    from .backbones import build

    module = build(backbone, 0, pool).to(x.device).eval()
    names = [name for name in module.state_dict() if name in w.names]
    features = []
    for fold in range(len(w.adapters)):
        tensors = {name: w[name][fold] if name in w.adapted else w[name] for name in names}
        features.append(functional_call(module.to(w.dtype), tensors, (x.to(w.dtype),)).float())
    return torch.stack(features)


FORWARDS = {"vit": vit, "dinov3": vit, "efficientnet": efficientnet, "other": other}


def widest_layer(w: Weights, backbone: Backbone, size: int) -> int:
    """Values of the widest layer's activations for one view of side `size`, of all folds together."""
    if not backbone.heads:  # a convolutional network: about 96 channels at half the side, shared by most folds
        return 96 * (size // 2) ** 2
    *_, patch = w.shape("patch_embed.proj.weight")
    names = ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1_g.weight", "blocks.0.attn.qkv.weight")
    widest = max(w.shape(name)[0] for name in names if name in w.names)
    return len(w.adapters) * (size // patch) ** 2 * widest


def logits(x: torch.Tensor, w: Weights, backbone: Backbone, pool: str) -> torch.Tensor:
    """A normalised batch (B, 3, S, S) to fp32 logits (F, B), one per fold; the head is applied in fp32."""
    features = FORWARDS[backbone.family](x, w, backbone, pool)
    if w.head:
        return head(features, w)[..., 0]
    weight, bias = w.fp32("head.weight"), w.fp32("head.bias")  # (F, 1, C), (F, 1)
    return linear(features, weight, bias)[..., 0]


def head(x: torch.Tensor, w: Weights) -> torch.Tensor:
    """A head of several layers, of every fold its own: pooled features (G, B, C) to (F, B, 1)."""
    for n, layer in enumerate(w.head):
        if not layer.tensors:
            x = getattr(F, layer.kind)(x)
            continue
        weight, bias = w.fp32(f"head.{n}.weight"), w.fp32(f"head.{n}.bias")
        if layer.kind == "linear":
            x = linear(x, weight, bias)
        else:  # torch's own takes one weight for all folds
            x = F.layer_norm(x, x.shape[-1:], eps=layer.eps) * weight[:, None] + bias[:, None]
    return x
