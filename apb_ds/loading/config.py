"""The settings of a model, validated before anything is read. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from apb_ds.config import check_bool, check_choice, check_integer, from_mapping

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("auto", "dummy")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, in which dtype, on which device.

    Parameters
    ----------
    path : str or None
        A local directory, a local ``.gguf`` file, ``package://<package>/<file>.gguf`` (a file in an installed Python
        package), or a hub id. None only for ``load_format="dummy"`` with a `geometry`.
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
    overrides : dict
        Config fields to replace, such as ``rope_parameters`` or ``max_position_embeddings``.
    trust_remote_code : bool
        Whether a model may run code from its repository. Default false.
    tokenizer : str or None
        Where the tokenizer is, if not with the model.
    adapter : str or None
        A peft adapter to merge into the weights: a local directory, ``package://<package>/<directory>`` or a hub id.
    retaining_heads : str or None
        Default heads for ``compressor=retaining_heads``: a ``.pt`` or ``.safetensors`` file, a directory,
        ``package://<package>/<path>`` or a hub id.

    Raises
    ------
    ValueError
        For a value out of its range, naming the field, the value and what is allowed.
    """

    path: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    load_format: str = "auto"
    num_layers: int | None = None
    geometry: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    tokenizer: str | None = None
    adapter: str | None = None
    retaining_heads: str | None = None

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, DTYPES)
        check_choice("model.device", self.device, DEVICES)
        check_choice("model.load_format", self.load_format, LOAD_FORMATS)
        check_bool("model.trust_remote_code", self.trust_remote_code)
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
        self._check_dummy()

    @property
    def is_dummy(self) -> bool:
        return self.load_format == "dummy"

    def _check_dummy(self) -> None:
        if self.num_layers is not None:
            check_integer("model.num_layers", self.num_layers, 1)
            if not self.is_dummy:
                raise ValueError(
                    f"model.num_layers={self.num_layers} needs model.load_format=dummy: real weights keep all layers."
                )
        if self.adapter is not None and self.is_dummy:
            raise ValueError(f"model.adapter={self.adapter!r} needs real weights; leave out model.load_format=dummy.")
        if self.path is None and not self.is_dummy:
            raise ValueError("model.path is missing: give a directory, a .gguf file or a hub id.")
        if self.path is None and not self.geometry:
            raise ValueError("model.load_format=dummy needs model.path or model.geometry to know the model's shape.")
        if self.geometry and "model_type" not in self.geometry:
            raise ValueError("model.geometry has no model_type; name one that transformers knows, such as llama.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from a mapping, see `from_mapping`."""
        return from_mapping(cls, values, "model")
