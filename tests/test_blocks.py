"""Two streams by one rule, when each byte is written: from the autoregressive twin (n = 1) to LLaDA (n = 0)."""

import dataclasses
import itertools
import random
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, count_passes, fill, random_model, read_scalars, train_tiny

import main

KINDS = [("simplified_mla", 9), ("mla", 5), ("mha", 0)]
ORDERS = {
    "left to right": list(range(16)),
    "one hole": [0, 1, 2, 8, 9, 10, 11, 12, 13, 14, 15, 3, 4, 5, 6, 7],
    "holes cut anywhere": [1, 2, 5, 9, 10, 11, 14, 15, 0, 3, 4, 6, 7, 8, 12, 13],
    "any": [3, 14, 0, 9, 2, 12, 7, 1, 15, 4, 11, 6, 10, 5, 13, 8],
}


def block_config(n, **overrides):
    return main.CONFIG(**{**TINY, "block_length": n, "top_p": 1.0, **overrides})


def block_model(n, **overrides):
    """A random model, convolutions included."""
    return random_model(block_config(n, **overrides))


def tokens(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def partly_masked(x0, seed=1):
    return x0.masked_fill(torch.rand(x0.shape, generator=torch.Generator().manual_seed(seed)) < 0.5, main.MASK)


@pytest.mark.parametrize("attention, conv_width", KINDS)
@pytest.mark.parametrize("order", ORDERS)
def test_nothing_leaks_in_any_order_through_attention_or_convolution(order, attention, conv_width):
    """By the gradient of each position's logits with respect to the embeddings of both streams."""
    n, L = 4, 16
    model, embedded = block_model(n, attention=attention, conv_width=conv_width), []

    def note(_module, _inputs, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    model.tok_embeddings.register_forward_hook(note)
    x0 = tokens(1, L)
    logits = model(partly_masked(x0), clean=x0, place=torch.tensor(ORDERS[order]))
    for turn in range(L):
        for stream in (0, L):
            total = logits[0, stream + turn].square().sum()
            (gradient,) = torch.autograd.grad(total, embedded[0], retain_graph=True)
            is_used = (gradient[0].abs().amax(dim=-1) > 0).tolist()
            if stream:
                assert is_used[:L] == [other // n < turn // n for other in range(L)], "clean bytes of earlier blocks"
                assert is_used[L:] == [other // n == turn // n for other in range(L)], "noisy bytes of the same block"
            else:
                assert is_used == [other <= turn for other in range(L)] + [False] * L, "clean bytes of no later turn"


def test_the_gradient_of_the_convolution_is_that_of_autograd(monkeypatch):
    model, x0, place = block_model(4).double(), tokens(2, 16), torch.tensor(ORDERS["holes cut anywhere"])
    noise, gradients = main.draw_noise(2, 16, torch.Generator().manual_seed(0), 4), []
    plain = type(
        "Plain", (), {"apply": staticmethod(lambda x, index, _: x[torch.arange(len(x))[:, None, None], index])}
    )
    for function in (main.Neighbours, plain):
        monkeypatch.setattr(main, "Neighbours", function)
        model.zero_grad()
        main.masked_diffusion_loss(model, x0, *noise, place, next_byte_weight=1.0).backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["simplified_mla", "mla", "mha"])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_two_streams_predict_each_block_as_if_it_stood_alone_after_its_clean_past(n, attention):
    model, x0 = block_model(n, attention=attention), tokens(3, 16)
    x0[0, 13:] = main.PAD
    xt = partly_masked(x0).where(x0 != main.PAD, x0)
    together = model(xt, clean=x0)[:, 16:]
    for start in range(0, 16, n):
        alone = model(torch.cat([x0[:, :start], xt[:, start : start + n]], dim=1))[:, start:]
        is_byte = (x0 != main.PAD)[:, start : start + n]
        torch.testing.assert_close(together[:, start : start + n][is_byte], alone[is_byte], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("order", [None, "one hole", "holes cut anywhere"])
def test_the_next_byte_is_predicted_from_what_is_written_before_it_alone(n, order):
    model, x0 = block_model(n), tokens(3, 16)
    place = None if order is None else torch.tensor(ORDERS[order])
    logits = model.next_byte_logits(x0, place)
    for turn in range(16):
        others = torch.cat([x0[:, :turn], tokens(3, 16 - turn, seed=9)], dim=1)
        torch.testing.assert_close(
            model.next_byte_logits(others, place)[:, turn], logits[:, turn], rtol=1e-4, atol=1e-4
        )
    if n > 1:  # in training it is the clean stream's, except where the order jumps
        clean = model(partly_masked(x0), clean=x0, place=place)[:, :15]
        is_next = torch.ones(15, dtype=torch.bool) if place is None else place.diff() == 1
        torch.testing.assert_close(clean[:, is_next], logits[:, 1:][:, is_next], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("n", [0, 2, 4])
def test_from_left_to_right_is_the_order_that_needs_no_saying(n):
    model, x0 = block_model(n), tokens(3, 16)
    noise = main.draw_noise(3, 16, torch.Generator().manual_seed(0), n)
    losses = [main.masked_diffusion_loss(model, x0, *noise, p, 1.0) for p in (None, torch.arange(16))]
    assert losses[0] == losses[1]
    if n:
        assert torch.equal(model.next_byte_logits(x0), model.next_byte_logits(x0, torch.arange(16)))


@torch.no_grad()
def test_one_block_over_all_is_the_model_of_whole_texts_to_the_bit():
    llada, x0 = block_model(0), tokens(3, 16)
    xt = partly_masked(x0)
    assert torch.equal(llada(xt, clean=x0), llada(xt))
    t, noise = main.draw_noise(3, 16, torch.Generator().manual_seed(0))
    expected = main.masked_diffusion_loss(llada, x0, t, noise)
    assert main.masked_diffusion_loss(llada, x0, t, noise, None, 1.0) == expected, "there is no next byte"
    byte, masks = block_model(0, max_length=1), torch.full((3, 1), main.MASK)
    of_one = F.cross_entropy(byte(masks)[:, 0], x0[:, 0])
    torch.testing.assert_close(main.masked_diffusion_loss(byte, x0[:, :1]), of_one)


def test_one_block_over_all_has_one_name_only():
    with pytest.raises(main.InputError, match="block_length=16 is not possible: .* below it, or 0"):
        main.MaskPredictor(block_config(16))
    with pytest.raises(main.InputError, match="^block_length=3 is not possible: it must be a divisor of max_length=16"):
        main.MaskPredictor(block_config(3))


@torch.no_grad()
@pytest.mark.parametrize("n", [2, 3, 6])
def test_the_loss_is_the_sum_over_blocks_of_the_enumeration_of_all_masks(n):
    model, x0 = block_model(n, max_length=12), tokens(1, 6)
    expected = 0.0
    for start in range(0, 6, n):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(range(start, start + n), k))
            for masked in map(list, subsets):
                xt = x0[:, : start + n].clone()
                xt[0, masked] = main.MASK
                nats = F.cross_entropy(model(xt)[0, masked], x0[0, masked])
                expected += nats.item() / len(subsets) / n * n / 6  # mean over k, n bytes of the text's 6
    rows, generator = 6000, torch.Generator().manual_seed(0)
    losses = [
        main.masked_diffusion_loss(model, x0.expand(rows, -1), *main.draw_noise(rows, 6, generator, n)).item()
        for _ in range(5)
    ]
    error = torch.tensor(losses).std().item() / 5**0.5
    assert error < 0.004 * expected
    assert sum(losses) / 5 == pytest.approx(expected, abs=5 * error)


@torch.no_grad()
@pytest.mark.parametrize("order", ["left to right", "holes cut anywhere"])
def test_the_loss_of_training_is_the_masked_part_and_the_weighted_next_byte(order):
    model, x0, place = block_model(4), tokens(3, 16), torch.tensor(ORDERS[order])
    x0[1, 12:] = main.PAD
    noise = main.draw_noise(3, 16, torch.Generator().manual_seed(0), 4)
    masked, both = (main.masked_diffusion_loss(model, x0, *noise, place, weight) for weight in (0.0, 2.0))
    written, expected = x0[:, place], []
    logits = model.next_byte_logits(written, place, written != main.PAD)
    for row, nats in zip(written, main.cross_entropy(logits, written, written != main.PAD), strict=True):
        counted = [t for t in range(1, 16) if place[t] == place[t - 1] + 1 and row[t] != main.PAD]
        expected.append(nats[counted].mean())
    torch.testing.assert_close(both - masked, 2 * sum(expected) / 3, rtol=1e-4, atol=1e-5)


class OnlyThreeBytes(torch.nn.Module):
    """An output layer that knows no more than the bytes 0, 1 and 2."""

    def __init__(self, output):
        super().__init__()
        self.inner = output

    def forward(self, hidden):
        logits = self.inner(hidden)
        return logits.masked_fill(torch.arange(256) > 2, -torch.inf)


def model_of_three_bytes(n):
    model = block_model(n, max_length=8)
    model.output = OnlyThreeBytes(model.output)
    return model


ALL_TEXTS = torch.tensor(list(itertools.product(range(3), repeat=5)))


@pytest.mark.parametrize("n", [0, 2, 4])
@pytest.mark.parametrize("hole", [[], [1, 2], [2, 4], [0], [0, 1, 3, 4]])
def test_the_probabilities_of_all_texts_sum_to_one_and_a_hole_is_a_part_of_them(n, hole):
    """In every order: what is given first, then the hole."""
    model, is_hole = model_of_three_bytes(n), torch.zeros(5, dtype=torch.bool)
    is_hole[hole] = True
    if n:
        place = torch.cat([torch.arange(5)[~is_hole], torch.arange(5)[is_hole]])
        with torch.no_grad():
            logits = model.next_byte_logits(ALL_TEXTS[:, place], place).log_softmax(-1)
        of_bytes = logits.gather(-1, ALL_TEXTS[:, place, None])[..., 0].double()
        assert of_bytes.sum(dim=1).exp().sum().item() == pytest.approx(1, abs=1e-5)
        bits = main.exact_likelihood(model, ALL_TEXTS, is_hole=is_hole)
        torch.testing.assert_close(bits.sum(dim=1), -of_bytes[:, 5 - len(hole) :].sum(dim=1) / torch.tensor(2.0).log())
    bits = main.exact_likelihood(model, ALL_TEXTS, is_hole=is_hole)
    assert (bits[:, ~is_hole] == 0).all()
    given = ALL_TEXTS.masked_fill(is_hole, 0)
    for one in given.unique(dim=0):  # the fillings of each given text
        probabilities = (-bits[(given == one).all(dim=1)].sum(dim=1) * torch.tensor(2.0).log()).exp()
        assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("own, n", [(2, 4), (4, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize("given", [[None] * 5, [1, None, None, 2, None]])
def test_texts_are_written_as_often_as_their_exact_likelihood_says(own, n, given):
    """Chi-square against the enumeration of all texts; drafts change nothing."""
    is_hole = torch.tensor([byte is None for byte in given])
    if own == 1 and not is_hole.all():
        pytest.skip("the twin fills no holes")
    model, number = model_of_three_bytes(own), 6000
    prompt = [main.MASK if byte is None else byte for byte in given]
    config = block_config(n, max_length=8)
    texts = ALL_TEXTS[
        [all(b is None or b == t for b, t in zip(given, text, strict=True)) for text in ALL_TEXTS.tolist()]
    ]
    expected = number * 2 ** -main.exact_likelihood(model, texts, is_hole=is_hole).sum(dim=1)
    counts = {tuple(text): 0 for text in texts.tolist()}
    for text in fill(model, [prompt] * number, config):
        counts[tuple(text)] += 1
    observed = torch.tensor(list(counts.values())).double()
    common = expected > 5
    chi_square = ((observed - expected)[common] ** 2 / expected[common]).sum().item()
    degrees = int(common.sum()) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5
    assert abs(observed[~common].sum() - expected[~common].sum()) < 5 * expected[~common].sum() ** 0.5 + 5


@torch.no_grad()
def write_byte_by_byte(model, text, config, seed):
    """One byte per pass, no cache, no drafts: what is written, by definition."""
    x = torch.tensor([text])
    masks = [place for place, token in enumerate(text) if token == main.MASK]
    order = [place for place, token in enumerate(text) if token != main.MASK] + masks
    noise, place = main.gumbel_noise([seed], len(text), torch.device("cpu"))[0], torch.tensor(order)
    for turn in range(len(text) - len(masks), len(text)):
        logits = model.next_byte_logits(x[:, place].where(x[:, place] != main.MASK, 0), place)[0, turn]
        x[0, order[turn]] = main.draw_bytes(logits, config.temperature, config.top_p, noise[order[turn]])
    return bytes(x[0].tolist())


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (0.7, 0.8), (1.0, 1.0)])
@pytest.mark.parametrize("own", [1, 2, 4])
def test_the_text_is_that_of_one_byte_per_pass_at_any_length_of_drafts(own, temperature, top_p):
    """Prompts, holes of any length, several of them, empty beginnings; drafts that are right and wrong."""
    rng = random.Random(own)
    for seed in range(23):
        config = block_config(own, temperature=temperature, top_p=top_p, max_length=32)
        model, text = random_model(config, seed % 5), list(rng.randbytes(rng.randrange(6)))
        for number in range(rng.randrange(1, 4)):
            if own > 1 or not number:
                text += [main.MASK] * rng.randrange(1, 9) + list(rng.randbytes(rng.randrange(4))) * (own > 1)
        expected = write_byte_by_byte(model, text, config, seed)
        for n in (1, 2, 4, 8) if own > 1 else [1]:
            assert fill(model, [text], dataclasses.replace(config, block_length=n), seed) == [expected]


@pytest.mark.parametrize("length", [40, 70])
def test_drafts_change_nothing_in_many_texts_at_once_with_an_end_or_beyond_the_context(length):
    """For 200 seeds, of a model whose drafts are sometimes right."""
    config = block_config(4, max_length=32, temperature=0.7)
    model, results = random_model(config), {}
    model.output = OnlyThreeBytes(model.output)
    prompts = [b"abc", b"xyz"] * 100
    for n in (1, 2, 4, 8):
        passes, settings = [], dataclasses.replace(config, block_length=n)
        write = lambda until, settings=settings, passes=passes: main.run_conditional_diffusion_inference(
            model, prompts[: 20000 // length], length, settings, until=until, on_step=lambda _: passes.append(1)
        )
        whole = write(None)
        until = whole[0][len(whole[0]) // 2 :][:6]
        results[n] = whole, write(until), len(passes)
        assert results[n][:2] == results[1][:2], n
    assert results[4][2] < results[1][2], "drafts save passes"
    assert main.run_conditional_diffusion_inference(model, "xyz", length, config, seed=1) == results[4][0][1]


@torch.no_grad()
@pytest.mark.parametrize("attention, conv_width", KINDS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_likelihood_of_a_text_is_the_product_of_what_cached_passes_give(n, attention, conv_width):
    config = block_config(n, attention=attention, conv_width=conv_width)
    model, x0, seen = random_model(config), tokens(1, 16), []
    model.output.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    bits, cache, place = main.exact_likelihood(model, x0), main.ReadCache(torch.arange(1), 32, 32), torch.arange(32)
    for turn in range(1, 16):
        cache.see(torch.tensor([[turn - 1]]))
        nothing, firsts = x0[:, :0], torch.zeros(1, 0, dtype=torch.int64)
        hidden = model.hidden(nothing, x0[:, turn - 1 : turn], 1, place, firsts, cache=cache)
        cost = -model.output(hidden)[0, 0].log_softmax(-1)[x0[0, turn]] * main.BITS_PER_NAT
        assert cost.item() == pytest.approx(bits[0, turn].item(), rel=1e-4, abs=1e-4)


@torch.no_grad()
def test_blocks_of_one_byte_give_the_chain_rule():
    twin, x0 = block_model(1), tokens(3, 16)
    chain = main.exact_likelihood(twin, x0).mean().item()
    assert main.masked_diffusion_loss(twin, x0).item() * main.BITS_PER_NAT == pytest.approx(chain, rel=1e-5)


def test_every_block_has_its_own_number_of_masks_and_all_numbers_are_equally_frequent():
    x0 = tokens(10, 16)
    for seed in range(20):
        t, noise = main.draw_noise(10, 16, torch.Generator().manual_seed(seed), 4)
        assert t.shape == (10, 4)
        assert (t.flatten().sort().values * 40).floor().tolist() == list(range(40))
        _, is_masked = main.mask_bytes(x0, t, noise)
        counts = is_masked.unflatten(1, (4, 4)).sum(dim=-1)
        assert counts.flatten().bincount(minlength=5).tolist() == [0, 10, 10, 10, 10]
    firsts = [main.draw_noise(10, 16, torch.Generator().manual_seed(s), 4)[0][:, 0].mean() for s in range(200)]
    assert torch.stack(firsts).mean().item() == pytest.approx(0.5, abs=0.02), "no block has fewer than the others"


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_the_beginning_is_the_same_however_much_is_asked_for(n):
    config = block_config(n)
    model, prompt = random_model(config), [*b"abcde"]
    written = [fill(model, [prompt + [main.MASK] * length], config)[0] for length in (9, 32, 96)]
    assert written[1] == written[2][: 5 + 32]
    assert written[0] == written[1][: 5 + 9]


def test_a_pass_costs_the_same_however_much_is_written_and_still_to_be_written():
    config = block_config(4)
    sizes = count_passes(random_model(config), [65] * 6 + [main.MASK] * 26, config)
    assert sizes[0] == 6 + 4, "the prompt and a block of drafts"
    assert set(sizes[1:]) == {4 + 4 * 4}, "the last byte and three drafts, and new drafts after each of them"
    twin = block_config(1)
    assert count_passes(random_model(twin), [65] * 6 + [main.MASK] * 26, twin) == [6] + [1] * 25


@pytest.mark.parametrize("n", [1, 2, 4])
def test_prompts_of_the_same_length_are_continued_as_one_by_one(n):
    config = block_config(n)
    model = random_model(config)
    texts = [[*prompt, *[main.MASK] * 20] for prompt in (b"abcde", b"to be", bytes(5))]
    alone = [fill(model, [text], config, seed=5 + i)[0] for i, text in enumerate(texts)]
    assert fill(model, texts, config, seed=5) == alone


def test_what_a_model_was_not_trained_for_is_refused_in_one_line():
    config = block_config(4, hole_share=0.0)
    write = lambda model, config, **options: main.run_conditional_diffusion_inference(model, "a", 4, config, **options)
    with pytest.raises(main.InputError, match="^block_length=4 is not possible: .* to fill holes"):
        write(random_model(config), config, suffix="b")
    with pytest.raises(main.InputError, match="^block_length=0 is not possible: it must be 1 to 64"):
        write(random_model(config), block_config(0))
    with pytest.raises(main.InputError, match="^block_length=4 is not possible: it must be 1, as in the training"):
        write(block_model(1), config)
    for name, value in (("remasking", "random"), ("inference_steps", 2)):
        with pytest.raises(main.InputError, match=f"^{name}=.* trained with block_length=0"):
            write(random_model(config), dataclasses.replace(config, **{name: value}))


@pytest.mark.parametrize("share, with_holes", [(0.0, []), (0.25, [3, 7, 11]), (0.5, [1, 3, 5, 7, 9, 11])])
def test_orders_with_holes_have_their_share_of_the_steps(share, with_holes):
    config, plain = block_config(4, hole_share=share, max_length=64), torch.arange(64)
    orders = [main.draw_order(config, step) for step in range(12)]
    assert [step for step, o in enumerate(orders) if o is not None and not torch.equal(o, plain)] == with_holes
    for n in (0, 1):
        assert main.draw_order(block_config(n, hole_share=1.0), 1) is None


def test_an_order_writes_what_is_given_first_and_then_the_holes_of_many_lengths_that_begin_anywhere():
    config, lengths, starts = block_config(4, hole_share=1.0, max_length=256), [], []
    for step in range(300):
        place = main.draw_order(config, step)
        assert sorted(place.tolist()) == list(range(256))
        assert torch.equal(place, main.draw_order(config, step))
        back = (place.diff() < 0).nonzero().flatten().tolist()
        assert len(back) <= 1, "what is given from left to right, then the holes from left to right"
        holes = place[back[0] + 1 :].tolist() if back else []
        runs = [list(group) for _, group in itertools.groupby(enumerate(holes), lambda pair: pair[1] - pair[0])]
        lengths += [len(run) for run in runs]
        starts += [run[0][1] % 4 for run in runs]
    assert min(lengths) == 1
    assert max(lengths) > 60
    assert torch.tensor(starts).bincount(minlength=4).min() > len(starts) / 5


def test_training_in_blocks_draws_the_masks_of_the_bound():
    config = block_config(4, batch_size=10)
    t, noise, *_ = main.draw_step(main.TrainingState(config))
    counts = main.mask_bytes(tokens(10, 16), t, noise)[1].view(-1, 4).sum(dim=1).bincount(minlength=5)
    assert counts.tolist() == [0, 10, 10, 10, 10]


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("order", ["left_to_right", "most_confident_first"])
def test_the_likelihood_in_an_order_within_the_blocks_is_that_of_a_naive_loop(n, order):
    model, x0 = block_model(n), tokens(1, 16)
    bits = main.exact_likelihood(model, x0, order)
    xt, expected = x0.clone(), torch.zeros(16, dtype=torch.double)
    xt[:] = main.MASK
    with torch.no_grad():
        for start in range(0, 16, n):
            for _ in range(n):
                probs = model(xt)[0].softmax(-1)
                open_ = [i for i in range(start, start + n) if xt[0, i] == main.MASK]
                best = open_[0] if order == "left_to_right" else max(open_, key=lambda i: probs[i].max().item())
                expected[best] = -probs[best, x0[0, best]].log2()
                xt[0, best] = x0[0, best]
    torch.testing.assert_close(bits[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_with_float32(dtype):
    model, x0 = block_model(4), tokens(4, 16)
    noise = main.draw_noise(4, 16, torch.Generator().manual_seed(0), 4)
    reference = main.masked_diffusion_loss(model, x0, *noise, None, 1.0)
    with torch.autocast("cpu", dtype):
        half = main.masked_diffusion_loss(model, x0, *noise, None, 1.0)
    half.backward()
    assert half.item() == pytest.approx(reference.item(), rel=0.02)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_run_in_blocks_trains_alike_in_any_split_and_reports_bound_and_next_byte(text_folder):
    flags = ["--max_steps=6", "--log_every=1", "--num_samples=0", "--block_length=4"]
    one, console = train_tiny(text_folder, *flags, "--batch_size=8")
    many, _ = train_tiny(text_folder, *flags, "--batch_size=2", "--gradient_accumulation_steps=4")
    assert "final bound" in console
    assert re.search("final bound .*, next byte .* bits per byte", console)
    for tag in ("train/loss", "train/gradient_norm", "val/bits_per_byte", "val/next_byte_bits_per_byte"):
        assert read_scalars(one)[tag] == pytest.approx(read_scalars(many)[tag], rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 4])
def test_beyond_the_context_each_byte_sees_the_last_max_length_bytes(n):
    """By a changed byte for one layer."""
    config = block_config(n, num_layers=1, conv_width=0)
    model, text = random_model(config), tokens(1, 40)
    changed = text.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 256
    is_moved = (model.next_byte_logits(text) != model.next_byte_logits(changed)).any(dim=-1)[0]
    assert is_moved.nonzero().flatten().tolist() == list(range(6, 5 + 16 + 1))


@pytest.mark.parametrize("n", [0, 1, 4])
def test_text_ends_with_the_first_until_in_it_each_row_by_itself(n):
    config = block_config(n, max_length=64, top_p=1.0)
    model, prompts, seen = random_model(config), ["abc", "bcd", "eee"], []
    whole = main.run_conditional_diffusion_inference(model, prompts, 200, config)
    until = next(c for c in "abcdefghijklmnop" if all(c in text[len(p) :] for text, p in zip(whole, prompts)))
    options = {"until": until, "on_step": lambda x: seen.append(x.clone())}
    cut = main.run_conditional_diffusion_inference(model, prompts, 200, config, **options)
    for prompt, text, all_of_it in zip(prompts, cut, whole, strict=True):
        assert text.endswith(until)
        assert text.count(until) == 1 + prompt.count(until)
        assert all_of_it.startswith(text) or n == 0
    assert not (seen[-1] == main.MASK).any()
    assert [bytes(t for t in row if t != main.PAD).decode(errors="replace") for row in seen[-1].tolist()] == cut


def test_a_model_of_blocks_stops_computing_where_all_rows_have_ended():
    config = block_config(4)
    model = random_model(config)
    (text,) = fill(model, [[main.MASK] * 200], config)
    passes = []
    main.run_conditional_diffusion_inference(
        model, "", 200, config, until=text[6:7], on_step=lambda x: passes.append(1)
    )
    assert len(passes) <= 2 + 8


def test_a_text_without_the_end_that_was_asked_for_has_its_full_length(model, config):
    written = main.run_conditional_diffusion_inference(model, "a", 30, config, until="never in it")
    assert written == main.run_conditional_diffusion_inference(model, "a", 30, config)


@pytest.mark.parametrize("n", [0, 4])
def test_given_bytes_stay_wherever_they_stand(n):
    config, rng = block_config(n), random.Random(0)
    model = random_model(config)
    for seed in range(20):
        text = [rng.choice([main.MASK, rng.randrange(256)]) for _ in range(rng.randrange(1, 20))]
        is_kept = lambda x, text=text: all(t in (main.MASK, b) for b, t in zip(x[0].tolist(), text, strict=True))
        (filled,) = fill(model, [text], config, seed, on_step=lambda x, kept=is_kept: kept(x) or pytest.fail("changed"))
        assert len(filled) == len(text)
