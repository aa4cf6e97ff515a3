"""The Hydra configs. Installed, they are ``apb_ds.configs``: ``hydra.searchpath=[pkg://apb_ds.configs]``."""
