"""What happens when a rank fails or is lost: its progress, the board of reports, and the end of the process."""

from apb_ds.parallel.failure.board import LostRankError

__all__ = ["LostRankError"]
