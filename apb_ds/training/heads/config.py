"""The settings of a training of retaining heads, validated before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from apb_ds.config import check_choice
from apb_ds.training.config import TrainingConfig, check_number
from apb_ds.training.heads.labels import LabelKind

ANSWER = "answer"
OBSERVERS = (ANSWER, "later")


@dataclass(frozen=True)
class HeadsConfig(TrainingConfig, LabelKind):
    """Training of retaining heads (Locret, arXiv 2410.01805); defaults as published, except for the data.

    Parameters
    ----------
    hidden_size : int
        Of the heads.
    texts : list of str or None
        Files and folders of real text. Default: see `apb_ds.training.heads.texts`.
    text_share : float
        Share of the generated documents whose filler is real text.
    quote_share, continue_share : float
        Shares of the conversations that ask for a passage of real text, and that are real text whose last tokens are
        the answer. The others come from `mixture`.
    data : str or None
        A JSONL file of conversations in ShareGPT's format.
    data_share : float
        Share of the conversations that come from `data`, before any other share.
    observers : str
        ``answer``: the tokens of the answers observe the document (Locret). ``later``: any tokens observe those before.
    num_observers : int
        Maximum per conversation; of more, as many are drawn.
    observed_hosts : int or None
        Cut the document into so many blocks; tokens observe earlier blocks only. Default: all earlier tokens.
    smoothing : float
        Factor of the mean squared difference between neighbouring scores.
    measure_every : int, steps
    held_out : int
        Number of conversations to measure on.
    measured_hosts, measured_ratio : int, float
        Measure what a prefill with so many hosts and this compression ratio would keep.
    others : see `TrainingConfig` and `LabelKind`
    """

    schedule: ClassVar[str] = "linear"
    clips_values: ClassVar[bool] = True

    hidden_size: int = 1024
    steps: int = 3000
    tokens_per_step: int = 10240
    min_length: int = 1024
    max_length: int = 10240
    growth: float = 0.0
    texts: list[str] | None = None
    text_share: float = 0.5
    quote_share: float = 0.1
    continue_share: float = 0.1
    data: str | None = None
    data_share: float = 1.0
    observers: str = "answer"
    num_observers: int = 512
    observed_hosts: int | None = None
    smoothing: float = 0.0025
    learning_rate: float = 5e-4
    warmup_steps: int = 2000
    weight_decay: float = 0.01
    clip: float = 0.5
    measure_every: int = 200
    held_out: int = 16
    measured_hosts: int = 8
    measured_ratio: float = 8.0

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        LabelKind.__post_init__(self)
        self._check_integers(1, "hidden_size", "num_observers", "held_out", "measured_hosts", "measure_every")
        if self.observed_hosts is not None:
            self._check_integers(2, "observed_hosts")
        check_choice("train.observers", self.observers, OBSERVERS)
        check_number("train.smoothing", self.smoothing, minimum=0)
        self._check_shares("text_share", "quote_share", "continue_share", "data_share")
        if self.quote_share + self.continue_share > 1:
            raise ValueError(
                f"train.quote_share={self.quote_share} and train.continue_share={self.continue_share} are more than 1 "
                "together; lower one."
            )
        check_number("train.measured_ratio", self.measured_ratio, minimum=1)
        texts, data = self.texts, self.data
        if texts is not None and not (isinstance(texts, list) and texts and all(map(_is_name, texts))):
            raise ValueError(f"train.texts={texts!r} must be a list of text files or folders of them.")
        if data is not None and not _is_name(data):
            raise ValueError(f"train.data={data!r} must be a JSONL file.")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)
