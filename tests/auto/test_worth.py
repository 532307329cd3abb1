"""The choice of most progress per second, against all choices there are."""

import itertools

import pytest
import torch

from memaop_triton.auto.worth import EXACT, MOST_NOISE, Layer, best_choice, progress_of, worth_of
from memaop_triton.monitor.hull import Option

SHARES = (EXACT, 1 / 2, 1 / 4, 1 / 8)


def layer(seconds, noise, square, shares=SHARES):
    """Time in proportion to the rows and half of it fixed; variance like that of equal rows."""
    options = [
        Option(share, seconds * (1 if share == EXACT else 0.2 + share), noise * (1 / share - 1))
        for share in shares
    ]
    return Layer(options, square)


def every_choice(layers, seconds):
    square = sum(one.square for one in layers.values())
    for choice in itertools.product(*(one.options for one in layers.values())):
        allowed = all(
            o.variance <= one.square for o, one in zip(choice, layers.values(), strict=True)
        )
        if allowed:
            saved = sum(
                one.options[0].cost - o.cost for o, one in zip(choice, layers.values(), strict=True)
            )
            noise = sum(o.variance for o in choice) / square
            if noise > MOST_NOISE:
                continue
            yield seconds / (seconds - saved) * progress_of(noise)


def test_no_other_choice_is_better():
    gained = 0
    for seed in range(300):
        torch.manual_seed(seed)
        numbers = torch.rand(4, 3).exp().tolist()
        scale = float(10 ** (2 * torch.rand(()) - 1.5))
        layers = {
            str(i): layer(seconds, scale * noise, square)
            for i, (seconds, noise, square) in enumerate(numbers)
        }
        step = 2 * sum(seconds for seconds, *_ in numbers)
        found = best_choice(layers, step)
        assert found.progress == pytest.approx(max(every_choice(layers, step)), rel=1e-9)
        gained += found.progress > 1
    assert 100 < gained < 300


def test_what_it_says_of_a_choice():
    found = best_choice({"a": layer(1.0, 0.02, 1.0), "b": layer(1.0, 3.0, 1.0)}, 4.0)
    assert found.shares == {"a": 1 / 4, "b": EXACT}
    assert found.seconds == pytest.approx(4 - (1 - 0.45))
    assert found.noise == pytest.approx(0.02 * 3 / 2)
    assert found.progress == pytest.approx(found.speedup / (1 + found.noise))


def test_the_worth_of_a_given_choice_is_that_of_the_path():
    layers = {"a": layer(1.0, 0.02, 1.0), "b": layer(1.0, 0.1, 1.0)}
    found = best_choice(layers, 4.0)
    again = worth_of(layers, found.shares, 4.0)
    assert again.shares == found.shares
    assert again[1:] == pytest.approx(found[1:])
    assert worth_of(layers, dict.fromkeys(layers, EXACT), 4.0).progress == 1


def test_dense_is_kept_where_noise_costs_more_than_time_saves():
    found = best_choice({"a": layer(1.0, 0.5, 1.0)}, 10.0)
    assert (found.shares, found.progress, found.noise) == ({"a": EXACT}, 1.0, 0.0)


def test_no_layer_gets_more_variance_than_its_own_gradient():
    """Though the sum over layers would bear it."""
    layers = {"large": layer(1.0, 1e-6, 1e6), "small": layer(1.0, 2.0, 1.0)}
    assert best_choice(layers, 3.0).shares["small"] == EXACT


def test_slower_options_are_not_taken():
    slow = Layer([Option(EXACT, 1.0, 0.0), Option(1 / 2, 1.5, 0.0)], 1.0)
    assert best_choice({"a": slow}, 4.0).shares == {"a": EXACT}


def test_savings_that_add_up_to_more_than_a_step_are_not_believed():
    assert best_choice({"a": layer(1.0, 0.0, 1.0)}, 0.5).speedup == pytest.approx(10)


def test_gradients_that_are_zero():
    found = best_choice({"a": layer(1.0, 0.0, 0.0)}, 4.0)
    assert found.shares == {"a": 1 / 8}
    assert found.noise == 0
