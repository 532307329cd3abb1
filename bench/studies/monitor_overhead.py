"""What watching a model costs: training steps with and without `monitor`, in turns, in one run.

    python -m bench.studies.monitor_overhead [--seconds 60] [--threads N]

Steps are forward, backward and update of converted networks (default configuration). What is timed
is a monitor that observes every pass; by default it observes one in 25, which costs a 25th of that,
because between two observations a pass only counts. "Again" is a step without a monitor, the noise
of the measurement. Figures are medians over rounds of a ratio of two times of one round, with
quartiles.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable

import torch

from memaop_triton import MemAOPConfig, convert_, monitor
from memaop_triton.bench.measure import Method, clock_for, compare
from memaop_triton.bench.suites.models import Net, TrainingStep, gpt_block, mlp

DEFAULT_EVERY = inspect.signature(monitor).parameters["every"].default
NETS = (mlp(256, 1024), mlp(1024, 4096), gpt_block(512, 512, 4))


def step_of(net: Net, device: str, *, watched: bool) -> Callable[[], object]:
    """A training step of a converted network, of which every pass is observed or none."""
    torch.manual_seed(0)
    model = convert_(net.make().to(device), MemAOPConfig())
    if watched:
        monitor(model, every=1)
    return TrainingStep(net, model, device, torch.float32)


def measure(net: Net, seconds: float, device: str) -> dict[str, dict[str, float]]:
    """Overhead in per cent, `median`, `q1` and `q3`, of "again" and of "every pass"."""
    methods = [
        Method("plain", "dense", "plain", step_of(net, device, watched=False)),
        Method("again", "ours", "again", step_of(net, device, watched=False)),
        Method("every pass", "ours", "every pass", step_of(net, device, watched=True)),
    ]
    results = compare(methods, clock_for(torch.device(device)), seconds)
    overheads = {}
    for name in ("again", "every pass"):
        speedup = results[name]["speedup"]
        # The slower quarter of speed-ups is the upper quarter of overheads.
        places = {"median": "median", "q1": "q3", "q3": "q1"}
        overheads[name] = {here: 100 * (1 / speedup[there] - 1) for here, there in places.items()}
    return overheads


def main() -> None:
    """Print a line for every network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="for each network")
    parser.add_argument("--threads", type=int, help="of PyTorch; its own choice if left out")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"overhead in % of a step ({device}, {torch.get_num_threads()} threads)")
    for net in NETS:
        found = measure(net, arguments.seconds, device)
        cells = [
            f"{name} {o['median']:+.2f} [{o['q1']:+.2f}, {o['q3']:+.2f}]"
            for name, o in found.items()
        ]
        share = found["every pass"]["median"] / DEFAULT_EVERY
        print(f"{net.name}: one pass in {DEFAULT_EVERY} {share:+.2f} ({', '.join(cells)})")


if __name__ == "__main__":
    main()
