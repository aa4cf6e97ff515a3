"""What is checked before anything heavy is imported: the method's settings, which need no torch."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from apb_ds.config import APBConfig, name_keys
from apb_ds.plan import check_ranks

HEADS_KEY = "retaining_heads"  # not a field of APBConfig


def check_early(config: DictConfig) -> None:
    """Raise ValueError, or OmegaConf's own errors, for settings of the method that cannot run on a single rank."""
    if "method" not in config:
        return
    values = OmegaConf.to_container(config.method, resolve=True)
    assert isinstance(values, dict)
    fields = {str(name): value for name, value in values.items() if name != HEADS_KEY}
    try:
        check_ranks(APBConfig.from_dict(fields), 1)
    except ValueError as error:
        raise ValueError(name_keys(str(error), of_method=True)) from error
