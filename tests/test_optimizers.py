"""The optimizers: who moves what, and Muon against PyTorch's own and against the singular value decomposition."""

import pytest
import torch
from conftest import TINY

import main


@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_every_parameter_has_one_optimizer_and_decay_reaches_matrices_only(muon):
    config = main.CONFIG(**TINY, muon_learning_rate=muon)
    model = main.MaskPredictor(config)
    optimizers = main.build_optimizers(model, config)
    owners = {id(p): (o, g) for o in optimizers for g in o.param_groups for p in g["params"]}
    assert len(owners) == sum(len(g["params"]) for o in optimizers for g in o.param_groups)
    for name, parameter in model.named_parameters():
        optimizer, group = owners[id(parameter)]
        is_hidden_matrix = name.startswith("layers") and ".w" in name and "norm" not in name and "conv" not in name
        assert isinstance(optimizer, main.Muon if muon and is_hidden_matrix else torch.optim.AdamW), name
        if isinstance(optimizer, torch.optim.AdamW):
            is_matrix = parameter.ndim == 2 and "convolution" not in name
            assert group["weight_decay"] == (config.weight_decay if is_matrix else 0.0), name


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 20), (2, 20, 5)])
def test_orthogonalize_keeps_the_directions_and_levels_the_singular_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    result = main.orthogonalize(matrices)
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    levelled = u.mT @ result @ vt.mT
    diagonal = levelled.diagonal(dim1=1, dim2=2)
    strong = s > 0.01 * s.norm(dim=1, keepdim=True)
    assert ((diagonal > 0.72) & (diagonal < 1.28))[strong].all()
    torch.testing.assert_close(levelled, torch.diag_embed(diagonal), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(16, 16), (24, 16), (16, 24)])
def test_muon_with_its_authors_polynomial_takes_the_steps_of_torch_optim_muon(monkeypatch, shape):
    monkeypatch.setattr(main, "POLYNOMIALS", [(3.4445, -4.7750, 2.0315)] * 5)
    torch.manual_seed(0)
    ours, theirs = torch.nn.Parameter(torch.randn(shape)), None
    theirs = torch.nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    optimizers = [main.Muon([ours], lr=0.02, momentum=0.95), torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0)]
    for _ in range(4):
        gradient = torch.randn(shape)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    difference = (ours - theirs).norm() / (theirs - start).norm()
    assert difference < 0.02  # theirs computes in bfloat16


def test_the_polynomials_are_the_best_of_their_degree_for_what_the_one_before_leaves():
    """Each error 1 - p(x) swings between -e and e at four points, as only the best approximation does (Chebyshev)."""
    x = torch.linspace(0.01, 1, 100_001, dtype=torch.double)
    for a, b, c in main.POLYNOMIALS:
        x = torch.linspace(x.min(), x.max(), 100_001, dtype=torch.double)
        y = a * x + b * x**3 + c * x**5
        error = 1 - y
        turns = (error.diff().sign().diff().nonzero().flatten() + 1).tolist()
        extrema = error[[0, *turns, -1]]
        assert len(extrema) == 4
        torch.testing.assert_close(extrema, error.max() * torch.tensor([1.0, -1, 1, -1]).double(), rtol=1e-2, atol=0)
        x = y
    assert 0.72 < x.min() < x.max() < 1.28
