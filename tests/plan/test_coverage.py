"""What converted layers compute of a model, by elements and by FLOPs, and who says so."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from memaop_triton import (
    LowCoverageWarning,
    MemAOPConfig,
    convert_,
    coverage,
    model_report,
    plan,
    revert_,
)
from tests.auto.training import steps_of_a_second

# Sizes that the grouped product takes.
EXPERTS, N, P, TOKENS = 4, 8, 16, 12
EXACT = MemAOPConfig(ratio=1 / 2, memory=None)


class Experts(nn.Module):
    """Every token is multiplied by the matrix of one expert, in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, P, N))
        self.way = way

    def forward(self, x):
        rows = x.flatten(0, -2)
        chosen = torch.arange(len(rows)) // (len(rows) // EXPERTS)
        return getattr(self, self.way)(rows, chosen).unflatten(0, x.shape[:-1])

    def one_by_one(self, rows, chosen):
        return torch.cat([rows[chosen == e] @ w.t() for e, w in enumerate(self.weight)])

    def copied(self, rows, chosen):
        return torch.bmm(self.weight[chosen], rows.unsqueeze(-1)).squeeze(-1)

    def grouped(self, rows, chosen):
        ends = torch.bincount(chosen, minlength=EXPERTS).cumsum(0, dtype=torch.int32)
        return nn.functional.grouped_mm(rows, self.weight.transpose(1, 2), offs=ends)

    def unseen(self, rows, chosen):
        return _Hidden.apply(rows, self.weight, chosen)


class _Hidden(torch.autograd.Function):
    """A product that nobody can watch, as if a kernel of somebody else's computed it."""

    @staticmethod
    def forward(ctx, rows, weight, chosen):
        ctx.sizes = rows.shape, weight.shape
        return torch.ones(len(rows), weight.shape[1])

    @staticmethod
    def backward(ctx, g):
        return torch.ones(ctx.sizes[0]), torch.ones(ctx.sizes[1]), None


class Model(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.table = nn.Embedding(50, N)
        self.place = nn.Parameter(torch.randn(1, 3, N))
        self.experts = experts
        self.head = nn.Linear(P, 7)

    def forward(self, tokens):
        return self.head(self.experts(self.table(tokens) + self.place))


TOKEN_IDS = torch.arange(TOKENS).view(4, 3)
OF_HEAD, OF_EXPERTS = 2 * TOKENS * P * 7, 2 * TOKENS * P * N


@pytest.mark.parametrize("way", ["one_by_one", "copied", "grouped"])
@pytest.mark.parametrize("autocast", [False, True])
def test_flops_of_experts_are_those_of_the_tokens_that_reach_them(way, autocast):
    model = Model(Experts(way))
    with pytest.warns(LowCoverageWarning, match="left: Experts 79 %.*of 3 dimensions"):
        convert_(model, EXACT)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = coverage(model, TOKEN_IDS)
    assert found.share == OF_HEAD / (OF_HEAD + OF_EXPERTS)
    assert found.unit == "FLOPs of the weight gradients"
    assert not found.is_estimate
    assert set(found.left) == {"Experts"}
    assert found.left["Experts"].parameters == 1


def test_products_that_cannot_be_seen_are_taken_to_be_as_others():
    model = Model(Experts("unseen"))
    found = coverage(model, TOKEN_IDS)
    assert found.is_estimate
    elements = EXPERTS * N * P, 7 * P
    assert found.left["Experts"].share == elements[0] / sum(elements)
    assert str(found).startswith("Converted layers compute about 0 % of the FLOPs")


def test_elements_count_where_no_batch_was_seen():
    model = Model(Experts("copied"))
    found = coverage(model)
    elements = {"Experts": EXPERTS * N * P, "Linear": 7 * P, "Model": 3 * N}
    total = sum(elements.values())
    assert found.unit == "elements of the weight matrices"
    assert {name: left.share for name, left in found.left.items()} == {
        name: count / total for name, count in elements.items()
    }
    assert found.share == 0
    assert list(found.left) == sorted(elements, key=elements.get, reverse=True)


def test_convolutions_count_at_every_position():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 36, 4))
    x = torch.randn(2, 3, 8, 8)
    convert_(model, EXACT, targets="linear")
    found = coverage(model, x, lambda y: y.square().sum())
    of_conv, of_linear = 2 * (2 * 36) * 27 * 5, 2 * 2 * 180 * 4
    assert found.share == of_linear / (of_conv + of_linear)
    assert found.left["Conv2d"].is_convertible


class Attention(nn.MultiheadAttention):
    def forward(self, *inputs, **options):
        return super().forward(*inputs, **options)


def test_attention_that_calls_no_layers_is_named():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    model.self_attn = Attention(8, 2, dropout=0.0)
    with pytest.warns(UserWarning, match="NonDynamicallyQuantizableLinear"):
        convert_(model, EXACT)
    taken, left = 2 * 8 * 16, 4 * 8 * 8
    for found in (coverage(model), coverage(model, torch.randn(3, 5, 8))):
        assert found.share == taken / (taken + left)
        assert list(found.left) == ["Attention"]
        assert found.left["Attention"].parameters == 2
        assert found.left["Attention"].reason == "has a forward pass of its own"
    revert_(model)
    # Its last layer has no part in it, converted or not.
    convert_(model, EXACT, filter_fn=lambda module, name: True)
    assert coverage(model).share == taken / (taken + left)


def test_attention_counts_by_its_projections():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    left = coverage(model, torch.randn(3, 5, 8)).left["MultiheadAttention"]
    assert left.reason == "can be converted"
    assert left.is_convertible
    convert_(model, EXACT, overrides={"self_attn.in_proj": None})
    of_others, of_packed = 2 * 8 * 16 + 8 * 8, 3 * 8 * 8
    for found in (coverage(model), coverage(model, torch.randn(3, 5, 8))):
        assert found.share == of_others / (of_others + of_packed)
        assert list(found.left) == ["MultiheadAttention"]
        assert found.left["MultiheadAttention"].parameters == 1


def test_a_weight_of_several_modules_counts_once_and_a_table_not_at_all():
    model = nn.Sequential(nn.Embedding(50, N), nn.Linear(N, N), nn.Linear(N, 50, bias=False))
    model[2].weight = model[0].weight
    x = torch.arange(8)
    convert_(model, EXACT, overrides={"1": None})
    for found, head, inner in (
        (coverage(model), 50 * N, N * N),
        (coverage(model, x), 8 * 50 * N, 8 * N * N),
    ):
        assert found.share == head / (head + inner)
        assert list(found.left) == ["Linear"]
    revert_(model)
    twins = nn.Sequential(nn.Linear(N, N), nn.Linear(N, N))
    twins[0].weight = twins[1].weight
    convert_(twins, EXACT, overrides={"0": None})
    assert coverage(twins).share == 1, "one of them is converted"
    convert_(model, EXACT, overrides={"2": None})
    found = coverage(model, x)
    assert found.share == pytest.approx(N / (50 + N))
    assert list(found.left) == ["Linear"]


def test_a_table_that_the_model_multiplies_by_counts_once_that_is_seen():
    class Tied(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x)) @ self[0].weight.t()

    model = convert_(Tied(nn.Embedding(50, N, max_norm=1.0), nn.Linear(N, N)), EXACT)
    assert coverage(model).share == 1
    found = coverage(model, torch.arange(8))
    assert found.share == N / (N + 50)
    assert found.left["Embedding"].reason == "of no kind that is converted"
    assert not found.is_estimate


def test_frozen_weights_do_not_count():
    model = convert_(nn.Sequential(nn.Linear(N, N), nn.Linear(N, P)), EXACT, overrides={"0": None})
    model[0].requires_grad_(False)
    assert coverage(model).share == coverage(model, torch.randn(5, N)).share == 1
    model[1].requires_grad_(False)
    assert coverage(model).share == 1
    assert not coverage(model).left


def test_what_gets_no_gradient_takes_no_flops():
    class Half(nn.Sequential):
        def forward(self, x):
            with torch.no_grad():
                self[1](x)
            return self[0](x)

    model = convert_(Half(nn.Linear(N, N), nn.Linear(N, P)), EXACT, overrides={"1": None})
    assert coverage(model, torch.randn(5, N)).share == 1
    assert coverage(model).share == N / (N + P)


def test_a_layer_that_is_used_twice_or_recomputed():
    class Used(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](checkpoint(self[0], x, use_reentrant=False)))

    model = Used(nn.Linear(N, N), nn.Linear(N, N))
    convert_(model, EXACT, overrides={"0": None})
    found = coverage(model, torch.randn(5, N))
    assert found.share == pytest.approx(1 / 3)


def test_weights_that_are_computed_from_parameters():
    normed = parametrizations.weight_norm(nn.Linear(N, P, bias=False))
    pruned = prune.random_unstructured(nn.Linear(P, N, bias=False), "weight", 0.5)
    model = nn.Sequential(normed, pruned, nn.Linear(N, N))
    found = coverage(model)
    elements = N * N + N * P + P + P * N  # weight_norm has a length for each output
    assert found.left["ParametrizedLinear"].share == (N * P + P) / elements
    assert found.left["ParametrizedLinear"].reason == "a subclass, which a filter_fn can take"
    seen = coverage(model, torch.randn(5, N))
    assert seen.is_estimate
    assert seen.left["Linear"].share == pytest.approx((N * N + N * P) / elements)


def test_coverage_leaves_the_model_as_it_was():
    model = Model(Experts("one_by_one")).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    coverage(model, TOKEN_IDS)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_a_warning_comes_once_and_names_the_line_of_the_user():
    model = Model(Experts("copied"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert_(model, EXACT)
    (warning,) = caught
    assert warning.category is LowCoverageWarning
    assert warning.filename == __file__
    assert str(warning.message) == (
        "Converted layers compute 17 % of the elements of the weight matrices; left: Experts 79 % "
        "(Parameters of 3 dimensions), Model 3.7 % (Parameters of 3 dimensions). "
        "memaop_triton.coverage(model) shows all of it."
    )


class OwnConv1d(nn.Conv1d):
    """Out of reach: what it computes is its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def is_linear(module, name):
    return type(module) is nn.Linear


def test_what_users_leave_out_is_not_warned_about():
    layers = [nn.Linear(N, N) for _ in range(4)]
    convert_(nn.Sequential(*layers), EXACT, filter_fn=lambda module, name: name == "0")
    revert_(layers[0])
    model = nn.Sequential(*layers)
    convert_(model, EXACT, overrides={"[123]": None})
    assert coverage(model).share == 1 / 4
    assert coverage(model).left["Linear"].is_convertible
    big = nn.Sequential(OwnConv1d(1, N, N), nn.Linear(1, N * N))  # exactly half
    convert_(big, EXACT, filter_fn=is_linear)
    assert coverage(big).share == 1 / 2


def test_only_if_faster_warns_by_flops_of_all_that_could_be_converted():
    model = nn.Sequential(OwnConv1d(1, 2, 3), nn.Linear(62, 40))
    x = torch.randn(1, 1, 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert_(model, EXACT, is_linear, only_if_faster=True, example_inputs=x)
    assert [w.category for w in caught if w.category is LowCoverageWarning] == []
    wide = nn.Sequential(OwnConv1d(1, 2, 3), OwnConv1d(2, 2, 61), nn.Linear(2, 40))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert_(wide, EXACT, is_linear, only_if_faster=True, example_inputs=x)
    (low,) = [str(w.message) for w in caught if w.category is LowCoverageWarning]
    assert low.startswith("Layers that could be converted compute 16 % of the FLOPs")


def test_a_plan_shows_what_its_layers_are_of_the_model():
    model = Model(Experts("one_by_one"))
    found = plan(model, EXACT, example_inputs=TOKEN_IDS, time_budget=0.01)
    assert found.coverage.share == OF_HEAD / (OF_HEAD + OF_EXPERTS)
    assert (
        "These layers compute 47 % of the FLOPs of the weight gradients; left: Experts 53 % "
        "(Parameters of 3 dimensions)." in str(found)
    )
    content = json.loads(json.dumps(found.to_dict()))["coverage"]
    assert content["left"]["Experts"]["share"] == 1 - content["share"]


def test_a_report_counts_the_rows_that_were_observed(monkeypatch):
    class Pooled(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0](x)).mean(1))

    model = Pooled(nn.Linear(N, N), nn.Conv1d(3, 3, 1), nn.Linear(N, P))
    steps_of_a_second(monkeypatch)  # the fifth one is observed
    convert_(model, MemAOPConfig(ratio="auto", memory=None), targets="linear")
    assert "Converted layers compute 96 % of the elements" in model_report(model).splitlines()[-1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        model(torch.randn(4, 3, N)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    # 12 rows for the first layer, 4 for the last, and for what was not observed as many.
    taken, left = 12 * N * N + 4 * N * P, 4 * 9
    share = f"{100 * taken / (taken + left):.0f}"
    last = model_report(model).splitlines()[-1]
    assert last.startswith(f"Converted layers compute about {share} % of the FLOPs of the weight")
    assert last.endswith("left: Conv1d 2.7 % (can be converted).")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model",), TypeError, r"must be a torch\.nn\.Module, got str"),
        ((nn.Linear(N, N), None, torch.sum), ValueError, "loss_fn has no meaning without"),
        ((nn.Linear(N, N), 3), TypeError, "example_inputs must be a tensor"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        coverage(*arguments)
