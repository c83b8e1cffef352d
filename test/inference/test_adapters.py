"""Adapter files: PEFT's own are read, and whatever would be read wrongly, or is no adapter at all, is refused."""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.adapters import matching_layers, read_adapter
from inference.backbones import BACKBONES
from inference.errors import UserError

LAYERS = [
    "patch_embed.proj",
    *(f"blocks.{n}.{name}" for n in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1")),
]
TARGET = r"blocks\.\d+\.attn\.(qkv|proj)"
PREFIX = "base_model.model."
RANK, WIDTH = 4, 8


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    names = [layer for layer in LAYERS if re.fullmatch(TARGET, layer)]
    pairs = {f"{PREFIX}{name}.lora_A.weight": torch.randn(RANK, WIDTH) for name in names}
    pairs |= {f"{PREFIX}{name}.lora_B.weight": torch.randn(3 * WIDTH, RANK) for name in names}
    return pairs | {f"{PREFIX}head.weight": torch.randn(1, WIDTH), f"{PREFIX}head.bias": torch.randn(1)}


def write(folder: Path, state: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """An adapter in `folder` as PEFT saves it, with `changes` to its configuration; KeyError removes an entry."""
    from peft import LoraConfig

    folder.mkdir(exist_ok=True)
    LoraConfig(r=RANK, lora_alpha=8, target_modules=TARGET, modules_to_save=["head"]).save_pretrained(folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not KeyError}))
    save_file(tensors() if state is None else state, folder / "adapter_model.safetensors")
    return folder


def test_reads_what_peft_saves(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path), LAYERS)
    assert adapter.scale == 8 / RANK and len(adapter.lora) == 4
    a, b = adapter.lora["blocks.1.attn.qkv"]
    assert torch.equal(a, tensors()[f"{PREFIX}blocks.1.attn.qkv.lora_A.weight"]) and b.shape == (3 * WIDTH, RANK)
    assert read_adapter(write(tmp_path, use_rslora=True), LAYERS).scale == 8 / math.sqrt(RANK)
    listed = write(tmp_path, target_modules=["qkv", "attn.proj"])
    assert read_adapter(listed, LAYERS).lora.keys() == adapter.lora.keys()
    half = {name: value.half() for name, value in tensors().items()}
    assert read_adapter(write(tmp_path, half), LAYERS).head["weight"].dtype == torch.float32
    older = write(tmp_path, qalora_group_size=KeyError, use_dora=KeyError, lora_bias=KeyError, megatron_core=KeyError)
    read_adapter(older, LAYERS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("rank_pattern", {"qkv": 8}),
        ("peft_type", "IA3"),
        ("alpha_pattern", {"qkv": 8}),
        ("layers_to_transform", [0]),
        ("lora_bias", True),
        ("exclude_modules", ["qkv"]),
        ("target_parameters", ["x"]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("layer_replication", [[0, 1]]),
        ("use_qalora", True),
        ("trainable_token_indices", [1]),
        ("a_new_one", "yes"),
        ("r", 0),
        ("r", -1),
        ("r", True),
        ("r", "4"),
        ("r", 10**400),
        ("r", KeyError),
        ("r", 8),
        ("lora_alpha", math.nan),
        ("lora_alpha", math.inf),
        ("lora_alpha", 10**400),
        ("lora_alpha", 0),
        ("lora_alpha", None),
        ("target_modules", []),
        ("target_modules", ""),
        ("target_modules", "all-linear"),
        ("target_modules", "blocks.*"),
        ("target_modules", ["proj", "qkv"]),
    ],
)
def test_refuses_settings_that_are_not_plain_lora(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected|adapts|pair of rank") as caught:
        read_adapter(write(tmp_path, **{key: value}), LAYERS)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize(
    "target",
    [
        None,
        5,
        {"qkv": 1},
        [1],
        ["x"] * 5000,
        "(",
        "x" * 501,
        "(a+)+b",
        "(a|a)*b",
        r"(.*)\1",
        "(?=a)b",
        "a*" * 5,
        "a?" * 20,
        "(a|b)" * 20,
        "a{1,99999999999}",
    ],
)
def test_refuses_expressions_that_may_never_end(target: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a list of names, or a regular expression"):
        read_adapter(write(tmp_path, target_modules=target), LAYERS)


def test_expressions_that_are_let_through_are_fast(tmp_path: Path) -> None:
    """The worst that pass the check, against the names of the largest base; and every target of the table passes."""
    names = [
        f"blocks.{n}.mlp.{part}"
        for n in range(40)
        for part in ("fc1_g", "fc1_x", "fc2", "aaaaaaaaaaaaaaaaaaaaaaaaaaaa")
    ]
    for target in (
        ".*" * 4 + "!",
        "(a|a)" * 12 + "!",
        ".*(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a).*.*!",
        "(.|.|.|.)" * 4 + ".*!",
    ):
        start = time.process_time()
        with pytest.raises(UserError, match="expected 0 by its targets"):
            read_adapter(write(tmp_path, target_modules=target), names)
        assert time.process_time() - start < 5
    for row in BACKBONES.values():
        for target in row.targets.values():
            with pytest.raises(UserError, match="expected 0 by its targets"):
                read_adapter(write(tmp_path, target_modules=target), ["other"])


def test_targets_match_as_in_peft() -> None:
    assert matching_layers(LAYERS, ["proj"]) == {"patch_embed.proj", "blocks.0.attn.proj", "blocks.1.attn.proj"}
    assert matching_layers(LAYERS, ["roj", "attn", "patch_embed.proj"]) == {"patch_embed.proj"}
    assert matching_layers(LAYERS, "proj") == set()
    assert matching_layers(["proj"], ["proj"]) == {"proj"}


def changed(**changes: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors with some replaced, or removed by None; names without the common part."""
    state = tensors() | {name if ":" in name else PREFIX + name: value for name, value in changes.items()}
    return {name.removeprefix(":"): value for name, value in state.items() if value is not None}


Q = "blocks.0.attn.qkv.lora_"


@pytest.mark.parametrize(
    "state",
    [
        {},
        {f"{Q}A.weight": None},
        {f"{Q}B.weight": None},
        {"head.weight": None},
        {"head.bias": None},
        {"head.weight": torch.zeros(2, WIDTH)},
        {"head.weight": torch.zeros(WIDTH)},
        {"head.weight": torch.tensor(1.0)},
        {"head.bias": torch.zeros(2)},
        {f"{Q}A.weight": torch.zeros(5, WIDTH)},
        {f"{Q}B.weight": torch.zeros(24, 5)},
        {f"{Q}A.weight": torch.zeros(RANK)},
        {f"{Q}A.weight": torch.zeros(RANK, WIDTH, 1, 1)},
        {f"{Q}A.weight": torch.full((RANK, WIDTH), math.nan)},
        {f"{Q}B.weight": torch.full((24, RANK), math.inf)},
        {"head.bias": torch.tensor([math.nan])},
        {f"{Q}A.weight": torch.zeros(RANK, WIDTH, dtype=torch.int32)},
        {"blocks.0.mlp.fc1.lora_A.weight": torch.zeros(RANK, WIDTH)},
        {"blocks.0.attn.qkv.bias": torch.zeros(24)},
        {f":{Q}A.weight": torch.zeros(RANK, WIDTH)},
        {"blocks.0.attn.qkv.lora_magnitude_vector": torch.zeros(24)},
    ],
)
def test_refuses_tensors_that_do_not_fit(state: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"export|train"):
        read_adapter(write(tmp_path, changed(**state) if state else {}), LAYERS)


def test_a_convolutions_second_factor_is_one_by_one(tmp_path: Path) -> None:
    layer = f"{PREFIX}blocks.0.conv"
    state = {
        f"{layer}.lora_A.weight": torch.zeros(RANK, WIDTH, 3, 3),
        f"{layer}.lora_B.weight": torch.zeros(8, RANK, 1, 1),
    }
    state |= {name: value for name, value in tensors().items() if "head" in name}
    read_adapter(write(tmp_path, state, target_modules=["conv"]), ["blocks.0.conv"])
    state[f"{layer}.lora_B.weight"] = torch.zeros(8, RANK, 3, 3)
    with pytest.raises(UserError, match="pair of rank"):
        read_adapter(write(tmp_path, state, target_modules=["conv"]), ["blocks.0.conv"])


class Payload:
    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('a pickle was opened')",))


def test_refuses_files_that_are_not_safetensors(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    right = file.read_bytes()
    header = b'{"x": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 4]}}'
    for content in (
        b"",
        b"x",
        pickle.dumps(Payload()),
        struct.pack("<Q", 1 << 62),
        struct.pack("<Q", 99_000_000) + b"{",
        struct.pack("<Q", len(header)) + header + b"abcd",
        struct.pack("<Q", 50_000) + b"[" * 50_000,
        right[:-1],
        right + b"x",
        right.replace(b"F32", b"F99"),
        right.replace(b'"shape":[4,8]', b'"shape":[4,9]'),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match="expected safetensors"):
            read_adapter(tmp_path, LAYERS)
    torch.save(load_file(write(tmp_path) / file.name), file)
    with pytest.raises(UserError, match="expected safetensors"):
        read_adapter(tmp_path, LAYERS)
    file.unlink()
    with pytest.raises(UserError, match="expected safetensors"):
        read_adapter(tmp_path, LAYERS)


def test_refuses_configurations_that_are_not_json(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "adapter_config.json"
    for content in (b"", b"[]", b"null", b"\xff", b"{" * 100_000, b"{}"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="export"):
            read_adapter(tmp_path, LAYERS)
    file.unlink()
    with pytest.raises(UserError, match="expected PEFT's configuration"):
        read_adapter(tmp_path, LAYERS)
