"""Reading and writing heads: ``.pt`` or safetensors files with the keys of the published checkpoints.

    model.layers.{i}.self_attn.fc1.weight  (hidden, (heads + 2 kv_heads) head_dim)
    model.layers.{i}.self_attn.fc2.weight  (kv_heads, hidden)

Other keys are ignored. A ``.pt`` is read as tensors only: no code in it runs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apb_ds.compressors.retaining_heads.module import HeadSizes, RetainingHeads, weight_key
from apb_ds.utils.text import kind_and_line, list_some

SAFETENSORS = ".safetensors"
TORCH_SUFFIXES = (".pt", ".bin", ".pth")
FILE_PATTERNS = tuple(f"*{suffix}" for suffix in (SAFETENSORS, *TORCH_SUFFIXES))
HEAD_KEY = re.compile(r"model\.layers\.(\d+)\.self_attn\.(fc1|fc2)\.(weight|bias)")
FIELD = "retaining_heads"


def read_heads(path: Path, sizes: HeadSizes, field: str = FIELD) -> RetainingHeads:
    """Read a checkpoint on the CPU, in its own dtype.

    Parameters
    ----------
    path : Path
        A ``.safetensors``, ``.pt``, ``.bin`` or ``.pth`` file, or a directory of them.
    sizes : HeadSizes
        Of the model that the heads are for.
    field : str
        The setting that the path comes from, for messages.

    Raises
    ------
    ValueError
        If the file does not exist or cannot be read as tensors, or if heads are missing, misshaped, or another model's,
        listing them.
    """
    try:
        return _heads_from(read_state(path), sizes)
    except ValueError as error:
        raise ValueError(f"{field}={str(path)!r}: {error}") from error


def _heads_from(state: dict[str, Tensor], sizes: HeadSizes) -> RetainingHeads:
    found = check_state(state, sizes)
    unusable = [key for key, tensor in found.items() if not bool(tensor.isfinite().all())]
    if unusable:
        raise ValueError(f"{list_some(unusable)} has values that are not finite; train or download it again.")
    pairs = [(found[weight_key(layer, "fc1")], found[weight_key(layer, "fc2")]) for layer in range(sizes.num_layers)]
    return RetainingHeads(pairs, sizes.activation).requires_grad_(False)


def check_state(state: Mapping[str, Tensor], sizes: HeadSizes) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint that are heads, which must be exactly those that the model needs.

    Raises
    ------
    ValueError
        If some are missing, misshaped, or another model's.
    """
    found = {key: tensor for key, tensor in state.items() if HEAD_KEY.fullmatch(key)}
    wanted = [weight_key(layer, name) for layer in range(sizes.num_layers) for name in ("fc1", "fc2")]
    missing = [key for key in wanted if key not in found]
    if len(missing) == len(wanted):
        raise ValueError(f"it has no retaining heads, whose keys look like {wanted[0]}.")
    foreign = [key for key in found if key not in wanted]
    if missing or foreign:
        what = [f"lacks {list_some(missing)}"] if missing else []
        what += [f"has {list_some(foreign)}, which do not belong there"] if foreign else []
        raise ValueError(
            f"it does not fit a model of {sizes.num_layers} layers: it {' and '.join(what)}; use heads that were made "
            "for this model."
        )
    _check_shapes(found, sizes)
    return found


def _check_shapes(found: dict[str, Tensor], sizes: HeadSizes) -> None:
    matrices = (found[weight_key(layer, "fc1")] for layer in range(sizes.num_layers))
    hidden = next((tensor.shape[0] for tensor in matrices if tensor.dim() == 2), 0)
    expected = {"fc1": (hidden, sizes.qkv_size), "fc2": (sizes.kv_heads, hidden)}
    wrong = defaultdict(list)
    for key, tensor in found.items():
        name = key.split(".")[-2]
        if tuple(tensor.shape) != expected[name] or not tensor.is_floating_point() or hidden == 0:
            dtype = "" if tensor.is_floating_point() else f" of {tensor.dtype}"
            wrong[f"is {tuple(tensor.shape)}{dtype}, not {expected[name]}"].append(key)
    if wrong:
        listed = "; ".join(f"{list_some(keys)} {what}" for what, keys in wrong.items())
        raise ValueError(
            f"{listed}. The model has {sizes.heads} heads and {sizes.kv_heads} KV heads of {sizes.head_dim}, so "
            f"[q; k; v] has {sizes.qkv_size} channels; use heads that were made for this model."
        )


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, or of all files of a directory (its safetensors, if it has any).

    Raises
    ------
    ValueError
        If there is no file of heads, or one cannot be read as tensors.
    """
    if path.is_file():
        return _read_file(path)
    if not path.is_dir():
        raise ValueError(f"{path.absolute()} does not exist; correct the path.")
    files = sorted(path.glob(FILE_PATTERNS[0])) or sorted(file for name in FILE_PATTERNS for file in path.glob(name))
    if not files:
        raise ValueError(f"{path.absolute()} is a directory without {', '.join(FILE_PATTERNS)}; name the file.")
    state: dict[str, Tensor] = {}
    for file in files:
        part = _read_file(file)
        twice = sorted(key for key in part.keys() & state.keys() if HEAD_KEY.fullmatch(key))
        if twice:
            raise ValueError(f"{file.name} and another file in the directory both have {list_some(twice)}; name one.")
        state |= part
    return state


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix not in (SAFETENSORS, *TORCH_SUFFIXES):
        raise ValueError(f"{file.name} is not one of {', '.join(FILE_PATTERNS)}; name a file that holds heads.")
    try:
        if file.suffix == SAFETENSORS:
            from safetensors.torch import load_file

            return load_file(file)
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, from pickle, zipfile, safetensors and torch
        raise ValueError(
            f"{file.absolute()} cannot be read as tensors ({kind_and_line(error)}); it is damaged, or holds other "
            "objects, which are not loaded because that would run code."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.absolute()} holds a {type(content).__name__}, not tensors by name.")
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def write_heads(heads: RetainingHeads, file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write heads as safetensors under the names of the published checkpoints."""
    write_state(dict(heads.published_state()), file, metadata)


def write_state(state: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors; the file appears whole or not at all."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    save_file(
        {key: tensor.contiguous().cpu() for key, tensor in state.items()}, partial, {"format": "pt", **(metadata or {})}
    )
    partial.replace(file)
