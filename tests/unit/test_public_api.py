"""What users import and how it helps them: names, suggestions, completion, types."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import apb_ds
from tests.models import build_model, request_ids
from tests.tiny_checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def test_every_public_name_is_found_and_completed() -> None:
    for name in apb_ds.__all__:
        assert getattr(apb_ds, name) is not None
    assert set(apb_ds.__all__) <= set(dir(apb_ds))


def test_user_code_passes_strict_type_checking(tmp_path: Path) -> None:
    script = tmp_path / "user.py"
    script.write_text(
        "from apb_ds import APBConfig, APBEngine, Context, EncodedChat, attach, detach, encode_chat, encode_turn\n"
        "from apb_ds import init_inference, load_model, plan_request\n"
        "config = APBConfig(hosts=4, anchor_length='block')\n"
        "plan = plan_request(config, 1000, 5)\n"
        "hosts: int = plan.hosts\n"
        "reveal_type(plan.hosts)\n"
        "def ask(path: str) -> None:\n"
        "    model, tokenizer = load_model(path, dtype='float32')\n"
        "    chat: EncodedChat = encode_chat(tokenizer, 'document', 'question', template={'thinking': False})\n"
        "    engine: APBEngine = init_inference(model, {'query_position': chat.query_position})\n"
        "    context: Context = engine.prefill(chat.document_ids, chat.embedded_ids)\n"
        "    answer = engine.generate(query_ids=chat.query_ids, context=context)\n"
        "    encode_turn(tokenizer, 'more', answer, system='Be brief.')\n"
    )
    # Other packages are left out: they take most of the time, and their types are not ours.
    settings = "[mypy]\nstrict = true\nignore_missing_imports = true\nfollow_imports = silent\n"
    others = "[mypy-torch.*,transformers.*,deepspeed.*,numpy.*]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(settings + others)
    found = subprocess.run(
        [sys.executable, "-m", "mypy", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
    )
    if "No module named mypy" in found.stderr:
        pytest.skip("mypy is not installed: pip install 'apb_ds[dev]'")
    assert found.returncode == 0, found.stdout
    assert 'Revealed type is "int"' in found.stdout, "the package was not found, and everything passes as Any"


def test_a_model_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = apb_ds.load_model(save_checkpoint(tmp_path), dtype="bfloat16", device="cpu")
    assert (model.dtype, model.training, tokenizer.eos_token) == (torch.bfloat16, False, "</s>")
    assert apb_ds.load_model(tmp_path, dtype=torch.bfloat16, device="cpu")[0].dtype is torch.bfloat16
    with pytest.raises(ValueError, match="path must be a path or an id, got NoneType"):
        apb_ds.load_model(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model key='adaptor'.*Did you mean 'adapter'\?"):
        apb_ds.load_model(tmp_path, adaptor="x")
    with pytest.raises(ValueError, match=r"model.path=.*nope"):
        apb_ds.load_model(tmp_path / "nope")


def test_an_option_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"'host'.*Did you mean 'hosts'\?"):
        apb_ds.APBConfig(host=4)  # type: ignore[call-arg]


def test_a_config_can_be_copied_and_pickled() -> None:
    config = apb_ds.APBConfig(hosts=4, compressor="recent")
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


def test_a_mapping_serves_as_config() -> None:
    engine = apb_ds.init_inference(build_model("llama"), {"hosts": 4})
    assert engine.apb_config == apb_ds.APBConfig(hosts=4)
    with pytest.raises(ValueError, match=r"config key='host'.*Did you mean 'hosts'\?"):
        apb_ds.init_inference(build_model("llama"), {"host": 4})
    with pytest.raises(ValueError, match="config=4 must be an APBConfig"):
        apb_ds.init_inference(build_model("llama"), 4)
    engine.configure({"hosts": 2})
    assert engine.apb_config == apb_ds.APBConfig(hosts=2)


def test_an_engine_frees_what_it_holds_at_the_end_of_a_block() -> None:
    with apb_ds.init_inference(build_model("llama"), {"hosts": 4}) as engine:
        engine.prefill(request_ids(60, 5)[0])
    assert engine._recorded is None


def test_a_context_is_not_pickled_with_its_model() -> None:
    engine = apb_ds.init_inference(build_model("llama"), {"hosts": 4})
    context = engine.prefill(request_ids(60, 5)[0])
    with pytest.raises(TypeError, match="Context cannot be pickled"):
        torch.save(context, io.BytesIO())


@pytest.mark.parametrize(("hosts", "why"), [(1, "hosts=1"), (30, "longer than a block of 2 tokens")])
def test_the_log_says_why_a_request_runs_exact(hosts: int, why: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = apb_ds.init_inference(build_model("llama"), {"hosts": hosts})
    engine.prefill(*request_ids(60, 5))
    engine.prefill(*request_ids(60, 5))
    told = [record.getMessage() for record in caplog.records if "exact" in record.getMessage()]
    assert len(told) == 1 and why in told[0] and "60 tokens" in told[0]
