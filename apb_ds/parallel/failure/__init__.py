"""How a group of ranks ends when one is lost: what each knows, who failed first, and in time."""
