"""Sampled weight gradients for PyTorch layers, with a memory of what was left out.

The weight gradient of a linear layer is a sum of outer products, one per row of the batch; that of
a convolution, one per position. The layers of this package compute a few of them and may keep the
others for later steps (Mem-AOP-GD, arXiv 2110.09164), which makes the backward pass cheaper.
`convert_` converts the layers of a model; `MemAOPConfig` sets how many rows are computed, how they
are chosen and what is kept.
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

# The kernels live beside this package in a checkout and inside it once installed. A checkout that
# was not installed finds them here; a top-level `kernels` package is never created.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "env.py").is_file():
    __path__.append(str(_here.parent))

from memaop_triton.auto.report import auto_freeze, model_report
from memaop_triton.config import MemAOPConfig
from memaop_triton.config.parts import Projected, Rows, Sampled, Subspace
from memaop_triton.convert import convert_, revert_
from memaop_triton.memory.kinds import ResidualMemory, SubspaceMemory
from memaop_triton.monitor.allocate import allocate_
from memaop_triton.monitor.monitor import Monitor, StarvedLayerWarning, monitor
from memaop_triton.monitor.schedules import RatioScheduler
from memaop_triton.nn.conv import MemAOPConv1d, MemAOPConv2d, MemAOPConv3d
from memaop_triton.nn.coverage import Coverage, LowCoverageWarning
from memaop_triton.nn.functional import memaop_linear
from memaop_triton.nn.layer_state import new_memory
from memaop_triton.nn.linear import MemAOPLayer, MemAOPLinear
from memaop_triton.nn.optim import attach_optimizer
from memaop_triton.nn.saved_tensors import CompressedSaved, compress_saved
from memaop_triton.nn.state import load_memory_state_dict, memory_state_dict, reset_memory
from memaop_triton.plan.coverage import coverage
from memaop_triton.plan.planning import plan

if _TYPE_CHECKING:
    from memaop_triton.distributed.comm_hook import FactorAllGather

__version__ = "0.1.0"

__all__ = [
    "CompressedSaved",
    "Coverage",
    "FactorAllGather",
    "LowCoverageWarning",
    "MemAOPConfig",
    "MemAOPConv1d",
    "MemAOPConv2d",
    "MemAOPConv3d",
    "MemAOPLayer",
    "MemAOPLinear",
    "Monitor",
    "Projected",
    "RatioScheduler",
    "ResidualMemory",
    "Rows",
    "Sampled",
    "StarvedLayerWarning",
    "Subspace",
    "SubspaceMemory",
    "allocate_",
    "attach_optimizer",
    "auto_freeze",
    "compress_saved",
    "convert_",
    "coverage",
    "load_memory_state_dict",
    "memaop_linear",
    "memory_state_dict",
    "model_report",
    "monitor",
    "new_memory",
    "plan",
    "reset_memory",
    "revert_",
]


def __getattr__(name: str) -> object:
    # Imported on demand, because some builds of PyTorch have no torch.distributed.
    if name == "FactorAllGather":
        from memaop_triton.distributed.comm_hook import FactorAllGather

        return FactorAllGather
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
