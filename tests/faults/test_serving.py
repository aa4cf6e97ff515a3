"""A rank of a server that is killed: all ranks end, and who waits for an answer is told."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import openai
import pytest

from tests.serving_process import running_server
from tests.tiny_checkpoint import save_checkpoint

pytestmark = pytest.mark.faults

BOOK = "Alpha and more of it. " * 6


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("state", ["idle", "answering"])
def test_a_killed_rank_ends_the_server(tmp_path: Path, rank: int, state: str) -> None:
    checkpoint = save_checkpoint(tmp_path / "tiny", max_position_embeddings=4096)
    settings = (f"model.path={checkpoint}", "method.hosts=4", "serve.min_document=64")
    with running_server(*settings, num_ranks=2) as server:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=60)
        given = {"model": "tiny", "max_tokens": 3500, "extra_body": {"ignore_eos": True}}
        messages = [{"role": "user", "content": BOOK}, {"role": "user", "content": "And?"}]
        stream = None
        if state == "answering":
            stream = client.chat.completions.create(messages=messages, stream=True, **given)
            next(iter(stream))
        began = time.monotonic()
        server.ranks()[rank].send_signal(signal.SIGKILL)
        if stream is not None:
            # The first rank is the one that can tell; without it the connection breaks.
            expected = "The server has failed" if rank == 1 else ""
            with pytest.raises(Exception, match=expected) as raised:
                for _ in stream:
                    pass
            assert isinstance(raised.value, openai.APIError) or rank == 0
        assert server.wait() != 0
        assert time.monotonic() - began < 30
        if rank == 1:
            assert "rank 1 failed first" in server.said.lower()
            assert "start the server again" in server.said and "rerun" not in server.said
