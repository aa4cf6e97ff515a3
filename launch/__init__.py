"""The commands: thin scripts over the package, which imports none of them. Installed, they are ``apb_ds.launch``."""
