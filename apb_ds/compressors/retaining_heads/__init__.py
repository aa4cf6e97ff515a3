"""The trained compressor: retaining heads (Locret, arXiv 2410.01805) predict what later tokens will attend to."""

from apb_ds.compressors.retaining_heads.checkpoint import read_heads, write_heads
from apb_ds.compressors.retaining_heads.compressor import RetainingHeadsCompressor
from apb_ds.compressors.retaining_heads.module import HeadSizes, RetainingHead, RetainingHeads

__all__ = ["HeadSizes", "RetainingHead", "RetainingHeads", "RetainingHeadsCompressor", "read_heads", "write_heads"]
