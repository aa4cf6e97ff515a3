"""The interface of an attention kernel: output and log-sum-exp of unmasked, causal or sliding-window attention."""

from __future__ import annotations

import importlib.util
from typing import ClassVar

import torch
from torch import Tensor

from apb_ds.ops.kernels.pieces import Logits, attend_in_pieces


class Kernel:
    """Attention with grouped KV heads that returns its log-sum-exp. Each subclass wraps one backend.

    Every stock kernel supports two cases: unmasked, and causal with as many queries as keys. Sliding windows and capped
    logits are for those that say so. Queries and keys are never empty: some backends crash on that.
    """

    name: ClassVar[str]
    device_type: ClassVar[str | None] = None  # None: any
    dtypes: ClassVar[tuple[torch.dtype, ...] | None] = None  # None: any
    max_head_dim: ClassVar[int | None] = None
    min_capability: ClassVar[int] = 0  # CUDA compute capability, major
    package: ClassVar[str | None] = None  # module that must be installed
    extra: ClassVar[str | None] = None  # what to install to get it
    can_be_recorded: ClassVar[bool] = False  # whether all calls but `__call__` may be part of a CUDA graph
    has_window: ClassVar[bool] = False
    has_softcap: ClassVar[bool] = False

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute attention.

        Parameters
        ----------
        query : (1, heads, queries, head_dim), queries >= 1
        key, value : (1, kv_heads, keys, head_dim), keys >= 1; heads is a multiple of kv_heads. Without a window and a
            softcap, any batch instead of 1.
        causal : query i sees keys 0..i; needs queries == keys, unless there is a window
        scale : factor on the logits
        window : the queries are the last tokens of the keys, and each sees only the last `window` keys up to itself,
            which is one of them; needs causal and queries <= keys
        softcap : logits become ``softcap * tanh(logits / softcap)``, before the mask

        Returns
        -------
        output : (1, heads, queries, head_dim) in ``query.dtype``
        lse : (1, heads, queries), float32, natural log, of the capped logits

        Raises
        ------
        ValueError
            For a mask that does not fit the shapes, or a window or cap that this kernel lacks.
        """
        queries, keys = query.shape[2], key.shape[2]
        self._check(window, softcap)
        if window is None:
            if causal and queries != keys:
                raise ValueError(f"causal attention without a window needs as many keys as queries: {keys}, {queries}.")
            return self._attend(query, key, value, Logits(causal, scale, None, softcap))
        if not causal or queries > keys:
            raise ValueError(f"window={window} needs causal=True (got {causal}) and {queries} queries <= {keys} keys.")
        # No query sees anything before the first one's window, and a lone one sees all that is left.
        start = max(0, keys - queries - window + 1)
        key, value = key[:, :, start:], value[:, :, start:]
        keys -= start
        if queries == 1:
            logits = Logits(False, scale, None, softcap)
        elif queries == keys and window >= keys:
            logits = Logits(True, scale, None, softcap)
        else:
            logits = Logits(True, scale, min(window, keys), softcap)
        return self._attend(query, key, value, logits)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        """Compute attention; the arguments are checked, and a window is at most as long as the keys."""
        raise NotImplementedError

    def attend_all(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend to all keys with few queries, without a mask.

        Keys are read once for all heads of a group, and split where the kernel can. Shapes and results are those of
        `__call__`.
        """
        folded = fold_heads(query, key.shape[1])
        return unfold_heads(*self(folded, key, value, False, scale, softcap=softcap), query.shape[1])

    def attend_first(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_keys: Tensor,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend to the first keys of buffers: to all of them, or to the last `window` of them.

        Parameters
        ----------
        query : (1, heads, 1, head_dim), the last of the first `num_keys` tokens
        key, value : (1, kv_heads, capacity, head_dim); values past the first `num_keys` must be finite
        num_keys : (1,), int32, on the device: how many keys to attend to, at least 1
        window, softcap : as in `__call__`

        Returns
        -------
        As `__call__`.
        """
        stop = int(num_keys)  # waits for the device; kernels that can be recorded override this
        causal = window is not None
        return self(query, key[:, :, :stop], value[:, :, :stop], causal, scale, window=window, softcap=softcap)

    def attend_slots(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        num_keys: Tensor,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        have_keys: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Attend to the first keys of a slot for each row: to all of them, or to the last `window` of them.

        Parameters
        ----------
        query : (rows, heads, 1, head_dim)
        key, value : (slots, kv_heads, capacity, head_dim), views of contiguous (slots, capacity, kv_heads, head_dim);
            values past a slot's first `num_keys` must be finite
        slots : (rows,), int32 or int64, on the device: each row's slot; rows of one slot get any one's result
        num_keys : (rows,), int32, on the device: how many keys of its slot each row attends to, at least 0
        window, softcap : as in `__call__`
        have_keys : whether it is known that every row has a key, which saves looking for those without

        Returns
        -------
        output : (rows, heads, 1, head_dim) in ``query.dtype``; 0 for a row without keys
        lse : (rows, heads, 1), float32, natural log; minus infinity for a row without keys
        """
        self._check(window, softcap)
        output = torch.zeros_like(query)
        lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
        # Waits for the device; kernels that can be recorded override this.
        for row, (slot, stop) in enumerate(zip(slots.tolist(), num_keys.tolist(), strict=True)):
            if stop:
                k, v = (states[slot : slot + 1, :, :stop] for states in (key, value))
                causal = window is not None
                part = self(query[row : row + 1], k, v, causal, scale, window=window, softcap=softcap)
                output[row], lse[row] = part[0][0], part[1][0]
        return output, lse

    def attend_last(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_last: Tensor,
        scale: float,
        *,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend to the last keys: to as many of them as is asked for each query.

        Parameters
        ----------
        query : (1, heads, queries, head_dim), queries >= 1
        key, value : (1, kv_heads, keys, head_dim), keys >= 1
        num_last : (queries,), int32, on the device: how many keys each query attends to, at least 0; more than there
            are means all
        softcap : as in `__call__`

        Returns
        -------
        As `__call__`; 0 and minus infinity for a query without keys.
        """
        self._check(None, softcap)
        return attend_in_pieces(query, key, value, Logits(False, scale, None, softcap), num_last)

    def _check(self, window: int | None, softcap: float | None) -> None:
        """Raise ValueError for a window or cap that is out of range, or that this kernel lacks."""
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be at least 1.")
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap={softcap} must be greater than 0.")
        lacking = self.lacks(window is not None, softcap is not None)
        if lacking is not None:
            raise ValueError(f"kernel={self.name!r}: {lacking}. Use kernel=auto.")

    @classmethod
    def lacks(cls, window: bool, softcap: bool) -> str | None:
        """Return what this kernel lacks of what is asked for, or None if nothing."""
        missing = []
        if window and not cls.has_window:
            missing.append("sliding windows (window)")
        if softcap and not cls.has_softcap:
            missing.append("capped logits (softcap)")
        return f"it does not support {' and '.join(missing)}" if missing else None

    @classmethod
    def is_installed(cls) -> bool:
        """Whether the backend's package can be found; it is not imported."""
        return cls.package is None or importlib.util.find_spec(cls.package) is not None

    @classmethod
    def why_not(
        cls, device: torch.device, dtype: torch.dtype, head_dim: int, *, window: bool = False, softcap: bool = False
    ) -> str | None:
        """Return why this kernel cannot serve such tensors here, or None if it can."""
        if cls.device_type is not None and device.type != cls.device_type:
            return f"it runs on {cls.device_type}, not on {device.type}"
        if cls.dtypes is not None and dtype not in cls.dtypes:
            return f"it takes {', '.join(map(str, cls.dtypes))}, not {dtype}"
        if cls.max_head_dim is not None and (head_dim > cls.max_head_dim or head_dim % 8):
            return f"it takes head dimensions up to {cls.max_head_dim} in steps of 8, not {head_dim}"
        if cls.min_capability and torch.cuda.get_device_capability(device)[0] < cls.min_capability:
            return f"it needs compute capability {cls.min_capability}.0 or newer"
        return cls.lacks(window, softcap)


def expand_kv_heads(states: Tensor, heads: int) -> Tensor:
    """Repeat (1, kv_heads, tokens, head_dim) to (1, heads, tokens, head_dim), each KV head for its group of heads."""
    return states.repeat_interleave(heads // states.shape[1], dim=1)


def fold_heads(query: Tensor, kv_heads: int) -> Tensor:
    """Make each group of heads that share a KV head one head with more queries.

    Unmasked attention of the result is the same, and it reads keys once per KV head.

    Parameters
    ----------
    query : (batch, heads, queries, head_dim)

    Returns
    -------
    (batch, kv_heads, heads / kv_heads * queries, head_dim), a view if heads are contiguous
    """
    batch, heads, queries, head_dim = query.shape
    return query.reshape(batch, kv_heads, heads // kv_heads * queries, head_dim)


def unfold_heads(output: Tensor, lse: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Undo `fold_heads` for a kernel's results.

    Parameters
    ----------
    output : (batch, kv_heads, heads / kv_heads * queries, head_dim)
    lse : (batch, kv_heads, heads / kv_heads * queries)

    Returns
    -------
    output : (batch, heads, queries, head_dim)
    lse : (batch, heads, queries)
    """
    batch, kv_heads, folded, head_dim = output.shape
    queries = folded * kv_heads // heads
    return output.reshape(batch, heads, queries, head_dim), lse.reshape(batch, heads, queries)


def without_keys(output: Tensor, lse: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Set what backends leave differently: the results of queries that saw no key.

    Parameters
    ----------
    output : (batch, heads, queries, head_dim)
    lse : (batch, heads, queries)
    empty : bool, broadcasts to the log-sum-exp

    Returns
    -------
    output and lse, 0 and minus infinity where `empty`
    """
    return output.masked_fill(empty.unsqueeze(-1), 0.0), lse.masked_fill(empty, -torch.inf)
