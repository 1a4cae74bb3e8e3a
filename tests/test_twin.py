"""The autoregressive twin: the same network, causal, through the same program."""

import dataclasses

import pytest
import torch
from conftest import TINY, TINY_FLAGS, fill, random_model, train_tiny

import main


@pytest.fixture
def twin_config():
    return main.CONFIG(**{**TINY, "block_length": 1})


@pytest.fixture
def twin(twin_config):
    return random_model(twin_config)


@pytest.mark.parametrize("attention", ["simplified_mla", "mla", "mha"])
def test_a_prediction_depends_on_all_earlier_bytes_and_on_no_other(attention):
    """By the gradient of each position's logits with respect to the embeddings of all positions."""
    model = random_model(main.CONFIG(**{**TINY, "block_length": 1}, attention=attention))
    embedded = []

    def note(_module, _inputs, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    model.tok_embeddings.register_forward_hook(note)
    logits = model(torch.randint(0, 256, (1, 9)))
    for i in range(9):
        (gradient,) = torch.autograd.grad(logits[0, i].square().sum(), embedded[0], retain_graph=True)
        is_used = gradient[0].abs().amax(dim=-1) > 0
        assert is_used.tolist() == [j < i for j in range(9)] + [
            i == 0
        ]  # the last one is the MASK before the first byte
    tokens = torch.randint(0, 256, (1, 9))
    other = tokens.clone()
    other[0, 4] = (other[0, 4] + 1) % 256
    assert [bool((a != b).any()) for a, b in zip(model(tokens)[0], model(other)[0], strict=True)] == [False] * 5 + [
        True
    ] * 4


@torch.no_grad()
def test_the_loss_the_estimate_and_the_chain_rule_are_one_number(twin, text_folder):
    dataset = main.ByteLevelTextDataset(text_folder / "train.txt", 16, stop=1600)
    x0 = torch.stack(list(dataset))
    bits, _ = main.estimate_nelbo(twin, dataset)
    assert bits == pytest.approx(main.exact_likelihood(twin, x0).mean().item(), rel=1e-5)
    assert bits == pytest.approx(main.masked_diffusion_loss(twin, x0).item() * main.BITS_PER_NAT, rel=1e-5)
    assert main.estimate_nelbo(twin, dataset, seed=1)[0] == pytest.approx(bits)  # nothing is drawn


@torch.no_grad()
def test_it_samples_from_left_to_right(twin, twin_config):
    prompts = [b"to be or ", b"not to be", b"123456789"]
    texts = [[*prompt, *[main.MASK] * 11] for prompt in prompts]
    exact = dataclasses.replace(twin_config, top_p=1.0)
    states = []
    together = fill(twin, texts, exact, seed=3, on_step=lambda x: states.append((x == main.MASK).sum(dim=1).tolist()))
    assert states == [[11 - i] * 3 for i in range(12)]
    assert together == [fill(twin, [text], exact, seed=3 + i)[0] for i, text in enumerate(texts)]


def test_what_makes_no_sense_from_left_to_right_is_refused(twin, twin_config):
    for prompt, suffix in (("a", "b"), ([main.MASK, 65], "")):
        with pytest.raises(main.InputError, match="fill holes"):
            main.run_conditional_diffusion_inference(twin, prompt, 4, twin_config, suffix)


def test_it_trains_resumes_evaluates_and_generates_by_one_flag(text_folder, monkeypatch, capsys):
    monkeypatch.chdir(text_folder)
    flags = [*TINY_FLAGS, "--block_length=1", "--num_samples=1", "--max_steps=200", "--batch_size=16"]
    _, console = train_tiny(text_folder, *flags)
    assert "exact likelihood" in console
    assert "bound" not in console
    assert main.main(["--resume", "auto", "--max_steps=210"]) == 0
    capsys.readouterr()
    assert main.main(["evaluate", "--chunks=2"]) == 0
    table = capsys.readouterr().out
    assert "NELBO" not in table
    assert "holes" not in table
    assert main.main(["generate", "--prompt", "the quick b", "--response_length=5", "--temperature=0"]) == 0
    assert capsys.readouterr().out == "the quick brown \n"
