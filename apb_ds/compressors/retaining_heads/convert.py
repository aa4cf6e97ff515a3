"""Convert a checkpoint with retaining heads to safetensors, without its other tensors.

    python -m apb_ds.compressors.retaining_heads.convert IN OUT

IN is a ``.pt``, ``.bin``, ``.pth`` or ``.safetensors`` file or a directory of them, OUT a ``.safetensors`` file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from apb_ds.compressors.retaining_heads.checkpoint import HEAD_KEY, SAFETENSORS, read_state, write_state


def convert(source: Path, target: Path) -> int:
    """Write the heads in `source` to `target`; return the number of tensors.

    Raises
    ------
    ValueError
        If the source cannot be read or has no heads, or the target exists or does not end in .safetensors.
    """
    if target.suffix != SAFETENSORS:
        raise ValueError(f"OUT={str(target)!r} must end in {SAFETENSORS}.")
    if target.exists():
        raise ValueError(f"OUT={str(target)!r} exists; name another file.")
    state = {key: tensor for key, tensor in read_state(source).items() if HEAD_KEY.fullmatch(key)}
    if not state:
        raise ValueError(f"IN={str(source)!r} has no retaining heads.")
    # Tensors of a checkpoint may share storage, which safetensors refuses.
    write_state({key: tensor.clone() for key, tensor in state.items()}, target)
    return len(state)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m apb_ds.compressors.retaining_heads.convert", description=__doc__)
    parser.add_argument("source", metavar="IN", type=Path)
    parser.add_argument("target", metavar="OUT", type=Path)
    given = parser.parse_args(arguments)
    try:
        number = convert(given.source.expanduser(), given.target.expanduser())
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"{given.target}: {number} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
