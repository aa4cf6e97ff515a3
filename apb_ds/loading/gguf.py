"""GGUF files: converted once with transformers (many seconds), then kept as safetensors in the user's cache."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from apb_ds.loading.damage import lfs_damage
from apb_ds.loading.kept import broken_seal, cache_root, file_digest, make_directory, seal, settle
from apb_ds.loading.quiet import quiet_transformers
from apb_ds.ops.memory import is_out_of_memory
from apb_ds.utils.text import first_line, kind_and_line

LOCK_TIMEOUT_S = 600
# Raise this when conversion changes: it invalidates cached conversions.
CONVERSION_VERSION = 2
LOCK_MODE = 0o644

logger = logging.getLogger(__name__)


def convert_gguf(file: Path, field: str = "model.path") -> Path:
    """Return a directory with the file's config, tokenizer and float32 weights, converting it on first use.

    The directory's name is a hash of the file. It appears whole or not at all: one process converts while others that
    need it wait. Its files are checked by hash; if one has changed, the GGUF file is converted again.

    Parameters
    ----------
    field : str
        The setting that names the file, for messages.

    Raises
    ------
    ValueError
        If the cache cannot be written, or transformers cannot read the file.
    """
    from filelock import FileLock, Timeout

    try:
        pointer = lfs_damage(file)
        digest = file_digest(file)
    except OSError as error:
        raise ValueError(f"{field}: {file} cannot be read ({kind_and_line(error)}); check its permissions.") from error
    if pointer is not None:
        raise ValueError(f"{field}: {file} is not a GGUF file: {pointer}.")
    target = cache_root() / "gguf" / f"{digest}.{CONVERSION_VERSION}"
    if broken_seal(target) is None:
        return target
    try:
        make_directory(target.parent)
        with FileLock(f"{target}.lock", timeout=LOCK_TIMEOUT_S, mode=LOCK_MODE):
            broken = broken_seal(target)
            if broken is not None:
                if target.exists():
                    logger.warning("The conversion of %s has changed: %s. Converting it again.", file.name, broken)
                else:
                    logger.info("Converting %s; this happens once and takes a moment.", file.name)
                _convert_into(file, target)
    except Timeout as error:
        raise ValueError(
            f"{field}: {file}: another process has been converting it for {LOCK_TIMEOUT_S} s; try again."
        ) from error
    except OSError as error:
        raise ValueError(
            f"{field}: {file}: cannot save its conversion in {target.parent} ({error}); set APB_DS_CACHE to a writable "
            "directory."
        ) from error
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    return target


def _convert_into(file: Path, target: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f"{target.name[:12]}.", dir=target.parent))
    try:
        # The reader's progress bar goes to stderr whatever transformers' settings are.
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            _write_model(file, scratch)
        seal(scratch)
        settle(scratch)
        _replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace(made: Path, target: Path) -> None:
    """Move a directory to `target`, replacing what is there; processes keep the old files that they have open."""
    if not target.exists():
        made.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f"{target.name[:12]}.", dir=target.parent))
    try:
        target.rename(old / target.name)
        made.rename(target)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _write_model(file: Path, directory: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tokenizer, model = _read_model(file)
    _name_special_tokens(tokenizer, model.config)
    tokenizer.save_pretrained(directory)
    _drop_foreign_tokens(directory / "tokenizer.json", model.get_input_embeddings().num_embeddings)
    try:
        save_file(_unshared_tensors(model), directory / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # raised when the disk is full
        raise OSError(first_line(error)) from error
    config = model.config.to_dict()
    # The config still says quantized, but the weights are plain float32 now.
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


def _name_special_tokens(tokenizer: Any, config: Any) -> None:
    """Set the tokenizer's begin and end tokens to the model's: some versions of transformers guess wrongly."""
    for name in ("bos", "eos"):
        token_id = getattr(config, f"{name}_token_id", None)
        if isinstance(token_id, int) and token_id != getattr(tokenizer, f"{name}_token_id"):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token_id))


def _drop_foreign_tokens(file: Path, num_embeddings: int) -> None:
    """Remove added tokens that the model has no embedding for.

    transformers adds an ``<|endoftext|>`` to every byte-level vocabulary, even if the file has no such token.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    kept = [token for token in values["added_tokens"] if token["id"] < num_embeddings]
    if len(kept) < len(values["added_tokens"]):
        file.write_text(json.dumps({**values, "added_tokens": kept}, ensure_ascii=False), encoding="utf-8")


def _read_model(file: Path) -> tuple[Any, Any]:
    """Return tokenizer and model, in float32.

    Raises
    ------
    ValueError
        Naming the file, if it cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        return tokenizer, AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except ImportError as error:
        raise ValueError(f"{file} needs a package that is not installed ({first_line(error)}); install it.") from error
    except Exception as error:  # of many kinds: the reader trusts the file
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"transformers cannot read {file} ({file.stat().st_size} bytes) as a GGUF file ({kind_and_line(error)}). "
            "If transformers knows its architecture, the file is damaged or truncated: copy or download it again."
        ) from error


def _unshared_tensors(model: Any) -> dict[str, Any]:
    """Return the state dict with each storage once: loading ties shared weights again."""
    import torch

    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.to(torch.float32).contiguous()
    return tensors
