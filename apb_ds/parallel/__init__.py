"""Process groups and collectives of the sequence-parallel ranks."""
