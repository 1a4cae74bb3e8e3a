"""The model: each part against a naive reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, needs_gpu, random_model

import main

KINDS = [{"attention": "simplified_mla"}, {"attention": "mha"}, {"attention": "mla"}]
KINDS += [{"attention": "mla", "qk_rope_head_dim": 4}]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def kind(request):
    return request.param


def rms_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def naive_queries_keys_values(attention, x):
    """[B, L, H, d] each, and how many of the last numbers of queries and keys turn; from the papers' equations."""
    H, weights = attention.num_heads, {name: p.detach() for name, p in attention.named_parameters()}

    def linear(y, name):
        return torch.einsum("bli,oi->blo", y, weights[name + ".weight"])

    def heads(y):
        return y.view(*y.shape[:2], H, -1)

    if isinstance(attention, main.MultiHeadLatentAttention):
        compressed_kv = linear(x, "wkv_a")
        rope = attention.rope_dim
        latent = rms_norm(compressed_kv[..., :-rope]) * weights["kv_norm.weight"]
        shared = compressed_kv[..., None, -rope:].expand(-1, -1, H, -1)
        k = torch.cat([heads(linear(latent, "wk_b")), shared], dim=-1)
        return heads(linear(x, "wq")), k, heads(linear(latent, "wv_b")), rope
    latent = linear(x, "w_latent") if "w_latent.weight" in weights else x
    q, k, v = heads(linear(x, "wq")), heads(linear(latent, "wk")), heads(linear(latent, "wv"))
    return q, k, v, q.shape[-1]


def naive_attention(attention, x, theta, visible):
    """Attention from its definition: one head, one query, one complex rotation at a time."""
    q, k, v, rope = naive_queries_keys_values(attention, x)
    (B, L, H, d), half = q.shape, rope // 2
    frequencies = theta ** (-torch.arange(half).double() / half)
    angle = torch.polar(torch.ones(L, half).double(), torch.arange(L).double()[:, None] * frequencies)

    def rotate(y):
        turned = y[..., d - rope :].double()
        return torch.complex(turned[..., :half], turned[..., half:]) * angle[None, :, None]

    out = torch.zeros(B, L, H, v.shape[-1])
    turned_q, turned_k = rotate(q), rotate(k)
    for b in range(B):
        for h in range(H):
            for i in range(L):
                scores = (turned_q[b, i, h] * turned_k[b, :, h].conj()).real.sum(-1)
                scores = scores + (q[b, i, h, : d - rope] * k[b, :, h, : d - rope]).sum(-1)
                scores = (scores / math.sqrt(d)).masked_fill(~visible[b], -torch.inf)
                out[b, i, h] = (scores.softmax(-1).float()[:, None] * v[b, :, h]).sum(0)
    return torch.einsum("ble,de->bld", out.reshape(B, L, -1), attention.wo.weight)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_a_naive_loop(kind, masked):
    config = main.CONFIG(**TINY, **kind)
    model = random_model(config)
    attention = model.layers[0].attention
    for parameter in attention.parameters():  # the norms' weights too
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 7, config.model_dim)
    visible = torch.ones(2, 7, dtype=torch.bool)
    if masked:
        visible[0, 5:] = visible[1, 0] = False
    parts = [((0, 7), [(0, 7)], visible[:, None, None] if masked else None)]
    ours = attention(x, main.Layout(model.rope[:7], parts, neighbours=None))
    torch.testing.assert_close(ours, naive_attention(attention, x, config.rope_theta, visible), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attention_depends_on_distances_only(kind):
    """The same vectors further on in the table: queries and keys turn alike."""
    model = random_model(main.CONFIG(**TINY, **kind))
    attention, x = model.layers[0].attention, torch.randn(2, 7, 32)
    parts = [((0, 7), [(0, 7)], None)]
    here, there = (attention(x, main.Layout(model.rope[start : start + 7], parts, None)) for start in (0, 40))
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)


def test_rope_scores_depend_on_the_distance_only():
    table = main.rope_table(64, 8, 10000.0)
    q, k = torch.randn(2, 1, 1, 1, 8)

    def score(i, j):
        return (main.apply_rope(q, table[i : i + 1]) * main.apply_rope(k, table[j : j + 1])).sum()

    for distance in (0, 1, 5, -7):
        scores = torch.stack([score(start + distance, start) for start in (7, 20, 50)])
        torch.testing.assert_close(scores, scores[:1].expand(3), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(score(10, 3), score(3, 10))  # direction matters


def test_rope_keeps_lengths_and_leaves_position_zero_alone():
    x = torch.randn(1, 2, 9, 8)
    rotated = main.apply_rope(x, main.rope_table(9, 8, 10000.0))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotated[:, :, 0], x[:, :, 0])


@torch.no_grad()
def test_the_norm_is_root_mean_square(model):
    x = torch.randn(3, 32)
    norm = model.norm
    expected = x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_mish_and_its_gradient_are_those_of_pytorch():
    x = torch.cat([torch.linspace(-30, 30, 601), torch.tensor([-1e4, 1e4])]).requires_grad_()
    ours, theirs = main.mish(x), torch.nn.functional.mish(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_mish_does_not_overflow_in_half_precision():
    x = torch.tensor([-60000.0, -20.0, 3.0, 6.0, 20.0, 60000.0])
    torch.testing.assert_close(main.mish(x.half()).float(), torch.nn.functional.mish(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_feed_forward_network_is_gated_by_mish(model):
    x = torch.randn(3, 32)
    ffn = model.layers[0].feed_forward
    gate = x @ ffn.w1.weight.T
    mish = gate * torch.tanh(torch.log1p(gate.exp()))
    torch.testing.assert_close(ffn(x), (mish * (x @ ffn.w3.weight.T)) @ ffn.w2.weight.T, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_position_sees_every_other(kind):
    model = random_model(main.CONFIG(**TINY, **kind))
    tokens = torch.randint(0, 256, (1, 9))
    before = model(tokens)
    for changed in (0, 4, 8):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 256
        assert ((model(other) - before).abs().amax(dim=-1) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("given_mask", [False, True])
def test_padding_changes_no_other_position(kind, given_mask):
    model = random_model(main.CONFIG(**TINY, **kind))
    tokens = torch.randint(0, 256, (2, 9))
    padded = F.pad(tokens, (0, 5), value=main.PAD)
    mask = padded != main.PAD if given_mask else None
    torch.testing.assert_close(model(padded, mask)[:, :9], model(tokens))


def test_the_output_has_the_256_bytes_and_no_special_id(config, model):
    logits = model(torch.tensor([[65, main.PAD, main.MASK, main.UNK]]))
    assert logits.shape == (1, 4, 256)
    assert logits.dtype == torch.float32


def test_a_sequence_beyond_the_rope_buffer_is_refused_by_name():
    config = main.CONFIG(**TINY, rope_max_length_buffer=20)
    model = main.MaskPredictor(config)
    assert model(torch.zeros(1, 20, dtype=torch.int64)).shape == (1, 20, 256)
    with pytest.raises(main.InputError, match="21 bytes exceeds rope_max_length_buffer=20"):
        model(torch.zeros(1, 21, dtype=torch.int64))


def test_dropout_acts_in_training_only(config):
    model = main.MaskPredictor(main.CONFIG(**TINY, dropout=0.5))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(0, 256, (1, 9))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("device, expected", [("cpu", 0.84e6), ("gpu", 10.8e6)])
def test_the_default_sizes_have_the_announced_parameters(device, expected):
    sizes = {f.name: f.metadata[device] for f in main.dataclasses.fields(main.CONFIG) if f.metadata}
    model = main.MaskPredictor(main.CONFIG(**sizes, device="cpu"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=0.02)


@torch.no_grad()
def test_the_convolution_equals_pytorch_s_own(config):
    convolution = main.DepthwiseConvolution(5, 32)
    torch.nn.init.normal_(convolution.weight)
    reference = torch.nn.Conv1d(32, 32, 5, padding=2, groups=32, bias=False)
    reference.weight.copy_(convolution.weight.T[:, None])
    x = torch.randn(3, 11, 32)
    neighbours = (torch.arange(11)[:, None] + torch.arange(-2, 3))[None]
    neighbours = neighbours.where((neighbours >= 0) & (neighbours < 11), 11)  # beyond the ends: nobody
    ours = convolution(x, main.Layout(rope=None, parts=[], neighbours=neighbours))
    torch.testing.assert_close(ours, x + reference(x.mT).mT)


@torch.no_grad()
def test_without_a_convolution_the_model_is_the_plain_transformer(config):
    plain = main.MaskPredictor(main.CONFIG(**TINY, conv_width=0))
    assert not any("convolution" in name for name, _ in plain.named_parameters())
    with_it = main.MaskPredictor(config)  # the convolutions start at zero
    with_it.load_state_dict(plain.state_dict(), strict=False)
    tokens = torch.randint(0, 256, (2, 9))
    assert torch.equal(plain(tokens), with_it(tokens))


@needs_gpu
def test_the_gpu_computes_what_the_cpu_computes(config, model):
    tokens = torch.randint(0, 259, (2, 16))
    torch.testing.assert_close(model.cuda()(tokens.cuda()).cpu(), model.cpu()(tokens), rtol=1e-3, atol=1e-3)
