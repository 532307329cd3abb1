"""A whole training step: forward, backward, optimizer."""

import pytest
import torch

from memaop_triton import convert_
from memaop_triton.bench.suites import contenders, models
from memaop_triton.bench.suites.problem import Problem

SAMPLED, PROJECTED = ("default", "sampled"), ("default", "projected")
DEFAULT, PRIORITY = ("default", "exact"), ("priority", "exact")
ALL = [DEFAULT, PRIORITY, SAMPLED, PROJECTED]
# Activations of 24 MiB: the system maps larger ones again in every step, dense or not, which takes
# time that has nothing to do with what is compared.
MLP = models.mlp(2048, 3072)
# Target speed-ups at r = 1/8 on a CPU.
MLP_WANTED = {"default": 1.3, "default, sampled dX": 1.9}
GPT_BLOCK, VIT_BLOCK = models.gpt_block(768, 256, 16), models.vit_block(768, 16)


def step(net, variants, suites, wanted=None, device="cpu", dtype=torch.float32, ratio=1 / 8):
    width = net.batch[-1]
    problem = Problem(net.rows, width, width, ratio, dtype, device)
    name = f"{'-'.join(suites)}-{net.name.split(',')[0].replace(' ', '-')}-{problem.budget[2:]}"
    marks = pytest.mark.suite(*suites)
    return pytest.param(net, variants, problem, wanted, marks=marks, id=name.replace("/", "_"))


@pytest.mark.parametrize(
    ("net", "variants", "problem", "wanted"),
    [
        step(MLP, [DEFAULT, SAMPLED, PROJECTED], ["quick"], MLP_WANTED),
        step(GPT_BLOCK, [DEFAULT], ["quick"], {"default": 1.2}),
        step(VIT_BLOCK, [DEFAULT], ["quick"], {"default": 1.2}),
        step(MLP, [*ALL, ("priority", "sampled")], ["cpu"], MLP_WANTED),
        step(GPT_BLOCK, ALL, ["cpu"], {"default": 1.2}),
        step(VIT_BLOCK, ALL, ["cpu"], {"default": 1.2}),
        *(
            step(net, ALL, ["gpu"], None, "cuda", torch.bfloat16)
            for net in (
                models.mlp(4096, 16384),
                models.gpt_block(2048, 1024, 16),
                models.vit_block(1024, 128),
            )
        ),
        step(models.mlp(32, 64, depth=1), [DEFAULT, SAMPLED, PROJECTED], ["smoke"]),
        step(models.gpt_block(64, 8, 8), [DEFAULT], ["smoke"]),
    ],
)
def test_step(compare, net, variants, problem, wanted):
    def make(config):
        torch.manual_seed(0)
        model = net.make()
        if config is not None:
            convert_(model, config)
        return models.TrainingStep(net, model, problem.device, problem.dtype)

    methods = contenders.converted(problem, variants, make)
    title = f"{net.name}, {problem.budget}"
    compare(problem, "step", title, methods, model=net.name, wanted=wanted)
