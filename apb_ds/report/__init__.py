"""What a run leaves behind: a record as JSON, tables and a progress bar for people, peak memory."""

from __future__ import annotations
