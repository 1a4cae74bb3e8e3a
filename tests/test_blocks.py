"""Block diffusion: one dial from the autoregressive twin (n = 1) to LLaDA (n = L)."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, count_passes, fill, random_model, read_scalars, train_tiny

import main


def block_config(n, **overrides):
    return main.CONFIG(**{**TINY, "block_length": n, "top_p": 1.0, **overrides})


def block_model(n, **overrides):
    """A random model, convolutions included."""
    return random_model(block_config(n, **overrides))


def tokens(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def partly_masked(x0, seed=1):
    return x0.masked_fill(torch.rand(x0.shape, generator=torch.Generator().manual_seed(seed)) < 0.5, main.MASK)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["simplified_mla", "mla", "mha"])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_two_streams_predict_each_block_as_if_it_stood_alone_after_its_clean_past(n, attention):
    model, x0 = block_model(n, attention=attention), tokens(3, 16)
    x0[0, 13:] = main.PAD
    xt = partly_masked(x0).where(x0 != main.PAD, x0)
    together = model(xt, clean=x0)
    for start in range(0, 16, n):
        alone = model(torch.cat([x0[:, :start], xt[:, start : start + n]], dim=1))[:, start:]
        is_byte = (x0 != main.PAD)[:, start : start + n]
        torch.testing.assert_close(together[:, start : start + n][is_byte], alone[is_byte], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_block_over_all_is_the_model_of_whole_texts_to_the_bit():
    model, x0 = block_model(4), tokens(3, 16)
    xt = partly_masked(x0)
    whole = dataclasses.replace(block_config(0))
    llada = main.MaskPredictor(whole).eval()
    llada.load_state_dict(model.state_dict())
    for logits in (model(xt, block_length=0), model(xt, clean=x0, block_length=16)):
        assert torch.equal(logits, llada(xt))
    t, noise = main.draw_noise(3, 16, torch.Generator().manual_seed(0))
    assert main.masked_diffusion_loss(model, x0, t, noise) == main.masked_diffusion_loss(llada, x0, t, noise)


def test_one_block_over_all_has_one_name_only():
    with pytest.raises(main.InputError, match="block_length=16 is not possible: .* below it, or 0"):
        main.MaskPredictor(block_config(16))


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
def test_blocks_of_one_byte_give_the_chain_rule():
    """By the autoregressive twin's single stream, and by two streams of a model made for it."""
    twin, x0 = block_model(1), tokens(3, 16)
    chain = main.exact_likelihood(twin, x0).mean().item()
    assert main.masked_diffusion_loss(twin, x0).item() * main.BITS_PER_NAT == pytest.approx(chain, rel=1e-5)
    model = block_model(2)
    predicted = model(torch.full_like(x0, main.MASK)[:, :2], block_length=2)  # both bytes, from nothing
    t = torch.full((3, 8), 0.99)  # all bytes of each block masked
    _, nats, is_masked = main.predict_masked(model, x0, t, torch.rand(3, 16))
    assert is_masked.all()
    expected = F.cross_entropy(predicted.flatten(0, 1), x0[:, :2].flatten(), reduction="none").view(3, 2)
    torch.testing.assert_close(nats[:, :2], expected)


@pytest.mark.parametrize("attention, conv_width", [("simplified_mla", 5), ("mla", 9), ("mha", 0)])
def test_nothing_leaks_through_attention_or_convolution(attention, conv_width):
    """By the gradient of each noisy byte's logits with respect to the embeddings of both streams."""
    n, L, C = 4, 16, 12
    model, embedded = block_model(n, attention=attention, conv_width=conv_width), []

    def note(_module, _inputs, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    model.tok_embeddings.register_forward_hook(note)
    x0 = tokens(1, L)
    logits = model(partly_masked(x0), clean=x0)
    for i in range(L):
        (gradient,) = torch.autograd.grad(logits[0, i].square().sum(), embedded[0], retain_graph=True)
        is_used = gradient[0].abs().amax(dim=-1) > 0
        assert is_used[:C].tolist() == [j // n < i // n for j in range(C)], "clean bytes: of earlier blocks alone"
        assert is_used[C:].tolist() == [j // n == i // n for j in range(L)], "noisy bytes: of the same block alone"


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


@torch.no_grad()
@pytest.mark.parametrize("attention, conv_width", [("simplified_mla", 9), ("mla", 5), ("mha", 0)])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_a_cached_pass_equals_a_full_one(n, attention, conv_width):
    config = block_config(n, attention=attention, conv_width=conv_width)
    model, text = random_model(config), tokens(2, 16)
    cache, previous = main.PositionCache(16), 0
    for start in range(8, 16, n):
        stop = start + n
        for number in range(2):
            text[:, start:stop] = tokens(2, n, seed=number + start) if number else main.MASK
            cache.span = slice(start if number else previous, stop)
            cached, full = model.hidden(text[:, :stop], cache=cache)[:, -n:], model.hidden(text[:, :stop])[:, start:]
            torch.testing.assert_close(cached, full, rtol=1e-4, atol=1e-5)
        previous = start


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("remasking", main.STRATEGIES)
def test_the_beginning_is_the_same_however_much_is_asked_for(n, remasking):
    config = block_config(n, remasking=remasking)
    model, prompt = random_model(config), [*b"abcde"]
    written = [fill(model, [prompt + [main.MASK] * length], config)[0] for length in (9, 32, 96)]
    assert written[1] == written[2][: 5 + 32]
    assert written[0] == written[1][: 5 + 9]


def test_a_pass_costs_the_same_however_much_is_written_and_still_to_be_written():
    config = block_config(4)
    sizes = count_passes(random_model(config), [65] * 6 + [main.MASK] * 26, config)
    first, rest = sizes[0], sizes[1:]
    assert first == 8, "the prompt and the block that it ends in"
    assert rest == [4, *[8, 4, 4, 4] * 6]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_prompts_of_the_same_length_are_continued_as_one_by_one(n):
    config = block_config(n)
    model = random_model(config)
    texts = [[*prompt, *[main.MASK] * 20] for prompt in (b"abcde", b"to be", bytes(5))]
    alone = [fill(model, [text], config, seed=5 + i)[0] for i, text in enumerate(texts)]
    assert fill(model, texts, config, seed=5) == alone


def test_a_mixed_model_fills_holes_in_view_of_both_sides_and_goes_on_in_blocks():
    config = block_config(4, temperature=0.0)
    model = random_model(config)
    hole, tail = [*b"ab", main.MASK, main.MASK, *b"cdef"], [main.MASK] * 8
    (filled,) = fill(model, [hole + tail], config)
    (of_whole_text,) = fill(model, [hole], config)
    assert filled[:8] == of_whole_text
    (of_llada,) = fill(model, [hole], dataclasses.replace(config, block_length=0))
    assert of_whole_text == of_llada
    (tail_alone,) = fill(model, [[*filled[:8], *tail]], config)
    assert filled == tail_alone


def test_what_a_model_was_not_trained_for_is_refused_in_one_line():
    config = block_config(4, whole_text_share=0.0)
    model = random_model(config)
    with pytest.raises(main.InputError, match="^block_length=4 is not possible: .* to fill holes"):
        main.run_conditional_diffusion_inference(model, "a", 4, config, suffix="b")
    with pytest.raises(main.InputError, match="^block_length=8 is not possible: it must be 4"):
        main.run_conditional_diffusion_inference(model, "a", 4, dataclasses.replace(config, block_length=8))
    with pytest.raises(main.InputError, match="^block_length=3 is not possible: it must be a divisor of max_length=16"):
        main.MaskPredictor(block_config(3))


@pytest.mark.parametrize("share, wholes", [(0.0, []), (0.25, [3, 7, 11]), (0.5, [1, 3, 5, 7, 9, 11]), (1.0, range(12))])
def test_whole_texts_have_their_share_of_the_steps(share, wholes):
    config = block_config(4, whole_text_share=share)
    assert [step for step in range(12) if main.block_length_of_step(config, step) == 0] == list(wholes)
    twin = block_config(1, whole_text_share=share)
    assert {main.block_length_of_step(twin, step) for step in range(12)} == {1}


def test_a_tilt_masks_the_later_bytes_of_a_block_more_in_training_and_in_no_bound():
    config = block_config(4, mask_tilt=1.0, block_mask_power=1.0, whole_text_share=0.0, batch_size=2000)
    state, x0 = main.TrainingState(config), tokens(2000, 16)
    _, is_masked = main.mask_bytes(x0, *main.training_noise(state, 4))
    shares = is_masked.view(-1, 4).float().mean(dim=0)
    assert (shares.diff() > 0.1).all(), shares
    assert is_masked.view(-1, 4).sum(dim=1).bincount(minlength=5)[1:].tolist() == [2000] * 4
    config.block_mask_power = 0.5  # k = 1 + floor(4 sqrt(t)): four masks for t above 9/16
    counts = main.mask_bytes(x0, *main.training_noise(state, 4))[1].view(-1, 4).sum(dim=1).bincount(minlength=5)[1:]
    assert counts.tolist() == pytest.approx([500, 1500, 2500, 3500], abs=1)
    config.block_mask_power = 1.0
    config.mask_tilt = 0.0
    _, is_masked = main.mask_bytes(x0, *main.training_noise(state, 4))
    torch.testing.assert_close(is_masked.view(-1, 4).float().mean(dim=0), torch.full((4,), 0.625), rtol=0, atol=0.02)
    model, counts = block_model(4), []
    model.register_forward_pre_hook(lambda _, given: counts.append((given[0] == main.MASK).sum(dim=0)))
    main.masked_diffusion_loss(model, x0)
    assert (counts[0] / 2000 - 0.625).abs().max() < 0.05


@pytest.mark.parametrize("n", [1, 2, 8])
def test_the_likelihood_in_an_order_within_the_blocks_is_that_of_a_naive_loop(n):
    model, x0 = block_model(n), tokens(1, 16)
    bits = main.exact_likelihood(model, x0, "most_confident_first")
    xt, expected = x0.clone(), torch.zeros(16, dtype=torch.double)
    xt[:] = main.MASK
    with torch.no_grad():
        for start in range(0, 16, n):
            for _ in range(n):
                probs = model(xt)[0].softmax(-1)
                open_ = [i for i in range(start, start + n) if xt[0, i] == main.MASK]
                best = max(open_, key=lambda i: probs[i].max().item())
                expected[best] = -probs[best, x0[0, best]].log2()
                xt[0, best] = x0[0, best]
    torch.testing.assert_close(bits[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_with_float32(dtype):
    model, x0 = block_model(4), tokens(4, 16)
    noise = main.draw_noise(4, 16, torch.Generator().manual_seed(0), 4)
    reference = main.masked_diffusion_loss(model, x0, *noise)
    with torch.autocast("cpu", dtype):
        half = main.masked_diffusion_loss(model, x0, *noise)
    half.backward()
    assert half.item() == pytest.approx(reference.item(), rel=0.02)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("block_length", [2, 8])
def test_a_run_in_blocks_trains_alike_in_any_split_and_reports_a_bound(text_folder, block_length):
    flags = ["--max_steps=6", "--log_every=1", "--num_samples=0", f"--block_length={block_length}"]
    one, console = train_tiny(text_folder, *flags, "--batch_size=8", "--whole_text_share=0.5")
    many, _ = train_tiny(
        text_folder, *flags, "--batch_size=2", "--gradient_accumulation_steps=4", "--whole_text_share=0.5"
    )
    assert "final bound" in console
    for tag in ("train/loss", "train/gradient_norm", "val/bits_per_byte"):
        assert read_scalars(one)[tag] == pytest.approx(read_scalars(many)[tag], rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 4])
def test_beyond_the_context_each_block_sees_the_last_max_length_bytes(n):
    """By the gradient for one layer, and the cached sampler's passes against full ones."""
    config = block_config(n, num_layers=1, conv_width=0)
    model, text = random_model(config), tokens(1, 40)
    changed = text.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 256
    is_moved = (model(text) != model(changed)).any(dim=-1)[0]
    last = (
        5 + 16 if n == 1 else 19
    )  # of the last block whose window of 16 bytes, its own included, begins at 5 or before
    assert is_moved.nonzero().flatten().tolist()[-1] == last
    deep, cache, previous = block_model(n), main.PositionCache(40), 0
    for start in range(0, 40, n):
        cache.span = slice(previous, start + n)
        cached = deep.hidden(text[:, : start + n], cache=cache)[:, -n:]
        torch.testing.assert_close(cached, deep.hidden(text[:, : start + n])[:, start:], rtol=1e-4, atol=1e-5)
        previous = start


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


def test_the_automatic_order_is_from_the_left_in_blocks_and_by_confidence_elsewhere():
    config = block_config(4)
    model, hole = random_model(config), [*b"ab", *[main.MASK] * 6, *b"cd"]

    def written(text, remasking):
        return fill(model, [text], dataclasses.replace(config, remasking=remasking))

    for text, same, other in (
        ([main.MASK] * 40, "left_to_right", "low_confidence"),
        (hole, "low_confidence", "left_to_right"),
    ):
        assert written(text, "auto") == written(text, same) != written(text, other)
