"""Evaluation: each figure against an independent computation."""

import itertools
import math
import random

import pytest
import torch
from conftest import TINY, KnownJoint

import main


@torch.no_grad()
def test_exact_likelihood_is_the_chain_rule_one_position_after_the_other(model):
    x0 = torch.randint(0, 256, (11,), generator=torch.Generator().manual_seed(0))
    expected = []
    for i in range(len(x0)):
        xt = torch.tensor([[*x0[:i].tolist(), *[main.MASK] * (len(x0) - i)]])
        expected.append(-math.log2(model(xt)[0, i].softmax(-1)[x0[i]].item()))
    result = main.exact_likelihood(model, torch.stack([x0, x0]))
    torch.testing.assert_close(result, torch.tensor([expected] * 2, dtype=torch.double), rtol=1e-4, atol=1e-4)


def test_exact_likelihood_of_a_perfect_model_is_the_probability_of_the_text():
    model = KnownJoint()
    texts = torch.tensor(list(itertools.product((0, 1), repeat=3)))
    for order in ("left_to_right", "most_confident_first"):
        bits = main.exact_likelihood(model, texts, order).sum(dim=1)
        torch.testing.assert_close(bits, -model.joint.flatten().double().log2(), rtol=1e-5, atol=1e-5)


def test_statistics_of_samples_against_brute_force():
    rng = random.Random(0)
    text = bytes(rng.choices(b"ab c", k=200))
    samples = [bytes(rng.choices(b"abc ", k=30)) for _ in range(4)]
    measures = main.text_statistics(samples, text)
    assert main.text_statistics([text[3:40] + b"zz" * 16, text[:31]], text)["copied"] == 1 / 2
    counts = [sum(sample.count(byte) for sample in samples) for byte in range(256)]
    assert measures["byte entropy"] == pytest.approx(-sum(c / 120 * math.log2(c / 120) for c in counts if c))


def test_statistics_of_a_copied_text_say_so():
    text = b"we are such stuff as dreams are made on, and our little life is rounded with a sleep"
    measures = main.text_statistics([text], text)
    assert (measures["known words"], measures["copied"]) == (1, 1)
    measures = main.text_statistics([b"so so so so so so so", b"xx are we qq made xx"], text)
    assert measures["known words"] == pytest.approx(3 / 9)


def test_words_of_other_scripts_are_known_too():
    text = "и жизнь, и слёзы, и любовь".encode()
    assert main.text_statistics(["да и жизнь и тень нет".encode()], text)["known words"] == pytest.approx(3 / 4)


def write_text(tmp_path, config, size=400):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(random.Random(1).choices(b"to be or not", k=size)))
    return main.ByteLevelTextDataset(path, config.max_length)


def test_a_model_that_knows_nothing_has_8_bits_in_every_figure_of_likelihood(tmp_path):
    config = main.CONFIG(**TINY)
    model = main.MaskPredictor(config)  # its output layer starts at zero
    dataset = write_text(tmp_path, config)
    figures = main.evaluate(model, config, dataset, dataset.bytes.tobytes(), num_chunks=4)
    likelihoods = [row for row in figures if row["kind"] != "other" or "cross-entropy" in row["figure"]]
    likelihoods = [row for row in likelihoods if row["value"] is not None]
    assert len(likelihoods) >= 5
    for row in likelihoods:
        assert row["value"] == pytest.approx(8, abs=1e-4), row


def test_the_chunks_behind_the_bound_cover_the_text_once_and_the_last_one_partly(tmp_path, model, config):
    dataset = write_text(tmp_path, config, size=397)
    lengths, ratios, bits = main.measure(model, dataset)
    assert lengths.tolist() == [16] * 24 + [13]
    assert ((ratios > 0) & (ratios <= 1)).all()
    mean, _ = main.estimate_nelbo(model, dataset)
    assert mean == pytest.approx(((bits * lengths).sum() / 397).item())


@pytest.mark.parametrize("chunks", [1, 64, 65, 129])
def test_texts_of_any_number_of_chunks_are_measured(tmp_path, model, config, chunks):
    dataset = write_text(tmp_path, config, size=16 * chunks)
    lengths, _, bits = main.measure(model, dataset)
    assert lengths.tolist() == [16] * chunks
    assert (bits > 0).all()


@torch.no_grad()
def test_a_continuation_is_the_later_part_of_the_chain(model):
    x0 = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(0))
    whole, is_later = main.exact_likelihood(model, x0), torch.arange(11) >= 4
    later = main.exact_likelihood(model, x0, is_hole=is_later)
    torch.testing.assert_close(later, whole.where(is_later, 0), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_likelihood_most_confident_first_is_that_of_a_naive_loop(model):
    x0 = torch.randint(0, 256, (1, 7), generator=torch.Generator().manual_seed(0))
    xt, bits = [main.MASK] * 7, 0.0
    while main.MASK in xt:
        probs = model(torch.tensor([xt]))[0].softmax(-1)
        confident = max((i for i in range(7) if xt[i] == main.MASK), key=lambda i: probs[i].max().item())
        bits -= math.log2(probs[confident, x0[0, confident]].item())
        xt[confident] = x0[0, confident].item()
    assert main.exact_likelihood(model, x0, "most_confident_first").sum().item() == pytest.approx(bits, rel=1e-4)


def test_infilling_counts_the_bytes_that_come_out_as_they_were(tmp_path, monkeypatch, model, config):
    """A sampler that restores the first half of every hole, whatever stands around it."""
    dataset = write_text(tmp_path, config)
    x0 = [dataset[i * 25 // 3].tolist() for i in range(3)]

    def half_right(model, prompts, response_length, config, suffix="", seed=None, on_step=None):
        if prompts[0][-1] != main.MASK:
            for text, truth in zip(prompts, x0, strict=True):
                assert [i for i, token in enumerate(text) if token == main.MASK] == [4, 5, 6, 7, 8, 9, 10, 11]
                assert all(token in (main.MASK, wanted) for token, wanted in zip(text, truth, strict=True))
        on_step(torch.tensor([[*x[:8], *((b + 1) % 256 for b in x[8:12]), *x[12:]] for x in x0]).clamp(max=255))

    monkeypatch.setattr(main, "run_conditional_diffusion_inference", half_right)
    rows = {row["figure"]: row for row in main.evaluate(model, config, dataset, b"to be", num_chunks=3)}
    assert (rows["holes, greedy"]["value"], rows["holes, greedy"]["standard_error"]) == (0.5, 0.0)


def evaluate_samples(monkeypatch, model, config, dataset, sample):
    """The rows of `evaluate` about samples, if the sampler writes `sample` again and again."""
    text = torch.tensor([*(sample * 16)][: config.max_length])
    monkeypatch.setattr(
        main,
        "run_conditional_diffusion_inference",
        lambda model, prompts, *_, on_step=None, **__: on_step(text.repeat(len(prompts), 1)),
    )
    rows = main.evaluate(model, config, dataset, dataset.bytes.tobytes(), num_chunks=4)
    return {row["figure"]: row for row in rows if row["text"] is not None}


def test_samples_that_collapse_are_marked_and_the_text_itself_is_not(tmp_path, monkeypatch, model, config):
    text = b"to be or not, she said, and so we all go on to it in the end; "
    (tmp_path / "text.txt").write_bytes(text * 8)
    dataset = main.ByteLevelTextDataset(tmp_path / "text.txt", config.max_length)
    spaces = evaluate_samples(monkeypatch, model, config, dataset, b" ")
    assert {name for name, row in spaces.items() if row["is_far_off"]} >= {"byte entropy, free", "known words, free"}
    broken = evaluate_samples(monkeypatch, model, config, dataset, b"\xe3\x81 ")
    assert broken["invalid UTF-8, free"]["is_far_off"]
    monkeypatch.undo()
    chunks = [bytes(dataset[i].tolist()) for i in range(len(dataset) - 1)]
    figures = main.text_statistics(chunks, text)
    assert not any(is_far(figures[name], figures[name]) for name, is_far in main.FAR_OFF.items())


def test_a_character_cut_at_an_end_is_no_invalid_one():
    text = "日本語".encode()
    assert main.text_statistics([text[1:-1]], text)["invalid UTF-8"] == 0
    assert main.text_statistics([b"ab\xffcd"], text)["invalid UTF-8"] == pytest.approx(1 / 5)
