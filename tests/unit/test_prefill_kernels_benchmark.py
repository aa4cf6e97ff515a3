"""benchmarks/prefill_kernels.py: times by kernel, and gaps between them."""

from __future__ import annotations

import apb_ds
from apb_ds.parallel.emulated import emulated_groups
from benchmarks import prefill_kernels as kernels
from benchmarks.common import Event
from tests.models import llama, request_ids


def test_gaps_are_where_nothing_runs() -> None:
    spans = [(0.0, 10.0, "a"), (12.0, 20.0, "b"), (15.0, 40.0, "c"), (18.0, 30.0, "d"), (50.0, 51.0, "a")]
    events = [Event(*span) for span in spans]
    assert kernels.idle_gaps(events[::-1]) == {("c", "a"): [10.0]}
    assert kernels.idle_gaps([*events, Event(60.0, 61.0, "a"), Event(70.0, 71.0, "a")])["a", "a"] == [9.0, 9.0]
    assert kernels.idle_gaps([]) == {}


def test_operations_of_an_emulated_rank() -> None:
    document, query = request_ids(200, 8)
    engine = apb_ds.init_inference(llama(), apb_ds.APBConfig(hosts=8, anchor_length=12), group=emulated_groups(4)[3])
    found = kernels.profile_prefill(engine, document, query)
    names = [kernel["name"] for kernel in found["kernels"]]
    assert any("scaled_dot_product" in name for name in names) and found["gaps"] == []
    assert found["kernels"] == sorted(found["kernels"], key=lambda kernel: -kernel["ms"])
    assert 0 < found["kernels_ms"] <= 1.05 * found["span_ms"]
    attended = sum(kernel["count"] for kernel in found["kernels"] if "flash_attention_for_cpu" in kernel["name"])
    num_layers = engine.module.config.num_hidden_layers
    # Its share of the anchor and two blocks, each by itself and with what is before it; in the last layer none.
    assert attended == 6 * (num_layers - 1)
