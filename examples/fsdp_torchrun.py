"""FSDP2 and a distributed checkpoint, as torchtitan does it, with memories in the same checkpoint.

Goes on from its checkpoint:
torchrun --nproc-per-node=2 examples/fsdp_torchrun.py --steps 100 --checkpoint build/fsdp
"""

import copy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from side_by_side import arguments, images, rows_of_step, show, take_turns
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from memaop_triton import MemAOPConfig, attach_optimizer, convert_
from memaop_triton.distributed.checkpoint import load_memory, memory_entries

args = arguments(__doc__, steps=40, checkpoint=None)
dist.init_process_group()  # NCCL on GPUs, else gloo
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
data = images()
x_train, y_train = data.x_train.to(device), data.y_train.to(device)

dense = nn.Sequential(
    nn.Sequential(nn.Linear(x_train.shape[1], 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()),
    nn.Linear(256, 10),
).to(device)
ours = convert_(copy.deepcopy(dense), MemAOPConfig(ratio=1 / 4))  # the one line
models, optimizers = {"dense": dense, "converted": ours}, {}
for name, model in models.items():
    fully_shard(model[0])
    fully_shard(model)
    optimizers[name] = torch.optim.AdamW(model.parameters(), lr=1e-3)
attach_optimizer(ours, optimizers["converted"])  # needed by row memories only
torch.manual_seed(rank)


def state(step):
    """All but the memories; DCP loads what this lists."""
    keys, parts = ("model_state_dict", "optim_state_dict"), {}
    for name, model in models.items():
        parts[name] = dict(zip(keys, get_state_dict(model, optimizers[name]), strict=True))
    return parts | {"step": step, f"draws.{rank}": torch.get_rng_state()}


begin = 0
if args.checkpoint and Path(args.checkpoint, ".metadata").exists():
    saved = state(begin)
    dcp.load(saved, checkpoint_id=args.checkpoint)
    for name, model in models.items():
        set_state_dict(model, optimizers[name], **saved[name])
    load_memory(ours, args.checkpoint)
    torch.set_rng_state(saved[f"draws.{rank}"])
    begin = saved["step"]


def training(name):
    def step(number):
        rows = rows_of_step((begin + number) * world + rank, len(x_train), 64)
        loss = F.cross_entropy(models[name](x_train[rows]), y_train[rows])
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()
        return loss.detach()

    return step


found = take_turns(args.steps - begin, **{name: training(name) for name in models})
if args.checkpoint:
    dcp.save(state(args.steps) | memory_entries(ours), checkpoint_id=args.checkpoint)
if rank == 0:
    show(found)
dist.destroy_process_group()
