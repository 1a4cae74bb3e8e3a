"""The sampler: LLaDA's algorithm to the letter, and the user's bytes untouched."""

import dataclasses
import itertools
import random

import pytest
import torch
from conftest import TINY

import main


def llada_generate(model, prompt, length, steps, block_length):
    """LLaDA's published sampling at temperature 0 with low-confidence remasking, written from its description: each
    block gets steps / blocks steps, each step commits its share of the block's masks, the surest predictions first."""
    x = torch.full((1, len(prompt) + length), main.MASK)
    x[0, : len(prompt)] = torch.tensor(list(prompt), dtype=torch.int64)
    num_blocks = length // block_length
    steps_per_block = steps // num_blocks
    forward_passes = 0
    for block in range(num_blocks):
        start = len(prompt) + block * block_length
        masks = int((x[0, start : start + block_length] == main.MASK).sum())
        quota = [masks // steps_per_block + (1 if i < masks % steps_per_block else 0) for i in range(steps_per_block)]
        for count in quota:
            logits = model(x)[0]
            forward_passes += 1
            chosen = logits.argmax(-1)
            confidence = logits.double().softmax(-1)[torch.arange(len(chosen)), chosen]
            open_positions = [i for i in range(start, start + block_length) if x[0, i] == main.MASK]
            open_positions.sort(key=lambda i: -confidence[i].item())
            for i in open_positions[:count]:
                x[0, i] = chosen[i]
    return bytes(x[0].tolist()), forward_passes


def settings(**overrides):
    return main.CONFIG(**{**TINY, **overrides})


@torch.no_grad()
@pytest.mark.parametrize(
    "length, steps, block_length", [(12, 12, 12), (12, 5, 12), (12, 6, 4), (12, 12, 4), (12, 7, 6), (16, 8, 2)]
)
@pytest.mark.parametrize("prompt", [b"", b"To be, "])
def test_temperature_zero_makes_the_choices_of_llada(model, prompt, length, steps, block_length):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    expected, forward_passes = llada_generate(model, prompt, length, steps, block_length)
    calls.clear()
    config = settings(temperature=0.0, inference_steps=steps, block_length=block_length)
    text = main.run_conditional_diffusion_inference(model, prompt, length, config)
    assert text == expected.decode(errors="replace")
    assert len(calls) <= forward_passes


def collect_steps(model, prompt, length, config, **options):
    states = []
    main.run_conditional_diffusion_inference(
        model, prompt, length, config, on_step=lambda canvas: states.append(canvas.clone()), **options
    )
    return states


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("steps, expected", [(4, [3, 3, 2, 2]), (10, [1] * 10), (64, [1] * 10), (1, [10])])
def test_each_step_commits_its_share_the_remainder_first(model, remasking, steps, expected):
    config = settings(remasking=remasking, inference_steps=steps)
    masks = [10] + [int((s == main.MASK).sum()) for s in collect_steps(model, b"ab", 10, config)]
    assert [before - after for before, after in itertools.pairwise(masks)] == expected


def test_blocks_are_finished_from_left_to_right(model):
    config = settings(inference_steps=6, block_length=4)
    for state in collect_steps(model, b"ab", 12, config):
        masked = [bool((state[i : i + 4] == main.MASK).any()) for i in (2, 6, 10)]
        untouched = [bool((state[i : i + 4] == main.MASK).all()) for i in (2, 6, 10)]
        for left in range(2):
            assert not masked[left] or untouched[left + 1]


def test_a_block_length_that_does_not_divide_the_response_still_fills_it(model):
    states = collect_steps(model, b"", 11, settings(inference_steps=6, block_length=4))
    assert (states[-1] < 256).all()


def test_committed_bytes_never_change(model):
    states = collect_steps(model, b"abc", 12, settings(inference_steps=6))
    for before, after in itertools.pairwise(states):
        fixed = before != main.MASK
        assert torch.equal(before[fixed], after[fixed])


def test_prompt_and_suffix_stay_and_no_mask_is_left_for_any_options(model):
    rng = random.Random(0)
    for _ in range(60):
        prompt, suffix = rng.randbytes(rng.randrange(8)), rng.randbytes(rng.randrange(8))
        config = settings(
            temperature=rng.choice([0.0, 0.5, 1.0]),
            remasking=rng.choice(["low_confidence", "random"]),
            inference_steps=rng.randrange(1, 20),
            block_length=rng.choice([0, 1, 3, 50]),
        )
        length = rng.randrange(12)
        states = collect_steps(model, prompt, length, config, suffix=suffix)
        for state in states:
            assert bytes(state[: len(prompt)].tolist()) == prompt
            assert bytes(state[len(prompt) + length :].tolist()) == suffix
        if length:
            assert (states[-1] < 256).all()
            assert len(states[-1]) == len(prompt) + length + len(suffix)


def test_text_prompts_are_utf8_and_invalid_bytes_come_back_as_replacement(model):
    config = settings(temperature=0.0)
    text = main.run_conditional_diffusion_inference(model, "Käse é ", 5, config, suffix="ß")
    assert text.startswith("Käse é ")
    assert text.endswith("ß")
    raw = main.run_conditional_diffusion_inference(model, b"\xff\xfe", 0, config)
    assert raw == "\ufffd\ufffd"


def test_every_option_changes_the_result(model):
    base = settings(temperature=1.0, inference_steps=6)
    reference = main.run_conditional_diffusion_inference(model, b"", 12, base)
    changes = {"temperature": 0.0, "inference_steps": 2, "remasking": "random", "block_length": 3}
    for name, value in changes.items():
        changed = dataclasses.replace(base, **{name: value})
        assert main.run_conditional_diffusion_inference(model, b"", 12, changed) != reference, name


def test_a_seed_fixes_the_sample_whatever_the_global_generator(model):
    config = settings(temperature=1.0, remasking="random")
    samples = []
    for seed in (1, 1, 2):
        torch.rand(3)
        before = torch.get_rng_state()
        samples.append(main.run_conditional_diffusion_inference(model, b"x", 12, config, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
    assert samples[0] == samples[1] != samples[2]


def test_temperature_one_samples_the_model_distribution():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    generator = torch.Generator().manual_seed(0)
    draws = main.add_gumbel_noise(logits.expand(60_000, 3), 1.0, generator).argmax(-1).bincount(minlength=3) / 60_000
    assert (draws - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 0.008
    cold = main.add_gumbel_noise(logits.expand(60_000, 3), 0.5, generator).argmax(-1).bincount(minlength=3) / 60_000
    assert (cold - torch.tensor([0.25, 0.09, 0.04]) / 0.38).abs().max() < 0.008


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_of_the_model_is_restored(model, training):
    model.train(training)
    main.run_conditional_diffusion_inference(model, b"x", 4, settings())
    assert model.training is training


def test_a_text_beyond_the_buffer_is_refused_in_one_line_with_the_sizes(model):
    with pytest.raises(main.InputError, match=r"prompt \(5\).*response_length \(9000\).*rope_max_length_buffer=4096"):
        main.run_conditional_diffusion_inference(model, b"hello", 9000, settings())
    with pytest.raises(main.InputError, match="response_length=-1"):
        main.run_conditional_diffusion_inference(model, b"hello", -1, settings())
