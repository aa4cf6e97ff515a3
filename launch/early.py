"""What is checked before anything heavy is imported: the method's settings, which need no torch, and the geometry."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from apb_ds.config import HEADS_KEY, APBConfig, name_keys
from apb_ds.plan import check_ranks

from .arguments import overrides_of

GEOMETRY = "model.geometry"


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


def put_geometry_in_force(config: DictConfig, overrides: Sequence[str]) -> None:
    """Copy the fields of model.geometry that the command line sets to model.overrides.

    A model's group brings a geometry for where its files are missing. What a user changes in it must hold where they
    are there, too.

    Raises
    ------
    ValueError
        If the weights are real, and have their own geometry.
    """
    geometry = OmegaConf.select(config, GEOMETRY)
    if not geometry:
        return
    for key in overrides_of(overrides):
        if key != GEOMETRY and not key.startswith(f"{GEOMETRY}."):
            continue
        if OmegaConf.select(config, "model.load_format") != "dummy":
            field = key.removeprefix(GEOMETRY).removeprefix(".") or "<field>"
            raise ValueError(
                f"{key} is for random weights, and would be ignored: real ones have their model's geometry. Set "
                f"model.load_format=dummy, or replace a field of the model's config with +model.overrides.{field}=..."
            )
        names = [key.split(".")[2]] if key != GEOMETRY else list(geometry)
        for name in names:
            if name in geometry and name not in (config.model.overrides or {}):
                OmegaConf.update(config, f"model.overrides.{name}", geometry[name], force_add=True)
