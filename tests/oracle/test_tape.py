"""The chain rule and the layers of the oracle are right about themselves: five-point differences, and torch's own layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from . import cases, layers, mgd, numeric, overlap, tape
from .compare import assert_close

TOLERANCE = {"rtol": 1e-8, "atol": 1e-11}

FUNCTIONS = {
    "sum": lambda x: x[0] + 2.0 * x[1] - x[2] + 3.0,
    "product": lambda x: x[0] * x[1] * 0.5 * x[2],
    "quotient": lambda x: x[0] / x[1] + 2.0 / x[2] + x[1] / 3.0,
    "sides": lambda x: (1.0 - x[0]) * (-x[1]) + abs(x[2]),
    "exponential": lambda x: tape.exp(x[0]) * tape.log(x[1]) + tape.root(x[2]),
    "square": lambda x: tape.square(x[0] - x[1]) + tape.relu(x[2]),
    "logistic": lambda x: tape.sigmoid(x[0]) * tape.sigmoid(-x[1]) + tape.softplus(x[2]) + tape.softplus(-x[0]),
    "extremes": lambda x: tape.largest(x) * 2.0 + tape.smallest(x),
    "sums": lambda x: tape.dot(x, [x[1], 2.0, x[0]]) + tape.mean(x) * tape.total(x),
    "softmax": lambda x: tape.dot(tape.softmax(x), [1.0, 2.0, 4.0]) + tape.dot(tape.log_softmax(x), [0.5, 0.0, 0.25]),
    "twice": lambda x: tape.total([x[0], x[0], x[0] * x[0]]),
    "diou": lambda x: overlap.diou([x[0], 0.1, 2.0, x[1]], [0.0, x[2] - 1.0, 3.0, 2.5]),
    "giou": lambda x: overlap.giou([0.0, 0.0, *x[:2]], [0.2, 0.1, x[2], 0.9]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives(name):
    point = np.array([0.4, 0.7, 1.6])
    function = FUNCTIONS[name]
    evaluation = tape.Evaluation(lambda x: {"only": [[function(x)]]}, point)
    (got,) = evaluation.gradient(np.ones((1, 1)))
    assert_close(evaluation.value(), [[float(function(point.tolist()))]], 1e-15)
    assert_close(got, numeric.gradient(lambda x: function(x.tolist()), point), **TOLERANCE)
    assert np.abs(got).max() > 0


def test_what_is_constant_has_no_gradient_and_shares_add_up():
    x = np.array([[1.0, 3.0], [0.0, 0.0]])

    def rows(values):
        sums = [tape.total(row) for row in values]
        return {"only": tape.split(sums, values)}

    evaluation = tape.Evaluation(rows, x)
    assert evaluation.value().tolist() == [[1.0, 3.0], [0.0, 0.0]]
    (gradient,) = evaluation.gradient(np.array([[4.0, 8.0], [2.0, 6.0]]))
    assert gradient.tolist() == [[7.0, 7.0], [4.0, 4.0]]


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 2, 1, 1), (3, 1, 2, 7)])
def test_layers_are_torchs(shape):
    x, w3, w1 = cases.pyramid(0, [shape, (4, shape[1], 3, 3), (2, shape[1], 1, 1)])
    bias = np.array([0.5, -1.0, 2.0, 0.25])
    torch_x, torch_w3 = torch.tensor(x), torch.tensor(w3)
    assert_close(layers.conv2d(x.tolist(), w3.tolist(), bias.tolist()), F.conv2d(torch_x, torch_w3, torch.tensor(bias), padding=1))
    assert_close(layers.conv2d(x.tolist(), w1.tolist()), F.conv2d(torch_x, torch.tensor(w1)))
    assert_close(layers.resized(x.tolist(), 3, 8), F.interpolate(torch_x, (3, 8), mode="bilinear"))
    window = (min(2, shape[2]), min(2, shape[3]))
    assert_close(layers.max_pool(x.tolist(), window), F.max_pool2d(torch_x, window))
    assert layers.size(x.tolist()) == shape
    if torch_x[:, 0].numel() > 1:
        own = [1.5, -0.5, 2.0][: shape[1]]
        want = F.batch_norm(torch_x, None, None, torch.tensor(own).double(), torch.tensor(own[::-1]).double(), training=True)
        assert_close(layers.batch_norm(x.tolist(), own, own[::-1]), want)
    assert_close(layers.biased_variance(x.tolist()), torch_x.var(unbiased=False), atol=1e-15)


def test_philox_gives_the_published_numbers():
    # The known answers of the Random123 library for philox4x32 with ten rounds.
    ones = 2**32 - 1
    assert mgd.philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert mgd.philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert mgd.philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
