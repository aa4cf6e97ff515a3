"""Training retaining heads (Locret, arXiv 2410.01805): frozen model, labels from its own attention."""
