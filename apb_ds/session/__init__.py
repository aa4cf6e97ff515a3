"""Jobs, and the session that runs them in step on all ranks."""

from __future__ import annotations

from apb_ds.session.job import Job, Settings, read_settings
from apb_ds.session.session import Session

__all__ = ["Job", "Session", "Settings", "read_settings"]
