"""The list of packages. Everything else about the distribution is in setup.cfg and pyproject.toml."""

from setuptools import find_packages, setup

# setup.cfg maps launch/ and configs/ into the package, which find_packages cannot see.
setup(packages=[*find_packages(include=["apb_ds", "apb_ds.*"]), "apb_ds.configs", "apb_ds.launch", "hydra_plugins"])
