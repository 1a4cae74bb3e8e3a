"""The sampler: LLaDA's algorithm to the letter, and the user's bytes untouched."""

import dataclasses
import io
import itertools
import math
import random
import re

import pytest
import torch
from conftest import TINY, KnownJoint, count_passes, fill, random_model
from llada import llada_generate
from torch.utils._python_dispatch import TorchDispatchMode

import main


def settings(**overrides):
    plain = {"block_length": 0, "temperature": 0.7, "top_p": 1.0, "remasking": "low_confidence"}
    return main.CONFIG(**{**TINY, **plain, **overrides})


@torch.no_grad()
@pytest.mark.parametrize(
    "length, steps, block_length", [(12, 12, 12), (12, 5, 12), (12, 6, 4), (12, 12, 4), (12, 8, 6), (16, 8, 2)]
)
@pytest.mark.parametrize("prompt", [b"", b"To be, "])
def test_temperature_zero_makes_the_choices_of_llada(model, prompt, length, steps, block_length):
    calls = []
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    expected, forward_passes = llada_generate(model, prompt, length, steps, block_length)
    calls.clear()
    config = settings(temperature=0.0, inference_steps=steps, block_length=block_length)
    text = main.run_conditional_diffusion_inference(model, prompt, length, config)
    assert text == expected.decode(errors="replace")
    assert len(calls) == forward_passes


def collect_steps(model, prompt, length, config, **options):
    states = []
    main.run_conditional_diffusion_inference(
        model, prompt, length, config, on_step=lambda x: states.append(x[0].clone()), **options
    )
    return states


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize(
    "steps, expected", [(4, [3, 3, 2, 2]), (10, [1] * 10), (64, [1] * 10), (1, [10]), (0, [1] * 10)]
)
def test_each_pass_unmasks_an_equal_part_the_remainder_first(model, remasking, steps, expected):
    config = settings(remasking=remasking, inference_steps=steps)
    masks = [int((s == main.MASK).sum()) for s in collect_steps(model, b"ab", 10, config)]
    assert masks[0] == 10
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


def test_unmasked_bytes_never_change(model):
    states = collect_steps(model, b"abc", 12, settings(inference_steps=6))
    for before, after in itertools.pairwise(states):
        fixed = before != main.MASK
        assert torch.equal(before[fixed], after[fixed])


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
    changes = {"temperature": 0.0, "inference_steps": 2, "remasking": "random", "block_length": 3, "top_p": 0.5}
    for name, value in changes.items():
        changed = dataclasses.replace(base, **{name: value})
        assert main.run_conditional_diffusion_inference(model, b"", 12, changed) != reference, name


def test_more_steps_or_longer_blocks_than_bytes_are_no_mistake(model):
    reference = collect_steps(model, b"", 12, settings())
    for overrides in ({"inference_steps": 10**9}, {"block_length": 10**9}):
        states = collect_steps(model, b"", 12, settings(**overrides))
        assert all(torch.equal(a, b) for a, b in zip(states, reference, strict=True))


def test_a_seed_fixes_the_sample_whatever_the_global_generator(model):
    config = settings(temperature=1.0, remasking="random")
    samples = []
    for seed in (1, 1, 2):
        torch.rand(3)
        before = torch.get_rng_state()
        samples.append(main.run_conditional_diffusion_inference(model, b"x", 12, config, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize(
    "temperature, top_p, expected",
    [
        (1.0, 1.0, [0.3, 0.5, 0.2]),
        (0.5, 1.0, [0.09 / 0.38, 0.25 / 0.38, 0.04 / 0.38]),
        (1.0, 0.8, [0.375, 0.625, 0.0]),
        (1.0, 0.5, [0.0, 1.0, 0.0]),
        (1.0, 1e-300, [0.0, 1.0, 0.0]),
        (0.0, 1.0, [0.0, 1.0, 0.0]),
    ],
)
def test_bytes_are_drawn_from_the_distribution_that_temperature_and_top_p_ask_for(temperature, top_p, expected):
    number = 60_000
    logits = torch.full((number, 256), -torch.inf)
    logits[:, 7:10] = torch.tensor([0.3, 0.5, 0.2]).log()
    gumbel = main.draw_gumbel((number, 256), torch.Generator().manual_seed(0))
    drawn = main.draw_bytes(logits, temperature, top_p, gumbel).bincount(minlength=256) / number
    assert drawn.sum() == drawn[7:10].sum()
    torch.testing.assert_close(drawn[7:10].tolist(), expected, rtol=0, atol=0.008)


def test_the_smallest_and_the_largest_noise_draw_possible_bytes(monkeypatch):
    logits = torch.full((2, 256), -torch.inf)
    logits[:, [3, 200]] = 0.0
    uniform = torch.full((2, 256), 0.5, dtype=torch.float64)
    uniform[0, 3], uniform[1, 3] = 0.0, 1 - 2**-53
    monkeypatch.setattr(torch, "rand", lambda *_, **__: uniform)
    gumbel = main.draw_gumbel((2, 256), torch.Generator())
    assert main.draw_bytes(logits, 1.0, 1.0, gumbel).tolist() == [200, 3]


def test_predictions_that_are_not_numbers_still_end(model):
    with torch.no_grad():
        model.output.weight.fill_(torch.nan)
    for strategy in main.STRATEGIES:
        fill(model, [[65, *[main.MASK] * 5]], settings(remasking=strategy))


def test_prompts_may_be_text_bytes_or_numbers_alone_or_in_a_batch(model):
    config = settings()
    alone = main.run_conditional_diffusion_inference(model, "abc", 3, config)
    assert alone.startswith("abc")
    numbers = torch.tensor([97, 98, 99])
    for prompt in (b"abc", [97, 98, 99], (97, 98, 99), numbers, numbers.numpy(), list(numbers.numpy())):
        assert main.run_conditional_diffusion_inference(model, prompt, 3, config) == alone
    assert main.run_conditional_diffusion_inference(model, ["abc"], 3, config) == [alone]
    assert main.run_conditional_diffusion_inference(model, [97, 98, 99, *[main.MASK] * 3], 0, config) == alone
    assert main.run_conditional_diffusion_inference(model, [], 3, config) == []
    assert main.run_conditional_diffusion_inference(model, [b"abc", [97, main.MASK]], 0, config)[0] == "abc"
    for wrong in ([300], [main.PAD], [-1]):
        with pytest.raises(main.InputError, match="made of bytes"):
            main.run_conditional_diffusion_inference(model, wrong, 3, config)


def test_a_word_of_two_bytes_is_shown_as_it_is_and_masks_as_dots():
    assert main.show_masks([*"ñ".encode(), main.MASK, 27, main.PAD]) == "ñ·\ufffd"
    assert main.printable("全角　空白, espace\u00a0fine\r\n".encode()) == "全角　空白, espace\u00a0fine\n"


@pytest.mark.parametrize(
    "masks, block_length, asked",
    [(122, 16, 4), (64, 16, 10), (64, 16, 64), (64, 16, 1), (100, 7, 33), ("holes", 16, 16), ("holes", 16, 5)],
)
def test_as_many_passes_are_made_as_were_asked_for(model, masks, block_length, asked):
    text = [65] + [main.MASK] * masks if masks != "holes" else [*[main.MASK] * 8, *[65] * 100, *[main.MASK] * 8]
    assert len(count_passes(model, text, settings(inference_steps=asked, block_length=block_length))) == asked


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_of_the_model_is_restored(model, training):
    model.train(training)
    main.run_conditional_diffusion_inference(model, b"x", 4, settings())
    assert model.training is training


def test_a_text_beyond_the_buffer_is_refused_in_one_line_with_the_sizes(model):
    with pytest.raises(
        main.InputError, match="prompt, response_length and suffix, 9005 bytes, exceed rope_max_length_buffer=4096"
    ):
        main.run_conditional_diffusion_inference(model, b"hello", 9000, settings())
    with pytest.raises(main.InputError, match="response_length=-1"):
        main.run_conditional_diffusion_inference(model, b"hello", -1, settings())


def naive_sampler(model, text, config, seed=0):
    """One text, no batch, no cache, plain Python numbers: what the options mean, written from the papers."""
    x = list(text)
    holes = [i for i, token in enumerate(x) if token == main.MASK]
    span = holes[-1] + 1 - holes[0]
    block_length = config.block_length or span
    if config.inference_steps:
        block_length = max(block_length, math.ceil(span / config.inference_steps))
    blocks = [
        [i for i in holes if start <= i < start + block_length]
        for start in range(holes[0], holes[-1] + 1, block_length)
    ]
    widths = [min(block_length, holes[-1] + 1 - start) for start in range(holes[0], holes[-1] + 1, block_length)]
    starts = list(range(holes[0], holes[-1] + 1, block_length))
    plan = [[start, width, masks, 1] for start, width, masks in zip(starts, widths, blocks, strict=True) if masks]
    wanted = min(config.inference_steps or len(holes), len(holes))
    while sum(block[3] for block in plan) < wanted:
        max(plan, key=lambda block: len(block[2]) / block[3])[3] += 1
    for start, width, block_holes, passes in plan:
        generator = torch.Generator().manual_seed(main.derive_seed(seed, start))
        step = 0
        while any(x[i] == main.MASK for i in block_holes):
            logits = model(torch.tensor([x]))[0]
            noise = torch.rand(width, 257, generator=generator, dtype=torch.float64)
            masked = [i for i in block_holes if x[i] == main.MASK]
            scores, chosen = {}, {}
            for i in masked:
                probs = logits[i].softmax(-1)
                *for_byte, for_order = noise[i - start].tolist()
                chosen[i] = naive_draw(logits[i], config.temperature, config.top_p, for_byte)
                scores[i] = {"random": for_order, "low_confidence": probs[chosen[i]].item()}[config.remasking]
            ranking = sorted(masked, key=lambda i: -scores[i])
            per_pass, extra = divmod(
                len(block_holes), passes
            )  # LLaDA's: equal parts, the remainder on the first passes
            for i in ranking[: per_pass + (step < extra)]:
                x[i] = chosen[i]
            step += 1
    return bytes(x)


def naive_draw(logits, temperature, top_p, uniforms):
    if not temperature:
        return logits.argmax().item()
    heated = (logits / temperature).softmax(-1).tolist()
    allowed, total = [], 0.0
    for byte in sorted(range(256), key=lambda byte: -heated[byte]):
        if total >= top_p and top_p < 1:
            break
        allowed.append(byte)
        total += heated[byte]
    return max(allowed, key=lambda byte: math.log(heated[byte]) - math.log(-math.log(uniforms[byte])))


def random_settings(rng, strategy=None, **overrides):
    """Any combination of sampling options."""
    return settings(
        remasking=strategy or rng.choice(main.STRATEGIES),
        temperature=rng.choice([0.0, 0.5, 1.0]),
        top_p=rng.choice([1.0, 0.6]),
        inference_steps=rng.randrange(20),
        block_length=rng.choice([0, 1, 3, 50]),
        **overrides,
    )


def random_text(rng):
    """Up to four stretches of given bytes with holes between them."""
    text = [65] * rng.randrange(1, 3) + [main.MASK]
    for _ in range(rng.randrange(1, 4)):
        text += [*rng.randbytes(rng.randrange(5)), *[main.MASK] * rng.randrange(5)]
    return text


@torch.no_grad()
@pytest.mark.parametrize("strategy", main.STRATEGIES)
def test_every_strategy_with_every_option_does_what_a_naive_loop_does(model, strategy):
    rng = random.Random(strategy)
    for number in range(25):
        config, text = random_settings(rng, strategy), random_text(rng)
        (filled,) = fill(model, [text], config, seed=number)
        assert filled == naive_sampler(model, text, config, seed=number), config


def test_given_bytes_stay_in_any_combination_of_options_and_all_masks_go(model):
    rng = random.Random(1)
    for _ in range(50):
        config = random_settings(rng)
        text = random_text(rng)
        texts = [[t if t == main.MASK else rng.randrange(256) for t in text] for _ in range(rng.randrange(1, 4))]

        def check(x, texts=texts):
            for row, text in zip(x.tolist(), texts, strict=True):
                assert all(token == wanted for token, wanted in zip(row, text, strict=True) if wanted != main.MASK)

        for filled, text in zip(fill(model, texts, config, on_step=check), texts, strict=True):
            assert all(token == wanted for token, wanted in zip(filled, text, strict=True) if wanted != main.MASK)


def test_prompts_of_any_lengths_come_out_as_one_by_one(model):
    rng = random.Random(2)
    prompts = ["to be or ", "", "a", "not to be", "b"]
    for _ in range(25):
        config = random_settings(rng)
        write = lambda prompt, seed, config=config: main.run_conditional_diffusion_inference(
            model, prompt, 40, config, seed=seed
        )
        assert write(prompts, 5) == [write(prompt, 5 + i) for i, prompt in enumerate(prompts)], config


def test_prompts_of_the_same_shape_are_one_batch(model):
    prompts = [[*b"ab", main.MASK, *b"cd"], [*b"xy", main.MASK, *b"zz"], [*b"xy", main.MASK]]
    shapes = []
    main.run_conditional_diffusion_inference(model, prompts, 0, settings(), on_step=lambda x: shapes.append(x.shape))
    assert shapes == [(2, 5)] * 2 + [(1, 3)] * 2
    assert fill(model, prompts[:2], settings(), seed=5)[1] == fill(model, prompts[1:2], settings(), seed=6)[0]


class CountWaits(TorchDispatchMode):
    """Counts the operations for which one waits for a GPU: a number read off it, a shape that depends on it."""

    waits = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        indices = arguments[1] if operation is torch.ops.aten.index.Tensor else []
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        names = "_local_scalar_dense", "nonzero", "is_nonzero", "item"
        waiting = [getattr(torch.ops.aten, name).default for name in names]
        self.waits += by_mask or operation in waiting
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize("strategy", main.STRATEGIES)
def test_a_pass_never_waits_for_the_device(model, strategy):
    config, seen = settings(remasking=strategy, inference_steps=12, top_p=0.9), []
    with CountWaits() as counter:
        fill(model, [[65, *[main.MASK] * 12]], config, on_step=lambda _: seen.append(counter.waits))
    assert [after - before for before, after in itertools.pairwise(seen[1:])] == [0] * 11


@pytest.mark.parametrize(
    "options",
    [
        {"remasking": "random"},
        {"block_length": 1},
    ],
)
def test_one_byte_per_pass_samples_the_joint_distribution_of_a_perfect_model(options):
    """Chi-square test, 7 degrees of freedom: 24.3 is the 0.1 % point."""
    model, number = KnownJoint(), 4000
    config = settings(temperature=1.0, inference_steps=3, **options)
    filled = fill(model, [[main.MASK] * 3] * number, config)
    counts = torch.zeros(2, 2, 2)
    for a, b, c in filled:
        counts[a, b, c] += 1
    expected = number * model.joint
    assert ((counts - expected) ** 2 / expected).sum() < 24.3
    config.inference_steps = 1  # all at once: the bytes do not know of each other, the same test must fail
    counts.zero_()
    for a, b, c in fill(model, [[main.MASK] * 3] * number, config):
        counts[a, b, c] += 1
    assert ((counts - expected) ** 2 / expected).sum() > 24.3 or config.block_length == 1


@pytest.mark.parametrize(
    "options, named",
    [
        ({"top_p": 1.5}, "top_p"),
        ({"inference_steps": -1}, "inference_steps"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line_with_their_name(options, named):
    with pytest.raises(main.InputError, match=f"^{named}=") as refused:
        settings(**options)
    assert "\n" not in str(refused.value)


def test_a_negative_seed_is_refused(model):
    with pytest.raises(main.InputError, match="seed=-1"):
        main.run_conditional_diffusion_inference(model, b"a", 4, settings(), seed=-1)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_watching_redraws_in_place_and_no_byte_controls_the_terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    main.watch(torch.tensor([[65, main.MASK, 27, main.PAD]]))
    main.watch(torch.tensor([[65, 66, 27, main.PAD]]))
    assert screen.getvalue().split("\x1b[H\x1b[2J")[1:] == ["A·\ufffd\n", "AB\ufffd\n"]


def test_watching_shows_nothing_where_the_output_is_no_terminal(capsys):
    main.watch(torch.tensor([[65, main.MASK]]))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("n", [0, 4])
def test_a_hole_of_unknown_length_gets_the_filling_that_makes_the_text_most_probable(n):
    config = main.CONFIG(**{**TINY, "block_length": n, "temperature": 0.9})
    model, texts = random_model(config), [text + [main.MASK] * 3 for text in main.holes_to_masks("ab{1-5}c{2}d")]
    fillings, bits = main.best_fillings(model, texts, config, 1, candidates=3), {}
    for text in texts:
        for filled in fill(model, [text[:-3]] * 3, config):
            x, total = torch.tensor([list(filled)]), 0.0
            with torch.no_grad():
                for i in range(2, len(filled)):  # byte by byte, from the first hole on
                    if n:
                        logits = model.next_byte_logits(x[:, : i + 1])[0, i]
                    else:
                        logits = model(torch.where(torch.arange(len(filled)) < i, x, main.MASK))[0, i]
                    total -= logits.log_softmax(-1)[x[0, i]].item()
            bits[(*filled, *[main.MASK] * 3)] = total
    assert [tuple(filling) for filling in fillings] == sorted(bits, key=bits.get)
    assert len({len(filling) for filling in fillings}) == 5


def test_a_hole_of_unknown_length_becomes_one_text_for_each_length():
    assert main.holes_to_masks("a{2-3}b{1}") == [[97, *[main.MASK] * k, 98, main.MASK] for k in (2, 3)]
    assert main.holes_to_masks("{{2-12}}") == [list(b"{2-12}")]
    for bad in ("{5-2}", "a{1-2}b{2-3}"):
        with pytest.raises(main.InputError, match=re.escape(bad[-5:])):
            main.holes_to_masks(bad)
