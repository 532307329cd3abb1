"""What the tests of this folder do on a GPU and, without one, on the CPU."""

import contextlib
import hashlib

import torch
from torch import nn

from memaop_triton import convert_, memory_state_dict, new_memory
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.bench.first_run import oracle


def batches(shape, count, dtype, device, seed=0):
    """X and G of some steps, made by a generator of their own."""
    generator = torch.Generator(device).manual_seed(seed)
    m, *columns = shape
    return [tuple(oracle.rows_of(m, c, dtype, generator) for c in columns) for _ in range(count)]


def steps(config, data, seed):
    """dW and db of every step, and what the memory holds in the end: tensors."""
    x, g = data[0]
    generator = torch.Generator(x.device).manual_seed(seed)
    memory = new_memory(config, x.shape[1], g.shape[1])
    found = [t for x, g in data for t in weight_and_bias_grad(x, g, config, memory,
                                                              generator=generator)]  # fmt: skip
    state = {} if memory is None else memory.state_dict()
    return found + [t for t in state.values() if isinstance(t, torch.Tensor)]


def layer_steps(config, data, seed):
    """The same of a layer, whose draws come from the device's default generator: with dX."""
    (x, g), found = data[0], []
    torch.manual_seed(seed)
    layer = nn.Linear(x.shape[1], g.shape[1], device=x.device, dtype=x.dtype)
    net = convert_(nn.Sequential(layer), config)
    for rows, gradient in data:
        leaf = rows.clone().requires_grad_()
        net.zero_grad()
        net(leaf).backward(gradient)
        found += [p.grad.clone() for p in net.parameters()] + [leaf.grad]
    states = memory_state_dict(net).values()
    return found + [t for s in states for t in s.values() if isinstance(t, torch.Tensor)]


def digest(tensors):
    """A hash of every bit."""
    made = hashlib.sha256()
    for t in tensors:
        made.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


class Graph:
    """A call that was captured into a CUDA graph; without a GPU it is called anew.

    Attributes:
        result: What the call returned, with what the last replay computed.
    """

    def __init__(self, call, device, warm_up=3):
        self.call, self.graph = call, None
        if device.type != "cuda":
            self.result = call()
            return
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(warm_up):
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = call()

    def replay(self):
        """Compute the result anew."""
        if self.graph is None:
            self.result = self.call()
        else:
            self.graph.replay()
        return self.result


def stream(device):
    """Another stream of a GPU, which begins behind what was launched; nothing without one."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    other = torch.cuda.Stream(device)
    other.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(other)


@contextlib.contextmanager
def no_synchronisation(device):
    """Whatever waits for the GPU raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
