"""``python -m apb_ds --version``, and a list of the commands."""

from __future__ import annotations

import argparse

from apb_ds import __version__

COMMANDS = {
    "apb-infer": "answer questions about long documents",
    "apb-eval": "score a method on a task",
    "apb-bench": "measure time, memory and traffic",
    "apb-serve": "serve OpenAI's API, with a cache of documents",
    "apb-train-heads": "train retaining heads for a model",
    "apb-train-instrument": "train a small model to solve RULER",
}


def main() -> None:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="python -m apb_ds",
        description="APB: sequence-parallel approximate attention for long prompts, inside DeepSpeed inference.",
        epilog="commands (each takes --help):\n"
        + "\n".join(f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"apb_ds {__version__}")
    parser.parse_args()
    parser.print_help()


if __name__ == "__main__":
    main()
