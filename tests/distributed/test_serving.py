"""The engine half of the server on several ranks: the first one decides, and answers are those of `generate`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pools
from tests.serving import GREEDY, METHOD, Client, make_half

BOOKS = [f"{name} " * 20 for name in ("alpha", "beta", "gamma")]
QUESTIONS = [f"What about {thing}?" for thing in ("ants", "bees", "cats")]


def serve(rank: int, world_size: int, directory: str, method: str) -> dict[str, Any]:
    """Serve on all ranks, with clients in threads of the first; return what they got and what `generate` gives."""
    from apb_ds.cache import first_capacity
    from apb_ds.parallel.groups import world_group
    from apb_ds.serving.config import ServeConfig
    from apb_ds.serving.documents import Documents, Limits, Place
    from apb_ds.serving.requests import Message, Options
    from apb_ds.serving.warm_up import warm_up
    from tests.serving import tiny_engine

    group = world_group()
    engine = tiny_engine(group, METHOD if method == "apb" else {"method": method})
    warm_up(engine, 2**30)
    size = engine.pool.document_bytes(first_capacity(200))
    limits = Limits(size, size, 10 * size, 2**20)
    config = ServeConfig(min_document=48, step_every_s=0.0, stop_s=30.0)
    service, worker = make_half(engine, config, Documents(limits), group.on_cpu(60.0), Path(directory))
    chats = [(book, question) for book in BOOKS for question in QUESTIONS] + [("Hello",)]
    found: dict[str, Any] = {}

    def prompts() -> list[Any]:
        assert service is not None
        return [service.chat_prompt([Message("user", (text,)) for text in chat]) for chat in chats]

    def ask_all() -> None:
        assert service is not None
        try:
            clients = []
            for prompt in [*prompts(), *prompts()]:
                clients.append(Client())
                clients[-1].request = service.submit(prompt, GREEDY, clients[-1])
            gone = Client()
            long = Options(max_new_tokens=400, temperature=0.0, ignore_eos=True)
            gone.request = service.submit(prompts()[0], long, gone)
            assert gone.has_token.wait(60)
            gone.request.cancel()
            for client in clients:
                client.wait()
            # The second half comes back from where it was moved meanwhile.
            after = Client()
            after.request = service.submit(prompts()[0], GREEDY, after)
            after.wait()
            found["tokens"] = [client.tokens for client in clients] + [after.tokens]
            found["places"] = [len(service.documents.at(place)) for place in Place]
            found["cancelled"] = len(gone.tokens)
        except BaseException as error:
            found["error"] = repr(error)
        finally:
            worker.stop()

    thread = threading.Thread(target=ask_all, daemon=True)
    if service is not None:
        thread.start()
    worker.run()
    if service is not None:
        thread.join(60)
        found["ids"] = [(one.document.tolist(), one.rest.tolist()) for one in prompts()]
    found["ids"] = group.gather_objects(found.get("ids"))[0]
    found["expected"] = [expected(engine, *ids) for ids in found["ids"]]
    return found


def expected(engine: Any, document: list[int], rest: list[int]) -> list[int]:
    import torch

    if not document:
        document, rest = rest[:1], rest[1:]
    context = engine.prefill(torch.tensor([document]))
    return list(engine.generate(query_ids=torch.tensor([rest]), context=context, max_new_tokens=6)[0].tolist())


@pytest.mark.parametrize(("world_size", "method"), [(2, "apb"), (2, "ring"), (4, "apb")])
def test_ranks_serve_together(pool: Pools, tmp_path: Path, world_size: int, method: str) -> None:
    results = pool(world_size).run(serve, str(tmp_path), method, timeout=240)
    first = results[0]
    assert "error" not in first, first["error"]
    wanted = first["expected"]
    assert first["tokens"] == [*wanted, *wanted, wanted[0]]
    assert 0 < first["cancelled"] < 400
    assert first["places"] == [0, 1, 1, 1]  # nowhere, device, host, disk
    assert METHOD["hosts"] % world_size == 0


def stop_from_last(rank: int, world_size: int) -> bool:
    from apb_ds.parallel.groups import world_group
    from apb_ds.serving.config import ServeConfig
    from apb_ds.serving.documents import Documents
    from tests.serving import PLENTY, tiny_engine

    group = world_group()
    service, worker = make_half(tiny_engine(group), ServeConfig(min_document=48), Documents(PLENTY), group.on_cpu(60.0))
    if group.is_last:
        threading.Timer(0.3, worker.stop).start()
    worker.run()
    return service is None or service.health()["status"] == "stopping"


def test_any_rank_can_end_the_server(pool: Pools) -> None:
    assert all(pool(2).run(stop_from_last, timeout=60))
