"""This package's config groups in other applications: ``defaults: [apb_ds/method: apb]``.

Hydra finds plugins by the name of this folder, in every application of an environment, so nothing heavy is imported.
"""

from __future__ import annotations

from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin

PREFIX = "apb_ds"
GROUPS = ("method", "model")  # the others are for this package's commands
_ROOT = Path(__file__).resolve().parents[1]
# In an installed package, and in a checkout.
CONFIGS = next(folder for folder in (_ROOT / "apb_ds" / "configs", _ROOT / "configs") if folder.is_dir())


class PrefixedSource(ConfigSource):
    """Some groups of a folder within the group ``apb_ds``, so that an application can have its own ``method``."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self._files = FileConfigSource(provider, self.path)

    @staticmethod
    def scheme() -> str:
        return PREFIX

    def load_config(self, config_path: str) -> ConfigResult:
        return self._files.load_config(config_path.removeprefix(f"{PREFIX}/"))

    def available(self) -> bool:
        return self._files.available()

    def is_group(self, config_path: str) -> bool:
        prefix, _, group = config_path.partition("/")
        return config_path == "" or (prefix == PREFIX and group in ("", *GROUPS))

    def is_config(self, config_path: str) -> bool:
        prefix, _, inner = config_path.partition("/")
        return prefix == PREFIX and inner.partition("/")[0] in GROUPS and self._files.is_config(inner)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        prefix, _, group = config_path.partition("/")
        if group:
            return self._files.list(group, results_filter)
        names = GROUPS if prefix else (PREFIX,)
        return [] if results_filter == ObjectType.CONFIG else list(names)


class ConfigsOfAPB(SearchPathPlugin):
    """Adds the groups behind an application's own, unless it is one of this package's."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if not any(entry.path.endswith(str(CONFIGS)) for entry in search_path.get_path()):
            search_path.append(provider=PREFIX, path=f"{PREFIX}://{CONFIGS}")
