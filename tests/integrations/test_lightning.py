"""`MemAOPCallback` in Lightning's Trainer."""

import importlib.util

import pytest
import torch

from memaop_triton import MemAOPConfig, MemAOPLayer, convert_, memory_state_dict
from tests.distributed.launch import succeeds
from tests.distributed.resume_worker import differences
from tests.integrations.killing import assert_resumes_bit_for_bit, run_without_this_package

pl = pytest.importorskip(
    "lightning.pytorch", reason="lightning is not installed, with which this is tested"
)
from memaop_triton.integrations.lightning import MemAOPCallback  # noqa: E402
from tests.integrations import lightning_loop  # noqa: E402

pytestmark = [
    # What Lightning calls of PyTorch, and what it says of folders that several trainings share.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, Leaf.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
]


def test_a_resumed_training_equals_the_uninterrupted_one(tmp_path):
    whole = lightning_loop.train(tmp_path, 10)
    assert whole["memories"]
    resumed = lightning_loop.train(tmp_path, 10, resume_at=5)
    assert differences(whole, resumed) == []


@pytest.mark.slow  # two or four processes that import lightning
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_training_goes_on_bit_for_bit(processes, tmp_path):
    assert_resumes_bit_for_bit("lightning_loop", tmp_path, nproc=processes)


def test_a_checkpoint_of_a_dense_model_starts_with_empty_memories(tmp_path):
    torch.manual_seed(0)
    run = lightning_loop.trainer(tmp_path, 10, callback=pl.Callback())
    run.fit(lightning_loop.Net(), lightning_loop.loader())
    with pytest.warns(UserWarning, match="no entry 'memaop_triton': the memories start empty"):
        lightning_loop.train(tmp_path, 10, resume_at=5)


def test_a_checkpoint_is_that_of_a_dense_model_and_one_entry(tmp_path):
    for name, callback in (("ours", None), ("dense", pl.Callback())):
        run = lightning_loop.trainer(tmp_path / name, 5, callback)
        run.fit(lightning_loop.Net(), lightning_loop.loader())
    ours, dense = (
        torch.load(tmp_path / name / "step=5.ckpt", weights_only=False)
        for name in ("ours", "dense")
    )
    assert ours.keys() - dense.keys() == {"memaop_triton"}
    assert ours["state_dict"].keys() == dense["state_dict"].keys()
    assert ours["callbacks"].keys() == dense["callbacks"].keys()


def test_weights_alone_are_saved_as_ever(tmp_path):
    run = lightning_loop.trainer(tmp_path, 5)
    run.fit(lightning_loop.Net(), lightning_loop.loader())
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "memaop_triton" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)


@pytest.mark.slow  # a process that imports lightning
def test_a_checkpoint_loads_where_this_package_is_not_installed(tmp_path):
    lightning_loop.train(tmp_path, 5)
    printed = run_without_this_package(f"""
import torch
saved = torch.load({str(tmp_path / "step=5.ckpt")!r}, weights_only=True)
print(len(saved["memaop_triton"]["processes"]), *saved["state_dict"])
""")
    assert printed == "1 net.0.weight net.0.bias net.3.weight net.3.bias"


class Recorder(pl.loggers.logger.DummyLogger):
    """Keeps what is logged, by step."""

    def __init__(self):
        super().__init__()
        self.by_step = {}

    def log_metrics(self, metrics, step):
        self.by_step.setdefault(step, {}).update(metrics)


def test_what_is_logged(tmp_path):
    logger = Recorder()
    run = lightning_loop.trainer(tmp_path, 10, logger=logger, log_every_n_steps=5)
    run.fit(lightning_loop.Net(), lightning_loop.loader())
    assert list(logger.by_step) == [4, 9]
    for found in logger.by_step.values():
        assert found["memaop/coverage"] == 1
        assert found["memaop/sampled_share"] == 1
        assert found["loss"] > 0


def test_row_memories_follow_the_learning_rate(tmp_path):
    net = lightning_loop.Net()
    run = lightning_loop.trainer(tmp_path, 5)
    run.fit(net, lightning_loop.loader())
    rate = run.optimizers[0].param_groups[0]["lr"]
    assert rate < 0.1
    memories = [m.memory for m in net.modules() if isinstance(m, MemAOPLayer)]
    assert [memory.learning_rate for memory in memories] == [rate, rate]


def test_a_checkpoint_that_is_only_tested_is_not_loaded_later(tmp_path):
    lightning_loop.train(tmp_path, 10)
    net = lightning_loop.Net()
    callback = MemAOPCallback(lightning_loop.CONFIG)
    run = lightning_loop.trainer(tmp_path / "other", 5, callback)
    net.test_step = net.training_step
    run.test(
        net, lightning_loop.loader(shuffle=False), ckpt_path=tmp_path / "step=5.ckpt", verbose=False
    )
    assert callback._saved is None


def test_the_library_sees_the_steps_of_the_optimizer(tmp_path):
    net = lightning_loop.Net()
    lightning_loop.trainer(tmp_path, 5, MemAOPCallback()).fit(net, lightning_loop.loader())
    assert memory_state_dict(net)["ratio=auto 0"]["steps"] == 5


def test_arguments_are_those_of_convert(tmp_path):
    callback = MemAOPCallback(MemAOPConfig(ratio=1 / 2), overrides={"net.3": None})
    net = lightning_loop.Net()
    lightning_loop.trainer(tmp_path, 5, callback).fit(net, lightning_loop.loader())
    assert isinstance(net.net[0], MemAOPLayer)
    assert not isinstance(net.net[3], MemAOPLayer)
    with pytest.raises(TypeError, match="no_such_argument"):
        MemAOPCallback(no_such_argument=1)


@pytest.mark.slow  # a process that imports the other package
def test_the_package_of_the_older_name():
    if importlib.util.find_spec("pytorch_lightning") is None:
        pytest.skip("pytorch_lightning is not installed, with which this is tested")
    code = """
import pytorch_lightning as pl, torch, warnings
from memaop_triton.integrations.lightning import MemAOPCallback
assert issubclass(MemAOPCallback, pl.Callback)
class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar")}
net = Net()
trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[MemAOPCallback()], **quiet)
trainer.fit(net, torch.utils.data.DataLoader(torch.randn(8, 4)))
assert type(net.layer).__name__ == "MemAOPLinear"
"""
    succeeds("-c", code)


def test_a_module_that_was_converted_before(tmp_path):
    config = MemAOPConfig(ratio=1 / 2, memory=None)
    net = convert_(lightning_loop.Net(), config)
    lightning_loop.trainer(tmp_path, 5, MemAOPCallback()).fit(net, lightning_loop.loader())
    assert net.net[0].config == config
