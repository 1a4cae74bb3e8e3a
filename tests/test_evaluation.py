"""Evaluation: each figure against an independent computation."""

import itertools
import math
import random

import pytest
import torch
from conftest import KnownJoint

import main


@torch.no_grad()
def test_exact_likelihood_is_the_chain_rule_one_position_after_the_other(model):
    x0 = torch.randint(0, 256, (11,), generator=torch.Generator().manual_seed(0))
    expected = []
    for i in range(len(x0)):
        xt = torch.tensor([[*x0[:i].tolist(), *[main.MASK] * (len(x0) - i)]])
        expected.append(-math.log2(model(xt)[0, i].softmax(-1)[x0[i]].item()))
    result = main.exact_left_to_right(model, x0, batch_size=4)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.double), rtol=1e-4, atol=1e-4)


def test_exact_likelihood_of_a_perfect_model_is_the_probability_of_the_text():
    model = KnownJoint()
    for text in itertools.product((0, 1), repeat=3):
        bits = main.exact_left_to_right(model, torch.tensor(text))
        assert bits.sum().item() == pytest.approx(-math.log2(model.joint[text]), abs=1e-5)


def longest_copy_by_brute_force(samples, text):
    pieces = (s[i:j] for s in samples for i in range(len(s)) for j in range(i + 1, len(s) + 1))
    return max((len(piece) for piece in pieces if piece in text), default=0)


def test_statistics_of_samples_against_brute_force():
    rng = random.Random(0)
    text = bytes(rng.choices(b"ab c", k=200))
    samples = [bytes(rng.choices(b"abc ", k=30)) for _ in range(4)]
    measures = main.text_statistics(samples, text)
    assert measures["longest_copy"] == longest_copy_by_brute_force(samples, text)
    counts = [sum(sample.count(byte) for sample in samples) for byte in range(256)]
    assert measures["byte_entropy"] == pytest.approx(-sum(c / 120 * math.log2(c / 120) for c in counts if c))


def test_statistics_of_a_copied_text_say_so():
    text = b"we are such stuff as dreams are made on, and our little life is rounded with a sleep"
    measures = main.text_statistics([text], text)
    assert (measures["known_words"], measures["distinct_3"], measures["longest_copy"]) == (1, 1, len(text))
    measures = main.text_statistics([b"so so so so so so so", b"xx are we qq made xx"], text)
    assert measures["known_words"] == pytest.approx(3 / 9)
    assert measures["distinct_3"] == pytest.approx(3 / 5)
