"""What needs nothing of the package and no torch: text for messages, and versions."""
