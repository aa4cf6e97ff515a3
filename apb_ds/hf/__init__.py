"""What meets transformers: its attention interface, which architectures are served, and layers computed otherwise."""
