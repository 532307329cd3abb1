"""Data-parallel training: converted before DDP, with an exchange of rows where these are fewer.

torchrun --nproc-per-node=2 examples/ddp_torchrun.py --steps 100
"""

import copy

import torch
import torch.distributed as dist
from side_by_side import arguments, images, rows_of_step, show, take_turns
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from memaop_triton import FactorAllGather, MemAOPConfig, convert_

BATCH = 64  # of every process

dist.init_process_group()  # NCCL on GPUs, else gloo
rank = dist.get_rank()
device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")

args = arguments(__doc__, steps=60)
data = images()
pixels = data.x_train.shape[1]
x_train, y_train = data.x_train.to(device), data.y_train.to(device)

dense = nn.Sequential(
    nn.Linear(pixels, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
).to(device)
ours = convert_(copy.deepcopy(dense), MemAOPConfig(ratio=1 / 8, memory=None))  # the one line

dense, ours = DistributedDataParallel(dense), DistributedDataParallel(ours)
# Optional: the processes send selected rows and not dW where the rows are fewer numbers.
FactorAllGather.register(ours)
torch.manual_seed(rank)  # every process draws rows of its own


def training(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(number):
        rows = rows_of_step(number * dist.get_world_size() + rank, len(x_train), BATCH)
        loss = F.cross_entropy(model(x_train[rows]), y_train[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.all_reduce(mean := loss.detach() / dist.get_world_size())
        return mean

    return step


found = take_turns(args.steps, dense=training(dense), converted=training(ours))
if rank == 0:
    weights = sum(p.numel() for p in ours.parameters() if p.dim() > 1)
    print(f"{dist.get_world_size()} processes, {weights:,} numbers of weights")
    show(found)
dist.barrier()
dist.destroy_process_group()
