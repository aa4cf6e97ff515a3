"""The settings of a model, validated before anything is read. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from apb_ds.config import check_bool, check_choice, check_integer, from_mapping

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("auto", "dummy")
# Overrides that change positions, and no weight.
POSITION_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings")
PACKAGE_SCHEME = "package://"
LOCAL_PREFIXES = ("/", ".", "~")  # of a path that cannot be a hub id


def check_shard_weights(field: str, value: object) -> None:
    """Raise ValueError unless `value` is true, false or ``auto``."""
    if not isinstance(value, bool) and value != "auto":
        raise ValueError(f"{field}={value!r} must be true, false or auto.")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, in which dtype, on which device.

    Parameters
    ----------
    path : str or None
        A local directory, a local ``.gguf`` file, ``package://<package>/<file>.gguf`` (a file in an installed Python
        package), or a hub id, with or without a revision (``org/name@revision``). None only for
        ``load_format="dummy"`` with a `geometry`.
    revision : str or None
        A branch, tag or commit of the hub id in `path`, where it is added: another way to write it.
    dtype : str
        ``auto`` (bfloat16 on CUDA, float32 on CPU), ``float32``, ``bfloat16`` or ``float16``.
    device : str
        ``auto`` (CUDA if available), ``cpu`` or ``cuda``.
    load_format : str
        ``auto`` reads the weights; ``dummy`` makes random ones on the device, for benchmarks.
    num_layers : int or None
        Number of decoder layers to keep. ``dummy`` only.
    geometry : dict
        Fields of a transformers config, including `model_type`: what ``dummy`` builds if the path is not available.
    ignore_keys : list of str
        Patterns (``v_head.*``) of tensors in the weight files that the model does not use, to be skipped.
        Without them, such tensors are an error.
    overrides : dict
        Config fields to replace, such as ``rope_parameters`` or ``max_position_embeddings``.
    trust_remote_code : bool
        Whether a model may run code from its repository. Default false.
    tokenizer : str or None
        Where the tokenizer is, if not with the model.
    adapter : str or None
        A peft adapter to merge into the weights: a local directory, ``package://<package>/<directory>`` or a hub id.
    shard_weights : bool or str
        Keep one copy of the weights over all ranks, each a part; no rank ever has more than one weight whole. ``auto``:
        where a copy does not fit on every rank.
    retaining_heads : str or None
        Default heads for ``compressor=retaining_heads``: a ``.pt`` or ``.safetensors`` file, a directory,
        ``package://<package>/<path>`` or a hub id.

    Raises
    ------
    ValueError
        For a value out of its range, naming the field, the value and what is allowed.
    """

    path: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    load_format: str = "auto"
    num_layers: int | None = None
    geometry: dict[str, Any] = field(default_factory=dict)
    ignore_keys: list[str] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    tokenizer: str | None = None
    adapter: str | None = None
    shard_weights: bool | str = False
    retaining_heads: str | None = None

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, DTYPES)
        check_choice("model.device", self.device, DEVICES)
        check_choice("model.load_format", self.load_format, LOAD_FORMATS)
        check_bool("model.trust_remote_code", self.trust_remote_code)
        check_shard_weights("model.shard_weights", self.shard_weights)
        for name, file in (
            ("path", ", a .gguf file"),
            ("tokenizer", ", a .gguf file"),
            ("adapter", ""),
            ("retaining_heads", ", a .pt or .safetensors file"),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"model.{name}={value!r} must be a directory{file} or a hub id.")
        for name in ("geometry", "overrides"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"model.{name}={getattr(self, name)!r} must be a mapping of config fields.")
        if isinstance(self.ignore_keys, str):
            object.__setattr__(self, "ignore_keys", [self.ignore_keys])
        if not isinstance(self.ignore_keys, list) or not all(isinstance(key, str) and key for key in self.ignore_keys):
            raise ValueError(f"model.ignore_keys={self.ignore_keys!r} must be a list of patterns, such as [v_head.*].")
        self._check_dummy()
        self._add_revision()

    @property
    def is_dummy(self) -> bool:
        return self.load_format == "dummy"

    def shares_weights_with(self, other: ModelConfig) -> bool:
        """Whether the two differ at most in overrides of positions."""
        mine, others = (
            {name: value for name, value in config.overrides.items() if name not in POSITION_FIELDS}
            for config in (self, other)
        )
        return replace(self, overrides=mine) == replace(other, overrides=others)

    def _check_dummy(self) -> None:
        if self.num_layers is not None:
            check_integer("model.num_layers", self.num_layers, 1)
            if not self.is_dummy:
                raise ValueError(
                    f"model.num_layers={self.num_layers} needs model.load_format=dummy: real weights keep all layers."
                )
        if self.adapter is not None and self.is_dummy:
            raise ValueError(f"model.adapter={self.adapter!r} needs real weights; leave out model.load_format=dummy.")
        for name in ("revision", "ignore_keys"):
            if getattr(self, name) and self.is_dummy:
                raise ValueError(
                    f"model.{name}={getattr(self, name)!r} needs real weights; leave out model.load_format=dummy."
                )
        if self.path is None and not self.is_dummy:
            raise ValueError("model.path is missing: give a directory, a .gguf file or a hub id.")
        if self.path is None and not self.geometry:
            raise ValueError("model.load_format=dummy needs model.path or model.geometry to know the model's shape.")
        if self.geometry and "model_type" not in self.geometry:
            raise ValueError("model.geometry has no model_type; name one that transformers knows, such as llama.")

    def _add_revision(self) -> None:
        """Write the revision behind the hub id."""
        if self.revision is None:
            return
        if not isinstance(self.revision, str) or not self.revision:
            raise ValueError(f"model.revision={self.revision!r} must be a branch, tag or commit; quote a number.")
        path, _, named = str(self.path).partition("@")
        if path.startswith((*LOCAL_PREFIXES, PACKAGE_SCHEME)) or path.lower().endswith(".gguf"):
            raise ValueError(
                f"model.revision={self.revision!r} is for a hub id, and model.path={self.path!r} is not one; leave it "
                "out."
            )
        if named and named != self.revision:
            raise ValueError(
                f"model.revision={self.revision!r} and model.path={self.path!r} name different revisions; give one of "
                "them."
            )
        object.__setattr__(self, "path", f"{path}@{self.revision}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from a mapping, see `from_mapping`."""
        return from_mapping(cls, values, "model")
