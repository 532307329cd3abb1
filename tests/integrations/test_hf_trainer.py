"""`MemAOPCallback` in the Trainer of transformers."""

import json
from types import SimpleNamespace

import pytest
import torch

from memaop_triton import MemAOPConfig, MemAOPLayer, Subspace, convert_, memory_state_dict
from tests.distributed.resume_worker import differences
from tests.integrations.killing import assert_resumes_bit_for_bit, run_without_this_package

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed, with which this is tested"
)
pytest.importorskip("accelerate", reason="accelerate is not installed, which a Trainer needs")
from safetensors import safe_open  # noqa: E402 - installed with transformers
from safetensors.torch import load_file, save_file  # noqa: E402

from memaop_triton.integrations.transformers import MemAOPCallback  # noqa: E402
from tests.integrations import hf_loop  # noqa: E402

DENSE = transformers.TrainerCallback
# Each takes but a second; together they are too long for `make test`.
SECOND_TRAINING = pytest.mark.slow


@pytest.mark.parametrize("name", ["gpt2", "vit", "decided"])
def test_a_resumed_training_equals_the_uninterrupted_one(name, tmp_path):
    whole = hf_loop.train(tmp_path, 10, name)
    assert whole["memories"]
    resumed = hf_loop.train(tmp_path, 10, name, resume_at=5)
    assert differences(whole, resumed) == []


@pytest.mark.slow  # two or four processes that import transformers
@pytest.mark.parametrize(
    ("name", "processes"), [("gpt2", 1), ("vit", 1), ("decided", 1), ("gpt2", 2)]
)
def test_a_killed_training_goes_on_bit_for_bit(name, processes, tmp_path):
    assert_resumes_bit_for_bit("hf_loop", tmp_path, name, nproc=processes)


@SECOND_TRAINING
def test_memories_are_what_makes_it_the_same(tmp_path):
    whole = hf_loop.train(tmp_path, 10)
    (tmp_path / "checkpoint-5" / "memaop_memory.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"no memaop_memory.* of the weights of step 5 is in"):
        resumed = hf_loop.train(tmp_path, 10, resume_at=5)
    assert "/memories" in " ".join(differences(whole, resumed))


@SECOND_TRAINING
def test_a_checkpoint_in_another_place(tmp_path):
    whole = hf_loop.train(tmp_path / "run", 10)
    moved = (tmp_path / "run" / "checkpoint-5").rename(tmp_path / "elsewhere")
    callback = MemAOPCallback(hf_loop.CONFIGS["gpt2"], resume_from_checkpoint=moved)
    run = hf_loop.trainer(tmp_path / "other", 10, callback=callback)
    run.train(str(moved))
    assert differences(whole, hf_loop.outcome(run)) == []


@SECOND_TRAINING
def test_memories_of_another_training_are_not_loaded(tmp_path):
    hf_loop.train(tmp_path / "run", 10)
    other = hf_loop.trainer(tmp_path / "other", 10, learning_rate=5e-3)
    other.train()
    run = hf_loop.trainer(tmp_path / "other", 10)
    with pytest.warns(UserWarning, match="the memories start empty"):
        run.train(str(tmp_path / "run" / "checkpoint-5"))


@SECOND_TRAINING
def test_memories_of_another_number_of_processes_are_not_loaded(tmp_path):
    hf_loop.train(tmp_path, 10)
    path = tmp_path / "checkpoint-5" / "memaop_memory.safetensors"
    with safe_open(path, "pt") as file:
        facts = file.metadata() | {"world_size": "3"}
    save_file(load_file(path), path, facts)
    with pytest.warns(UserWarning, match="3 processes saved the memories and 1 load them"):
        hf_loop.train(tmp_path, 10, resume_at=5)


@SECOND_TRAINING
def test_files_of_a_checkpoint_are_those_of_a_dense_model(tmp_path):
    hf_loop.train(tmp_path / "ours", 2)
    hf_loop.trainer(tmp_path / "dense", 2, callback=DENSE()).train()
    ours, dense = (tmp_path / name / "checkpoint-1" for name in ("ours", "dense"))
    added = {path.name for path in ours.iterdir()} - {path.name for path in dense.iterdir()}
    assert added == {"memaop_memory.safetensors"}
    assert (ours / "config.json").read_text() == (dense / "config.json").read_text()
    shapes = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(path).items()}
        for path in (ours / "model.safetensors", dense / "model.safetensors")
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.slow  # a process that imports transformers
@pytest.mark.parametrize(
    ("name", "model"), [("gpt2", "GPT2LMHeadModel"), ("vit", "ViTForImageClassification")]
)
def test_a_checkpoint_loads_where_this_package_is_not_installed(name, model, tmp_path):
    run = hf_loop.trainer(tmp_path, 4, name)
    run.train()
    inputs = {key: torch.stack([e[key] for e in hf_loop.examples(name, 3)]) for key in INPUTS[name]}
    with torch.no_grad():
        torch.save([inputs, run.model.eval()(**inputs).logits], tmp_path / "expected.pt")
    printed = run_without_this_package(f"""
import torch, transformers
from safetensors.torch import load_file
folder = {str(tmp_path / "checkpoint-4")!r}
inputs, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = transformers.{model}.from_pretrained(folder)
assert torch.equal(model(**inputs).logits, expected)
torch.load(folder + "/optimizer.pt", weights_only=True)
assert load_file(folder + "/memaop_memory.safetensors")
print("loaded")
""")
    assert printed.endswith("loaded")


INPUTS = {"gpt2": ["input_ids"], "vit": ["pixel_values"]}


def test_several_gpus_in_one_process_are_refused():
    args = SimpleNamespace(n_gpu=2)
    with pytest.raises(RuntimeError, match="start a process for each GPU"):
        MemAOPCallback().on_train_begin(args, None, None, model=None, optimizer=None)


def test_what_is_logged(tmp_path):
    run = hf_loop.trainer(tmp_path, 10, "decided")
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [5, 10]
    found = logged[0]
    assert 0.9 < found["memaop/coverage"] <= 1
    layers = [m for m in run.model.modules() if isinstance(m, MemAOPLayer)]
    elements = sum(layer.weight.numel() for layer in layers)
    sampled = sum(m.weight.numel() for m in layers if m.config.ratio == hf_loop.SHARE)
    assert 0 < sampled != elements - sampled
    assert found["memaop/sampled_share"] == sampled / elements
    assert found["memaop/noise_to_signal"] == hf_loop.WORTH["noise"]
    assert found["memaop/predicted_speedup"] == hf_loop.WORTH["speedup"]
    assert found["memaop/predicted_progress"] == hf_loop.WORTH["progress"]
    assert found["memaop/realised_progress"] == 1.12
    assert not any(key.startswith("memaop") for key in run.state.log_history[-1])
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["log_history"][0] == found


def test_callbacks_behind_get_the_entries(tmp_path):
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs, **others):
            seen.append(set(logs))

    hf_loop.trainer(tmp_path, 5, callbacks=[Reporter()], save_strategy="no").train()
    assert {"loss", "memaop/coverage", "memaop/sampled_share"} <= seen[0]


def test_row_memories_follow_the_learning_rate(tmp_path):
    run = hf_loop.trainer(tmp_path, 3, "vit", save_strategy="no")
    run.train()
    memories = [m.memory for m in run.model.modules() if isinstance(m, MemAOPLayer)]
    assert memories
    assert {memory.learning_rate for memory in memories} == {run.lr_scheduler.get_last_lr()[0]}


def test_the_library_sees_the_steps_of_the_optimizer(tmp_path):
    run = hf_loop.trainer(tmp_path, 6, callback=MemAOPCallback(), save_steps=3)
    run.train()
    assert memory_state_dict(run.model)["ratio=auto 0"]["steps"] == 6
    with safe_open(tmp_path / "checkpoint-3" / "memaop_memory.safetensors", "pt") as file:
        assert json.loads(file.metadata()["memories"])["ratio=auto 0"]["steps"] == 3


@SECOND_TRAINING
def test_training_again_goes_on_with_what_was_converted(tmp_path):
    run = hf_loop.trainer(tmp_path, 2, save_strategy="no")
    run.train()
    layers = [m for m in run.model.modules() if isinstance(m, MemAOPLayer)]
    run.train()
    assert layers == [m for m in run.model.modules() if isinstance(m, MemAOPLayer)]


@SECOND_TRAINING
def test_a_model_that_was_converted_before(tmp_path):
    config = MemAOPConfig(ratio=1 / 2, memory=None)
    run = hf_loop.trainer(tmp_path, 2, callback=MemAOPCallback(), save_strategy="no")
    convert_(run.model, config)
    run.train()
    assert {m.config for m in run.model.modules() if isinstance(m, MemAOPLayer)} == {config}
    run = hf_loop.trainer(tmp_path, 2, callback=MemAOPCallback(config), save_strategy="no")
    convert_(run.model, config)
    with pytest.raises(ValueError, match="converted already"):
        run.train()


@SECOND_TRAINING
def test_every_model_of_model_init_is_converted(tmp_path):
    run = hf_loop.trainer(tmp_path, 2, save_strategy="no")
    run = transformers.Trainer(
        args=run.args,
        model_init=lambda: hf_loop.build("gpt2"),
        train_dataset=run.train_dataset,
        callbacks=[MemAOPCallback(hf_loop.CONFIGS["gpt2"])],
    )
    first = run.model
    for _ in range(2):
        run.train()
        assert any(isinstance(module, MemAOPLayer) for module in run.model.modules())
        assert run.model is not first
        first = run.model


def test_arguments_are_those_of_convert(tmp_path):
    overrides = {"*": None, "*.c_fc": MemAOPConfig(ratio=1 / 2, memory=Subspace(rank=2))}
    callback = MemAOPCallback(MemAOPConfig(ratio=1 / 4), overrides=overrides)
    run = hf_loop.trainer(tmp_path, 1, callback=callback, save_strategy="no")
    run.train()
    names = [n for n, m in run.model.named_modules() if isinstance(m, MemAOPLayer)]
    assert len(names) == 2
    assert all(name.endswith("c_fc") for name in names)
    with pytest.raises(TypeError, match="no_such_argument"):
        MemAOPCallback(no_such_argument=1)


def test_where_a_trainer_cannot_resume_nothing_is_added(tmp_path):
    hf_loop.trainer(tmp_path, 2, save_only_model=True).train()
    assert (tmp_path / "checkpoint-2").is_dir()
    assert not list(tmp_path.rglob("memaop_memory*"))
