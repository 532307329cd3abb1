"""Gradient exchange over a slow link: all-reduce against FactorAllGather, in one run.

    sudo python -m bench.studies.throttled_link [--rate 1gbit] [--rounds 25]

Two network namespaces joined by a veth pair, whose two ends each send at most `--rate` (tc tbf),
hold one process each, with one thread and gloo. Nothing leaves the namespaces, which are removed
again. Linux, root, `ip` and `tc` are needed.

Both processes train the same converted layer in turns: under plain all-reduce and under
FactorAllGather. A step is forward, backward and exchange; the exchange is the time from the first
call of the communication hook until the last of its futures is done (weight and bias are two
buckets), and the slower process counts. Bytes are what the interface has sent, with the headers of
TCP and IP.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from memaop_triton import FactorAllGather, MemAOPConfig, MemAOPLinear

N = 1024
RATIO = 1 / 16
CASES = [(m, memory) for m in (1024, 2048) for memory in ("none", "subspace")]
METHODS = ("all-reduce", "factors")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
LINK = "memaop"
PORT = 29613
WARM_UP = 3
TIMEOUT = 480


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@contextlib.contextmanager
def slow_link(rate: str) -> Iterator[list[str]]:
    """Two namespaces whose interfaces `memaop` reach each other at `rate`; removed at the end."""
    names = [f"memaop-{os.getpid()}-{rank}" for rank in range(2)]
    ends = [f"maop{os.getpid() % 10000}{side}" for side in "ab"]
    with contextlib.ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            _ip("link", "set", end, "netns", name)
            inside = ("netns", "exec", name, "ip")
            _ip(*inside, "link", "set", end, "name", LINK)
            _ip(*inside, "address", "add", f"{address}/30", "dev", LINK)
            _ip(*inside, "link", "set", LINK, "up")
            _ip(*inside, "link", "set", "lo", "up")
            qdisc = f"qdisc add dev {LINK} root tbf rate {rate} burst 128kb latency 200ms"
            _ip("netns", "exec", name, "tc", *qdisc.split())
        yield names


def run_workers(names: list[str]) -> None:
    """Run one worker in each namespace, with the arguments of this process."""
    processes = []
    for rank, name in enumerate(names):
        settings = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": LINK,
            "OMP_NUM_THREADS": "1",
        }
        inside = ["ip", "netns", "exec", name]
        worker = [sys.executable, "-m", "bench.studies.throttled_link", "--worker", *sys.argv[1:]]
        processes.append(subprocess.Popen([*inside, *worker], env=os.environ | settings))
    try:
        deadline = time.monotonic() + TIMEOUT
        for process in processes:
            code = process.wait(max(1, deadline - time.monotonic()))
            if code:
                raise RuntimeError(f"a process ended with status {code}.")
    finally:
        for process in processes:
            process.kill()
            process.wait(20)


class Method:
    """One way to exchange the gradients of the same layer."""

    def __init__(self, name: str, m: int, memory: str) -> None:
        torch.manual_seed(0)
        layer = MemAOPLinear(N, N, config=MemAOPConfig(ratio=RATIO, memory=memory))
        self.ddp = DistributedDataParallel(nn.Sequential(layer))
        self._register, self.ddp.register_comm_hook = self.ddp.register_comm_hook, self._timed
        if name == "all-reduce":
            self.ddp.register_comm_hook(None, allreduce_hook)
        else:
            FactorAllGather.register(self.ddp)
        self.x = torch.randn(m, N)

    def _timed(self, state, hook) -> None:
        """As DDP's method; the hook also records how long the exchange took."""

        def timed(state, bucket):
            if self.began is None:
                self.began = time.perf_counter()

            def done(future):
                self.ended = time.perf_counter()
                return future.value()

            return hook(state, bucket).then(done)

        self._register(state, timed)

    def step(self) -> tuple[float, float, float]:
        """ms of the exchange and of the step in the slower process, and KB sent by this one."""
        self.ddp.zero_grad()
        dist.barrier()
        sent = interface_bytes()
        self.began = None
        start = time.perf_counter()
        self.ddp(self.x).square().mean().backward()
        seconds = (self.ended - self.began, time.perf_counter() - start)
        times = 1e3 * torch.tensor(seconds, dtype=torch.float64)
        sent = interface_bytes() - sent
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        return *times.tolist(), 1e-3 * sent


def interface_bytes() -> int:
    """What the namespace's end of the link has sent so far."""
    return int(Path(f"/sys/class/net/{LINK}/statistics/tx_bytes").read_text())


def work(rate: str, rounds: int) -> None:
    """Time all cases; the first process prints a line for every method."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    is_first = dist.get_rank() == 0
    if is_first:
        print(f"N = P = {N}, K/M = 1/{round(1 / RATIO)}, 2 processes, {rate}, gloo, 1 thread each")
        print(f"torch {torch.__version__}; median [quartiles] of {rounds} interleaved rounds")
        head = ("exchange, ms", "ratio", "step, ms", "ratio")
        print(f"{'':42s}" + "".join(f"{name:>24s}" for name in head) + f"{'sent, KB':>10s}")
    for m, memory in CASES:
        methods = {name: Method(name, m, memory) for name in METHODS}
        seen = {name: [] for name in METHODS}
        for number in range(WARM_UP + rounds):
            for name, method in methods.items():
                measured = method.step()
                if number >= WARM_UP:
                    seen[name].append(measured)
        for name in METHODS if is_first else ():
            exchange, step, sent = zip(*seen[name], strict=True)
            dense_exchange, dense_step, _ = zip(*seen[METHODS[0]], strict=True)
            cells = (exchange, _ratios(dense_exchange, exchange), step, _ratios(dense_step, step))
            line = "".join(f"{_spread(values):>24s}" for values in cells)
            sent = f"{statistics.median(sent):10.1f}"
            print(f"{f'M={m} memory={memory}, {name}':42s}{line}{sent}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    # DDP's reducer keeps gloo's threads until the interpreter ends, where they sometimes abort it.
    os._exit(0)


def _ratios(dense: Sequence[float], ours: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(dense, ours, strict=True)]


def _spread(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:7.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Make the link and run the workers, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", default="1gbit", help="of each direction, as tc has it")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.rate, arguments.rounds)
        return
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        parser.error(f"needs root and iproute2 (missing: {', '.join(missing) or 'root'}).")
    # Ended from outside, it still removes the namespaces.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with slow_link(arguments.rate) as names:
        run_workers(names)


if __name__ == "__main__":
    main()
