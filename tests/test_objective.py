"""The objective: equal to its definition by enumeration, unbiased, and indifferent to how a batch is split."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_model, read_scalars, train_tiny

import main


def sequence_losses(model, x0, t, scores):
    """Mean cross-entropy, in nats, of the masked bytes of each sequence."""
    _, nats, is_masked = main.predict_masked(model, x0, t, scores)
    return main.mean_of_masked(nats, is_masked, 1)[:, 0]


def by_enumeration(model, x0):
    """The bound of one sequence from its definition: every mask of every size, k weighted uniformly. Nats per byte."""
    length = len(x0)
    total = 0.0
    for k in range(1, length + 1):
        subsets = list(itertools.combinations(range(length), k))
        for masked in subsets:
            masked = list(masked)
            xt = x0.clone()
            xt[masked] = main.MASK
            log_probs = model(xt[None])[0].log_softmax(dim=-1)
            cross_entropies = -log_probs[masked, x0[masked]]
            total += cross_entropies.mean().item() / len(subsets) / length
    return total


@torch.no_grad()
def test_the_loss_equals_the_enumeration_of_all_masks(config, model):
    x0 = torch.tensor([104, 101, 108, 108, 111])
    exact = by_enumeration(model, x0)
    rows = 20000
    generator = torch.Generator().manual_seed(1)
    losses = sequence_losses(model, x0.expand(rows, -1), *main.draw_noise(rows, len(x0), generator))
    error = losses.std().item() / math.sqrt(rows)
    assert abs(losses.mean().item() - exact) < 4 * error
    assert error < 0.01 * exact  # sharp enough to tell a wrong weighting from the right one


@torch.no_grad()
def test_the_loss_equals_the_published_integral_over_t(config, model):
    """E_t[(1/t) sum of masked cross-entropies] / L with independent masks, as LLaDA eq. 3 states it."""
    x0 = torch.tensor([104, 101, 108, 108])
    exact = by_enumeration(model, x0)
    integral = 0.0
    for masked in itertools.product([False, True], repeat=4):
        masked = torch.tensor(masked)
        if not masked.any():
            continue
        log_probs = model(x0.masked_fill(masked, main.MASK)[None])[0].log_softmax(dim=-1)
        total = -log_probs[masked, x0[masked]].sum().item()
        k = int(masked.sum())
        grid = (torch.arange(200_000, dtype=torch.double) + 0.5) / 200_000
        weight = (grid ** (k - 1) * (1 - grid) ** (4 - k)).mean().item()  # integral of t^k (1-t)^(L-k) / t
        integral += weight * total / 4
    assert integral == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("length", [1, 2, 7, 128])
def test_uniform_logits_cost_exactly_eight_bits_on_every_draw(length):
    def uniform(tokens, **_):
        return torch.zeros(*tokens.shape, 256)

    for seed in range(20):
        torch.manual_seed(seed)
        x0 = torch.randint(0, 256, (3, length))
        bits = main.masked_diffusion_loss(uniform, x0).item() * main.BITS_PER_NAT
        assert bits == pytest.approx(8.0, abs=1e-5)


def test_a_fresh_model_starts_at_eight_bits(config):
    x0 = torch.randint(0, 256, (4, config.max_length))
    loss = main.masked_diffusion_loss(main.MaskPredictor(config), x0)
    assert loss.item() * main.BITS_PER_NAT == pytest.approx(8.0, abs=1e-5)


def test_every_number_of_masks_occurs_equally_often_and_masks_are_exact():
    length, rows = 10, 50
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 256, (rows, length))
    for _ in range(20):
        xt, is_masked = main.mask_bytes(x0, *main.draw_noise(rows, length, generator))
        counts = is_masked.sum(dim=1).bincount(minlength=length + 1)[1:]
        assert (counts - rows / length).abs().max() <= 1  # stratified: 5 each, up to one at the edges of a stratum
        assert torch.equal(xt == main.MASK, is_masked)
        assert torch.equal(xt[~is_masked], x0[~is_masked])


def test_every_position_is_masked_equally_often():
    rows, length = 40_000, 8
    generator = torch.Generator().manual_seed(0)
    _, is_masked = main.mask_bytes(
        torch.zeros(rows, length, dtype=torch.int64), *main.draw_noise(rows, length, generator)
    )
    fraction = is_masked.float().mean(dim=0)
    assert (fraction - (length + 1) / 2 / length).abs().max() < 0.01


def test_noise_rounded_up_to_one_masks_no_more_than_everything():
    x0 = torch.zeros(2, 5, dtype=torch.int64)
    _, is_masked = main.mask_bytes(x0, torch.tensor([0.0, 1.0]), torch.rand(2, 5))
    assert is_masked.sum(dim=1).tolist() == [1, 5]


def test_padding_is_never_masked_and_never_predicted(config, model):
    x0 = torch.randint(0, 256, (6, 12))
    padded = F.pad(x0, (0, 4), value=main.PAD)
    t, scores = main.draw_noise(6, 16, torch.Generator().manual_seed(3))
    xt, is_masked = main.mask_bytes(padded, t, scores)
    assert not is_masked[:, 12:].any()
    assert (xt[:, 12:] == main.PAD).all()
    short = sequence_losses(model, x0, t, scores[:, :12])
    long = sequence_losses(model, padded, t, scores)
    torch.testing.assert_close(long, short)


def test_a_sequence_of_nothing_but_padding_costs_nothing_and_leaves_gradients_finite(config):
    model = random_model(config)
    x0 = torch.full((2, 8), main.PAD)
    x0[0, :3] = 65
    t, scores = main.draw_noise(2, 8, torch.Generator().manual_seed(0))
    losses = sequence_losses(model, x0, t, scores)
    assert losses[1] == 0
    losses.mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_loss_averages_within_each_sequence_before_it_averages_over_them(config, model):
    x0 = torch.randint(0, 256, (2, 10))
    t, scores = torch.tensor([0.0, 0.95]), torch.rand(2, 10)  # 1 mask and 10 masks
    together = main.masked_diffusion_loss(model, x0, t, scores)
    alone = [main.masked_diffusion_loss(model, x0[i : i + 1], t[i : i + 1], scores[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(together, sum(alone) / 2)


def test_the_gradient_agrees_with_finite_differences(config):
    model = random_model(config).double()
    x0 = torch.randint(0, 256, (3, 9))
    t, scores = main.draw_noise(3, 9, torch.Generator().manual_seed(0))
    weight = model.layers[0].attention.wk.weight
    main.masked_diffusion_loss(model, x0, t, scores).backward()
    step = 1e-3  # the logits are float32, which bounds the precision of the difference
    for index in [(0, 0), (5, 3), (31, 15)]:
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                weight[index] += sign * step
                values.append(main.masked_diffusion_loss(model, x0, t, scores).item())
                weight[index] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(weight.grad[index].item(), rel=0.02, abs=2e-4)


@pytest.mark.parametrize("splits", [2, 4])
def test_accumulating_micro_batches_trains_like_one_batch(text_folder, splits):
    flags = ["--max_steps=5", "--log_every=1", "--num_samples=0"]
    one, _ = train_tiny(text_folder, *flags, "--batch_size=8")
    many, _ = train_tiny(text_folder, *flags, f"--batch_size={8 // splits}", f"--gradient_accumulation_steps={splits}")
    for tag in ("train/loss", "train/gradient_norm", "val/bits_per_byte"):
        assert read_scalars(one)[tag] == pytest.approx(read_scalars(many)[tag], rel=1e-4)


def test_the_mask_ratios_of_a_step_are_stratified_anew_over_the_whole_batch():
    """One in each of as many equal parts as there are rows of all micro-batches, at another offset each step."""
    config = main.CONFIG(**{**TINY, "batch_size": 4}, gradient_accumulation_steps=5, mask_ratio_std=0.0)
    offsets, state = set(), main.TrainingState(config)
    for state.step in range(50):
        t, scores, *_ = main.draw_step(state)
        assert scores.shape == (20, 16)
        t = t[:, 0].sort().values
        assert (t * 20).floor().tolist() == list(range(20))
        offsets.add((t[0] * 20).item())
    assert len(offsets) == 50
    assert max(offsets) - min(offsets) > 0.8


def test_seven_of_eight_mask_ratios_of_training_are_of_a_bell_and_one_is_uniform():
    t = (torch.arange(80_000) + 0.5) / 80_000
    uniform, bell = main.training_mask_ratios(t, 0.15, 0.45).split([10_000, 70_000])
    assert torch.allclose(uniform.histc(20, 0, 1), torch.full((20,), 500.0), atol=1)
    assert bell.mean().item() == pytest.approx(0.45, abs=1e-3)
    assert bell.std().item() == pytest.approx(0.15, rel=0.01)
    extreme = main.training_mask_ratios(torch.tensor([0.0, 0.124999, 0.125, 0.5, 0.999999]), 0.5, 0.45)
    assert ((extreme >= 0) & (extreme < 1)).all()
    assert torch.equal(main.training_mask_ratios(t, 0.0, 0.45), t)


def test_the_loss_by_default_is_the_bound_whatever_training_draws(config, model):
    """mask_ratio_std belongs to the training loop: masked_diffusion_loss and estimate_nelbo never see it."""
    x0 = torch.randint(0, 256, (64, 16))
    torch.manual_seed(0)
    counts = []
    model.register_forward_pre_hook(lambda _, given: counts.append((given[0] == main.MASK).sum(dim=1)))
    main.masked_diffusion_loss(model, x0)
    assert sorted(counts[0].tolist()) == sorted(list(range(1, 17)) * 4)
