"""Train a masked diffusion language model on raw bytes and watch it learn: one file, to be read from top to bottom.

    python main.py                                        train on train.txt, validate on validation.txt
    tensorboard --logdir=runs                             watch the run
    python main.py --model_dim 256 --max_steps 5000       every field of CONFIG is a flag
    python main.py --resume auto                          go on with the newest run
    python main.py generate --watch                       sample from the newest run and see the text emerge
    python main.py evaluate                               how good the newest run is, in many figures
    python main.py profile                                how fast a training step is, and where its time goes
    torchrun --nproc_per_node=8 main.py                   train on eight GPUs, on eight times the batch

The idea: a text is read in two ways at once, with the same weights. The clean stream is causal, as in GPT, and predicts
the next byte. The noisy stream predicts blocks of n bytes, of which k are replaced by MASK, for every k from 1 to n, in
view of the clean text before them. In writing, blocks of MASKs draft what the clean stream then accepts: several bytes
per pass, and the same text. The order of writing is free: what is given first, then its holes; the i-th byte written
has the turn i and stands at place[i] of the text. One dial, block_length: 1 is the autoregressive model, the clean
stream alone; 0 is LLaDA, one noisy block over all.

Where: loss masked_diffusion_loss; who sees whom MaskPredictor.layout; draft and verify write_in_blocks; order of
writing draw_order; the loop train, one step of it train_step; saving save_checkpoint.

Shapes: B sequences, L bytes each, n block_length, D model_dim, H heads of d = D / H, R kv_latent_dim, 256 byte values;
P positions of an input, the first C of them clean, M noisy blocks, K clean bytes that may be seen, T turns of a text;
in the sampler N sequences, W positions of a block.

LLaDA   arXiv 2502.09992   the recipe: masked diffusion with a plain transformer, and its sampler
MDLM    arXiv 2406.07524   the same objective, derived as a continuous-time evidence bound
MD4     arXiv 2406.04329   the same objective, derived as a weighted integral of cross-entropies
BD3-LM  arXiv 2503.09573   block diffusion: the same within each block, given the clean ones before; the two streams
TiDAR   arXiv 2511.08923   one network drafts by diffusion and verifies autoregressively, in the same pass
FIM     arXiv 2207.14255   prefix, suffix, then middle: the order of writing of a text with a hole
"""

import argparse
import copy
import dataclasses
import errno
import functools
import gc
import json
import logging
import math
import mmap
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from contextlib import ExitStack, closing, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

PAD, MASK, UNK = 256, 257, 258  # input embedding only: the output has 256 rows. UNK is unused, all bytes are known
NUM_BYTES, NUM_TOKENS = 256, 259
BITS_PER_NAT = 1 / math.log(2)
BYTES_AT_ONCE = 2**16  # of a batch of the sampler: some 200 MB of random numbers, keys and values


class InputError(ValueError):
    """Something the user can put right. `main` prints it as one line and exits with code 2, without a traceback."""


class TrainingError(RuntimeError):
    """The command cannot go on. `main` prints it as one line and exits with code 1."""


# ######################################################################################################################
# PART 1: THE METHOD. What is special to masked diffusion, to be read in one go beside the LLaDA paper.
#         CONFIG, data, model, objective, sampler, training
# ######################################################################################################################


# === CONFIG: edit a default here, or give the flag of the same name ===================================================


def by_size(cpu, gpu):
    """A field with two defaults: one for training on a CPU, one for a GPU."""
    return dataclasses.field(default=None, metadata={"cpu": cpu, "gpu": gpu})


@dataclass
class CONFIG:
    """All settings of a run, checked on creation: an InputError names the field, its value and what it accepts."""

    # The two default sizes: 0.8 M parameters for some minutes of training on two cores, 10.8 M for a GPU
    model_dim: int = by_size(cpu=128, gpu=384)  # [D] width of the residual stream
    num_layers: int = by_size(cpu=4, gpu=6)  # transformer layers
    num_heads: int = by_size(cpu=2, gpu=6)  # [H] attention heads; model_dim / num_heads must be even for RoPE
    kv_latent_dim: int = by_size(cpu=64, gpu=256)  # [R] width of the latent of keys and values; mha has none
    ffn_dim: int = by_size(cpu=352, gpu=1024)  # hidden width of the feed-forward network, usually 8/3 of model_dim
    max_length: int = 256  # [L] bytes of context
    batch_size: int = by_size(cpu=4, gpu=64)  # [B] sequences per process and micro-batch
    learning_rate: float = by_size(cpu=3e-2, gpu=1e-2)  # AdamW's, at its peak after the warm-up
    max_steps: int = by_size(cpu=3600, gpu=50000)  # optimizer steps of the whole run
    dropout: float = by_size(cpu=0.0, gpu=0.2)  # after each attention and feed-forward, against overfitting

    # Data
    train_data_file: str = "train.txt"  # training text, any bytes; if there are no texts a starter corpus is written
    validation_data_file: str = "auto"  # auto: validation.txt beside train.txt, else the last 5 % of the training text

    # Model
    block_length: int = 4  # [n] bytes masked, and drafted, together, at most 64; 0: the whole text (LLaDA), 1: GPT
    next_byte_weight: float = 1.0  # of the loss of the next byte, beside that of the masked ones, if n > 1
    hole_share: float = 0.8  # fraction of the steps, if n > 1, that write given text first and the holes in it last
    attention: str = "simplified_mla"  # or mla, as in DeepSeek-V2, or mha, ordinary multi-head attention
    qk_rope_head_dim: int = 8  # of mla: the part of a head's query and key that RoPE turns, even
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_max_length_buffer: int = 4096  # longest sequence, in bytes, that the rotary table covers

    # What makes the model learn faster (README, What differs from the papers). The bell of mask ratios: arXiv
    # 2605.13026; the convolution gives bytes the local contiguity that 2605.12928 finds missing. Off: 0
    conv_width: int = 9  # bytes, odd: depthwise convolution before each layer
    mask_ratio_std: float = 0.1  # standard deviation of whole texts' mask ratios around 0.45; 0: uniform, the bound
    muon_learning_rate: float = 0.02  # peak, of Muon for the matrices of the layers; 0: AdamW for all

    # Optimization
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    gradient_clip_val: float = 1.0  # largest global gradient norm
    weight_decay: float = 0.1  # of AdamW, decoupled, on matrices only; Muon's matrices have none
    warmup_steps: int = 50  # linear warm-up; the linear decay to zero runs from step 0 to the end
    ema_decay: float = 0.99  # of the averaged weights (EMA) that are evaluated and sampled from
    max_minutes: float = 0.0  # end by the clock, learning rate decayed by then; 0: only max_steps counts

    # Sampling
    remasking: str = "low_confidence"  # or random: the order of writing of a model of whole texts (block_length 0)
    inference_steps: int = 0  # forward passes of such a model, one per block or more; 0: one per byte
    temperature: float = 1.0  # of the byte distribution; 0 takes the most probable byte
    top_p: float = 0.8  # bytes are drawn from the most probable ones that together reach this probability
    num_samples: int = 3  # prompts from the validation text that each validation continues

    # Run
    validate_every: int = 800  # steps between validations
    validation_bytes: int = 32768  # at most this much of either text in each validation
    checkpoint_every: int = 400  # steps between checkpoints
    log_every: int = 10  # steps between points in TensorBoard
    name: str = "diffusion"  # the run's folder is runs/NAME_TIME
    seed: int = 0  # of the weights, the data order, the masks and the samples
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    amp_dtype: str = "auto"  # bf16, fp16 (with a GradScaler), fp32; auto: bf16 where there is any, else fp16 on CUDA
    compile: bool = True  # torch.compile, not on mps; where it fails (no C++ compiler) training warns and does without

    def __post_init__(self):
        resolve_defaults(self)  # both stand in part 2
        check_config(self)


# === Data: a file of bytes becomes batches of x0 [B, L] ===============================================================


class ByteLevelTextDataset(Dataset):
    """The bytes start..stop of a file, which is mapped into memory: its size does not matter. The items are chunks for
    evaluation, int64 [max_length], in order, without overlap, only the last one padded with PAD. Training uses
    `random_crops`. Raises InputError: the file is missing, not a regular file or shorter than `max_length`."""

    def __init__(self, path, max_length, start=0, stop=None):
        self.path, self.max_length = str(path), max_length
        self.size = file_size(path)
        num_bytes = len(range(self.size)[start:stop])
        if num_bytes < max_length:
            found = f"{path}: {num_bytes:,} bytes" + (f" from byte {start:,} on" if start else "")
            raise InputError(f"{found} are less than one sequence of max_length={max_length:,}; add text or lower it")
        try:
            with open(path, "rb") as file:
                self.mapping = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"{path}: cannot be mapped into memory, copy it to another disk ({error})") from None
        if hasattr(self.mapping, "madvise"):  # no read-ahead: it makes random reads of a huge file 160 times as slow
            self.mapping.madvise(mmap.MADV_RANDOM)
        self.bytes = np.frombuffer(self.mapping, np.uint8)[start:stop]

    def identity(self):
        """Tells this text from another: its size and a checksum of 64 pieces of it, cheap for any size."""
        checksum, size = 0, len(self.bytes)
        for start in {i * max(0, size - 4096) // 63 for i in range(64)}:
            checksum ^= zlib.crc32(self.bytes[start : start + 4096], start % 2**32)
        return f"{size}-{checksum:08x}"

    def __len__(self):
        return math.ceil(len(self.bytes) / self.max_length)

    def __getitem__(self, index):
        return self.read(np.array([range(len(self))[index] * self.max_length]))[0]  # range raises the IndexError

    def random_crops(self, seed, step, rows, num_rows):
        """The slice `rows` of the `num_rows` sequences of a step, which begin anywhere: uint8 [rows, max_length].
        A function of (seed, step), so any split of the batch, and a resumed run, finds its own rows."""
        num_starts = len(self.bytes) - self.max_length + 1
        starts = np.random.default_rng([seed, step]).integers(num_starts, size=num_rows)[rows]
        return self.read(starts).to(torch.uint8)  # an eighth of the bytes to copy to a GPU

    def read(self, starts):
        if self.mapping.size() < self.size:  # reading beyond the end of a mapping kills the process
            raise InputError(f"{self.path}: has become shorter than its {self.size:,} bytes while it was in use")
        positions = starts[:, None] + np.arange(self.max_length)
        x0 = self.bytes[np.minimum(positions, len(self.bytes) - 1)].astype(np.int64)
        x0[positions >= len(self.bytes)] = PAD
        return torch.from_numpy(x0)


# === Model: predicts every byte of a partly masked sequence at once ===================================================


def rope_table(length, head_dim, theta):
    """[length, 2, d]: cosines and signed sines of position * theta^(-2i/d) (RoFormer, arXiv 2104.09864)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    angles = torch.outer(torch.arange(length).double(), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)], dim=1).float()


def apply_rope(x, rope):
    """Rotate the pairs (i, i + d/2) of x [B, H, L, d] by their place's angle, rope [L, 2, d] or [B, 1, L, 2, d]."""
    cos, sin = rope.to(x.dtype).unbind(dim=-2)
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin  # roll swaps the two halves


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467), in the precision of the weight, so float32 in training."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


@dataclass
class Layout:
    """What the layers know of their input beside its values: first come C clean bytes, then noisy blocks, P positions.
    K clean bytes may be seen: those of the input or, with a cache, all that were read so far."""

    rope: torch.Tensor  # [B, 1, P, 2, d], of each position's place in the text; B is 1 if all rows have the same
    parts: list  # who attends to whom: ((start, stop) of some queries, [(start, stop), ...] of their keys, sees); sees,
    # bool [B, 1, queries, keys], is None if all of these see all
    neighbours: torch.Tensor  # [B, P, conv_width], of the convolution: clean bytes 0..K-1, noisy ones K.., last: nobody
    readers: torch.Tensor | None = None  # [2, K + P - C + 1, conv_width], for the gradient: who reads each of these
    is_byte: torch.Tensor | None = None  # bool [B, P, 1]: False at PAD; None: there is no PAD
    cache: dict | None = None  # the ReadCache of the sampler


def attend(q, k, v, sees):
    """Softmax attention. On a CPU in float32: its kernel takes nearly twice as long in bf16."""
    dtype, on_cpu, num_queries = v.dtype, v.device.type == "cpu", q.shape[2]
    with torch.autocast(v.device.type, enabled=False):  # which would change the precision back
        if on_cpu and dtype.itemsize == 2:
            q, k, v = q.float(), k.float(), v.float()
        if num_queries == 1 and q.requires_grad:  # compiled, the gradient of one query alone is garbage (torch 2.13)
            q = torch.cat([q, q], dim=2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees)[:, :, :num_queries].to(dtype)


def in_parts(sees, num_clean, n, count=4):
    """Layout.parts of a whole text with the mask `sees` [B, 1, P, P]: a quarter of either stream sees nothing of the
    later quarters, so only 3/8 of all products are left."""
    parts, num_positions = [], sees.shape[-1]
    for stream, end in ((0, num_clean), (num_clean, num_positions)):
        step = math.ceil((end - stream) / n / count) * n
        for start in range(stream, end, step):
            stop = min(start + step, end)
            keys = [(0, stop - stream)] + ([(start, stop)] if stream else [])
            seen = pick(sees[..., start:stop, :], keys, dim=-1).clone()  # torch.compile rejects two views of it
            parts.append(((start, stop), keys, seen))
    return parts


def pick(x, stretches, dim=2):
    pieces = [x.narrow(dim, start, stop - start) for start, stop in stretches]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)


class Attention(nn.Module):
    """What all kinds of attention share; each says only how x becomes queries, keys and values."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads

    def forward(self, x, layout):
        q, k, v = self.queries_keys_values(x, layout.rope)  # [B, H, P, d] each
        if layout.cache is not None:
            k, v = (layout.cache.update((self, name), new, dim=2) for name, new in (("k", k), ("v", v)))
        parts = [attend(q[:, :, a:b], pick(k, keys), pick(v, keys), sees) for (a, b), keys, sees in layout.parts]
        return self.wo(torch.cat(parts, dim=2).transpose(1, 2).flatten(-2))

    def split_heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, P, d]


class SimplifiedMLAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) at its simplest: keys and values are decompressed
    from one small latent per position; queries are direct, and RoPE turns whole heads."""

    def __init__(self, config):
        super().__init__(config)
        D, R = config.model_dim, config.kv_latent_dim
        self.wq = nn.Linear(D, D, bias=False)
        self.w_latent = nn.Linear(D, R, bias=False)
        self.wk = nn.Linear(R, D, bias=False)
        self.wv = nn.Linear(R, D, bias=False)
        self.wo = nn.Linear(D, D, bias=False)

    def queries_keys_values(self, x, rope):
        q, latent = self.split_heads(self.wq(x)), self.w_latent(x)  # [B, P, R]
        k, v = self.split_heads(self.wk(latent)), self.split_heads(self.wv(latent))
        return apply_rope(q, rope), apply_rope(k, rope), v


class MultiHeadAttention(SimplifiedMLAttention):
    """Ordinary attention (arXiv 1706.03762) with RoPE on whole heads, the control: x takes the place of the latent."""

    def __init__(self, config):
        super().__init__(dataclasses.replace(config, kv_latent_dim=config.model_dim))
        self.w_latent = nn.Identity()


class MultiHeadLatentAttention(Attention):
    """Multi-head latent attention of DeepSeek-V2-Lite (arXiv 2405.04434, sec. 2.1): RMSNorm on the latent, RoPE apart
    from it, on a part of each query and one key for all heads. The names are of its code, whose wkv_b is wk_b, wv_b."""

    def __init__(self, config):
        super().__init__(config)
        D, R = config.model_dim, config.kv_latent_dim
        self.rope_dim, self.nope_dim = config.qk_rope_head_dim, D // self.num_heads - config.qk_rope_head_dim
        self.wq = nn.Linear(D, D, bias=False)
        self.wkv_a = nn.Linear(D, R + self.rope_dim, bias=False)
        self.kv_norm = RMSNorm(R)
        self.wk_b = nn.Linear(R, self.num_heads * self.nope_dim, bias=False)
        self.wv_b = nn.Linear(R, D, bias=False)
        self.wo = nn.Linear(D, D, bias=False)

    def queries_keys_values(self, x, rope):
        latent, k_rope = self.wkv_a(x).split([self.wk_b.in_features, self.rope_dim], dim=-1)  # [B, P, R], [B, P, rope]
        latent = self.kv_norm(latent)
        q_nope, q_rope = self.split_heads(self.wq(x)).split([self.nope_dim, self.rope_dim], dim=-1)
        k_rope = apply_rope(k_rope[:, None], rope).expand(-1, self.num_heads, -1, -1)  # one for all heads
        q = torch.cat([q_nope, apply_rope(q_rope, rope)], dim=-1)
        return q, torch.cat([self.split_heads(self.wk_b(latent)), k_rope], dim=-1), self.split_heads(self.wv_b(latent))


ATTENTIONS = {"simplified_mla": SimplifiedMLAttention, "mla": MultiHeadLatentAttention, "mha": MultiHeadAttention}


def mish(x):
    """x * tanh(softplus(x)) (arXiv 1908.08681) by one exponential. F.mish takes three, 1.4 times as slow on a CPU."""
    exp = torch.exp(x.float().clamp(max=20))  # beyond 20 it is x to the last bit; float16 would overflow at 5.5
    ratio = exp * (exp + 2)
    return x * (ratio / (ratio + 2)).to(x.dtype)


class FeedForward(nn.Module):
    """Gated as in GLU variants (arXiv 2002.05202), with Mish as the gate."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.model_dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.model_dim, bias=False)
        self.w3 = nn.Linear(config.model_dim, config.ffn_dim, bias=False)

    def forward(self, x):
        return self.w2(mish(self.w1(x)) * self.w3(x))


class ReadCache(dict):
    """For sampling: the keys, values and convolution's inputs of the clean bytes read so far, by turn. No byte sees
    what is written later, so they stay as they are, unless a draft is rejected: then its turn is read anew."""

    def __init__(self, rows, num_turns, reach):
        self.rows, self.num_turns, self.reach, self.turns, self.first, self.stop = rows, num_turns, reach, None, 0, 0

    def see(self, turns):
        """The next pass reads the turns [N, C]; it sees them and what was read before, `reach` turns back."""
        self.turns = turns
        if turns.numel():
            self.first, self.stop = max(0, int(turns.amin()) - self.reach), int(turns.amax()) + 1
        return self

    def update(self, key, new, dim):
        """Keep the clean positions of new, whose dimension `dim` is that of positions; returns the seen ones, then the
        noisy ones."""
        new, num_clean = new.movedim(dim, 1), self.turns.shape[1]
        if key not in self:
            self[key] = new.new_zeros(len(new), self.num_turns, *new.shape[2:])
        self[key][self.rows[:, None], self.turns] = new[:, :num_clean]
        return torch.cat([self[key][:, self.first : self.stop], new[:, num_clean:]], dim=1).movedim(1, dim)


class Neighbours(torch.autograd.Function):
    """x [B, K, D] picked by index [B or 1, P, width]. The gradient is picked, too, by `readers` [2, K, width]: who
    reads each row, at most one position of either stream. (Autograd would add up, which takes ten times as long.)"""

    @staticmethod
    def forward(context, x, index, readers):
        context.save_for_backward(readers)
        return x[torch.arange(len(x), device=x.device)[:, None, None], index]  # [B, P, width, D]

    @staticmethod
    def backward(context, gradient):
        (readers,) = context.saved_tensors
        offset = torch.arange(readers.shape[-1], device=readers.device)
        gradient = F.pad(gradient, (0, 0, 0, 0, 0, 1))[:, readers, offset]  # [B, 2, K, width, D]
        return gradient.sum(dim=(1, 3)), None, None


class DepthwiseConvolution(nn.Module):
    """Adds to each channel of x [B, P, D] a weighted sum of its `width` neighbours in the text, read from where the
    rule of `MaskPredictor.layout` allows; what is not allowed, or beyond the text, is zero."""

    def __init__(self, width, model_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, model_dim))

    def forward(self, x, layout):
        around = x if layout.cache is None else layout.cache.update(self, x, dim=1)
        around = F.pad(around, (0, 0, 0, 1))  # the last row: nobody
        around = Neighbours.apply(around, layout.neighbours, layout.readers)  # [B, P, width, D]
        return x + (around * self.weight.to(x.dtype)).sum(dim=2)


class TransformerBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.convolution = DepthwiseConvolution(config.conv_width, config.model_dim) if config.conv_width else None
        self.attention_norm = RMSNorm(config.model_dim)
        self.attention = ATTENTIONS[config.attention](config)
        self.ffn_norm = RMSNorm(config.model_dim)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    @torch.compiler.nested_compile_region  # layers of one shape are compiled once
    def forward(self, x, layout):
        if layout.is_byte is not None:  # PAD is to the convolution what lies beyond the ends: zero
            x = x * layout.is_byte
        if self.convolution is not None:
            x = self.convolution(x, layout)
        x = x + self.dropout(self.attention(self.attention_norm(x), layout))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class MaskPredictor(nn.Module):
    """The transformer of the masked diffusion model. It gets no time as input: the number of MASKs says as much.

    Turn i is the i-th byte *written*, place[i] is where it stands in the text. From left to right place[i] is i; with
    holes, what is given has the first turns and the holes the last. A block is n = block_length turns. Two streams of
    one text: clean bytes predict the next byte, noisy blocks, partly MASK, their own bytes. n = 1 is the clean stream
    alone, the autoregressive twin; n = 0 is one noisy block over all, LLaDA.
    """

    def __init__(self, config):
        super().__init__()
        n, L = config.block_length, config.max_length
        require(not n or L % n == 0 and n < L, "block_length", n, f"a divisor of max_length={L} below it, or 0")
        self.block_length, self.max_length, self.conv_width = n, L, config.conv_width
        self.fills_holes = n == 0 or n > 1 and config.hole_share > 0
        self.tok_embeddings = nn.Embedding(NUM_TOKENS, config.model_dim)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.model_dim)
        self.output = nn.Linear(config.model_dim, NUM_BYTES, bias=False)
        rope_dim = config.qk_rope_head_dim if config.attention == "mla" else config.model_dim // config.num_heads
        table = rope_table(config.rope_max_length_buffer, rope_dim, config.rope_theta)
        self.register_buffer("rope", table, persistent=False)
        self.rope_theta = config.rope_theta
        for name, module in self.named_modules():  # the embedding keeps PyTorch's N(0, 1)
            if name.endswith(("wo", "w2", "output")):  # each layer starts as the identity, the output as uniform
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def extend_rope(self, length):
        if length > len(self.rope):
            self.rope = rope_table(length, self.rope.shape[-1], self.rope_theta).to(self.rope.device)

    def forward(self, tokens, attention_mask=None, clean=None, place=None):
        """Logits [B, L, 256], float32, of the byte at each position of tokens [B, L], int64: bytes and special ids.

        A block of tokens is predicted from itself and the earlier blocks of `clean` [B, L], by default of tokens; for
        n = 1 each byte from those before it. If clean is given and n > 0, [B, 2 L, 256]: before them the clean stream's
        logits, each of the byte that follows it. All are in the order of writing: place [L] is where each turn's byte
        stands, by default from left to right. attention_mask, bool [B, L], is False where nothing may be seen, by
        default at PAD (not in compiled code). Raises InputError if L exceeds rope_max_length_buffer.
        """
        n = self.block_length
        if attention_mask is None and not torch.compiler.is_compiling() and (tokens == PAD).any():
            attention_mask = tokens != PAD
        if n == 1 and clean is None:
            return self.next_byte_logits(tokens, None, attention_mask)
        text = (tokens if clean is None else clean) if n else None
        logits = self.output(self.hidden(tokens, text, n, place, None, attention_mask)).float()
        return logits if clean is not None else logits[:, -tokens.shape[1] :]

    def next_byte_logits(self, x0, place=None, attention_mask=None):
        """Logits [B, L, 256] of each byte of x0 [B, L] given all that is written before it, and nothing of what comes
        later: those of the clean stream. At the beginning, and where the order of writing jumps, it has no prediction:
        there the byte is that of a noisy block which begins with it and is all MASK."""
        (num_rows, length), n = x0.shape, self.block_length
        firsts = torch.zeros(1, dtype=torch.int64, device=x0.device)
        if place is not None:
            firsts = torch.cat([firsts, 1 + (place.diff() != 1).nonzero().flatten()])
            place = torch.cat([place, torch.arange(length, length + n, device=place.device)])  # for the last block
            self.extend_rope(length + n)
        masks = x0.new_full((num_rows, len(firsts) * n), MASK)
        hidden = self.hidden(masks, x0, n, place, firsts[None] if len(firsts) > 1 else None, attention_mask)
        logits = self.output(hidden[:, :length]).roll(1, dims=1)
        return logits.index_copy(1, firsts, self.output(hidden[:, length::n])).float()

    def hidden(self, tokens, clean=None, n=0, place=None, firsts=None, attention_mask=None, cache=None):
        """What the output layer turns into logits, [B, C + M n, D]: of the clean bytes [B, C] and of M noisy blocks,
        tokens [B, M n]. The blocks begin at the turns firsts [B or 1, M], by default one after the other; the clean
        bytes are those of the turns from 0 on or, with a cache, those of cache.turns."""
        num_clean, num_noisy, device = 0 if clean is None else clean.shape[1], tokens.shape[1], tokens.device
        place = torch.arange(max(num_clean, num_noisy), device=device) if place is None else place
        if len(place) > len(self.rope):
            found = f"a sequence of {len(place)} bytes exceeds rope_max_length_buffer={len(self.rope)}"
            raise InputError(f"{found}; raise that field")
        turns = torch.arange(num_clean, device=device)[None] if cache is None else cache.turns
        layout = self.layout(turns, firsts, num_noisy, n or num_noisy, place, attention_mask, cache)
        x = self.tok_embeddings(tokens if clean is None else torch.cat([clean, tokens], dim=1))  # [B, P, D]
        if torch.is_autocast_enabled(x.device.type):  # autocast leaves the residual stream in fp32: more bytes to move
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for layer in self.layers:
            x = layer(x, layout)
        return self.norm(x)

    def layout(self, turns, firsts, num_noisy, n, place, attention_mask, cache):
        """Who sees whom, by one rule, *when* each byte is written: a clean byte sees the clean bytes of its own turn
        and of earlier ones; a noisy byte those of earlier blocks, and the noisy bytes of its own block. Through
        attention and through the convolution alike. No clean byte is seen from max_length or more away.

        turns [B or 1, C], firsts [B or 1, M], n, cache: as in `hidden`; place [T]: where each turn's byte stands."""
        (_, C), T, is_whole, device = turns.shape, len(place), firsts is None, place.device
        number = torch.arange(num_noisy, device=device)
        begin = number[None] // n * n if is_whole else firsts.repeat_interleave(n, dim=1)  # [B, P - C], of its block
        turn = torch.cat([turns, begin + number % n], dim=1)  # [B, P]
        known = torch.cat([turns, begin - 1], dim=1)[..., None]  # [B, P, 1]: the last turn whose clean byte is seen
        block = F.pad(number // n, (C, 0), value=-1)[:, None]  # [P, 1]
        read = turns if cache is None else torch.arange(cache.first, cache.stop, device=device)[None]  # [B, K]
        K = read.shape[1]

        sees_clean = read[:, None] <= known  # [B, P, K]
        if T > self.max_length:
            sees_clean &= (place[read][:, None] - place[turn][..., None]).abs() < self.max_length
        sees_noisy = (block == number // n).expand(len(sees_clean), -1, -1)  # [B, P, P - C]
        sees, is_byte = torch.cat([sees_clean, sees_noisy], dim=-1)[:, None], None
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (0, n), value=True)[:, turn[0]]  # [B, P]
            is_byte = attention_mask[:, :, None]
            is_self = torch.eye(sees.shape[-1], dtype=torch.bool, device=device)  # else PAD sees nothing: NaN
            sees = attention_mask[:, None, None, :] & sees | is_self
        in_one = [((0, sees.shape[-2]), [(0, sees.shape[-1])], sees if C or attention_mask is not None else None)]
        parts = in_parts(sees, C, n) if is_whole and C else in_one

        width, nobody = self.conv_width, K + num_noisy
        when = place.new_full((T + width,), T + n).scatter(0, place + width // 2, torch.arange(T, device=device))
        near = when[place[turn][..., None] + torch.arange(width, device=device)]  # [B, P, width]: each neighbour's turn
        in_block = torch.where((near <= known + n) & (block >= 0), K + block * n + near - known - 1, nobody)
        neighbours, readers = torch.where(near <= known, near - (0 if cache is None else cache.first), in_block), None
        if torch.is_grad_enabled():
            nothing = place.new_full((nobody + 1, width), len(block))
            position = torch.arange(len(block), device=device)[:, None].expand(-1, width)
            streams = slice(0, C), slice(C, None)
            readers = torch.stack([nothing.scatter(0, neighbours[0, part], position[part]) for part in streams])
            readers[:, nobody] = len(block)
        return Layout(self.rope[place[turn]][:, None], parts, neighbours, readers, is_byte, cache)


# === The diffusion objective ==========================================================================================


def draw_noise(num_rows, length, generator, block_length=0):
    """All the randomness of masking a batch: t [num_rows, blocks] and noise [num_rows, length], which ranks positions.

    Exactly 1 + floor(t * n) bytes of a block of n will be masked, where LLaDA masks each with probability t; the bound
    is the same (see `masked_diffusion_loss`). t is stratified: the blocks of every batch cover [0, 1) evenly.
    """
    n, device = block_length or length, generator.device
    require(length % n == 0, "block_length", block_length, f"a divisor of {length} bytes")
    count = num_rows * (length // n)
    t = (torch.arange(count, device=device) + torch.rand(1, generator=generator, device=device)) / count
    t = t[torch.randperm(count, generator=generator, device=device)]  # else the last blocks would have the most masks
    return t.view(num_rows, -1), torch.rand(num_rows, length, generator=generator, device=device)


def draw_order(config, step):
    """The order of writing of a step, place [L], a function of (seed, step); None: always from left to right. In
    hole_share of the steps, evenly spread, there are holes in the text, which are written last; what is given is
    written first. Holes and the stretches between them have random lengths, whose mean is another in each step. In
    every other such step the holes have whole blocks, so that blocks begin where holes do, as they will in writing."""
    L, n, share = config.max_length, config.block_length, config.hole_share
    if n < 2 or not share:
        return None
    is_hole, number = np.zeros(L, dtype=bool), math.floor((step + 1) * share)
    if number > math.floor(step * share):
        random = np.random.default_rng([config.seed, step, 1])
        mean, unit = 4 * (L / 32) ** random.random(), 1 if number % 2 else n
        at = random.integers(2) * math.ceil(random.exponential(mean))
        while at + (length := unit * math.ceil(random.exponential(mean) / unit)) <= L:
            is_hole[at : at + length] = True
            at += length + math.ceil(random.exponential(mean))
    return torch.from_numpy(is_hole.argsort(kind="stable")).to(config.device)


def training_mask_ratios(t, std, mean=0.45, uniform=1 / 8):
    """The mask ratios of training on whole texts, from uniform t: a fraction `uniform` stays uniform, so that the model
    sees all states of the sampler; the others follow a normal around `mean`, since almost all or almost nothing masked
    teaches little. (erfinv, since Apple GPUs have no torch.special.ndtri.)"""
    if not std:
        return t
    of_bell = ((t - uniform) / (1 - uniform)).clamp(min=0)
    bell = (mean + std * math.sqrt(2) * torch.erfinv(2 * of_bell - 1)).clamp(0, 1 - 1e-6)
    return torch.where(t < uniform, t / uniform, bell)


def choose_positions(candidates, scores, counts):
    """What to mask, or to unmask: in each row the `counts` [N] of highest score [N, W] of candidates, bool [N, W]."""
    order = scores.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return candidates & (order.argsort(dim=1) < counts[:, None])


def mask_bytes(x0, t, noise):
    """The forward process: replace exactly k = 1 + floor(n * t) bytes of each block of n by MASK, those of lowest noise
    [B, L]; t [B, blocks] (or [B]: one block). PAD stays. Returns xt [B, L] int64 and is_masked [B, L] bool."""
    n = x0.numel() // t.numel()
    is_byte, t = (x0 != PAD).reshape(-1, n), t.flatten()  # [B * blocks, n], [B * blocks]
    lengths = is_byte.sum(dim=1)
    num_masked = torch.minimum(1 + (lengths * t).long(), lengths)  # the minimum guards t rounded up to 1
    is_masked = choose_positions(is_byte, -noise.reshape(-1, n), num_masked).view_as(x0)
    return x0.masked_fill(is_masked, MASK), is_masked


def predict_masked(model, x0, t, noise, place=None):
    """Mask x0 and predict it. Returns the model's logits, those of x0's bytes as the last [B, L, 256] of them, their
    cross-entropy in nats and is_masked, both [B, L]. For blocks of one byte there is nothing to mask."""
    if block_length_of(model) == 1:
        logits, is_masked = model(x0), x0 != PAD
    else:
        xt, is_masked = mask_bytes(x0, t, noise)
        logits = model(xt, clean=x0, place=place)
    return logits, cross_entropy(logits[:, -x0.shape[1] :], x0, is_masked), is_masked


def cross_entropy(logits, x0, is_target):
    """In nats, [B, L], of the bytes x0 [B, L] by logits [B, L, 256]; 0 where is_target is False."""
    targets = x0.masked_fill(~is_target, -100)  # -100: no loss
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(x0)


def mean_of_masked(values, is_masked, num_blocks):
    """The mean over the masked bytes of each block, [B, blocks]."""
    values, is_masked = (x.unflatten(1, (num_blocks, -1)) for x in (values * is_masked, is_masked))
    return values.sum(dim=-1) / is_masked.sum(dim=-1).clamp(min=1)


def masked_diffusion_loss(model, x0, t=None, noise=None, place=None, next_byte_weight=0.0):
    """The negative evidence lower bound (NELBO, here "the bound"): an upper bound on -log p(x0) / L. (In the training
    on whole texts `training_mask_ratios` gives t another distribution; then it is no bound.)

    LLaDA (eq. 3), MDLM and MD4 write it as E_t[(1/t) sum of masked cross-entropies], t ~ U(0, 1), each byte masked with
    probability t. Group the draws by their number k of masks: the integral of Binomial(k; L, t) / t over t is 1/k for
    every k, so the same bound per byte is (LLaDA's eq. 6)

        E_{k ~ Uniform{1..L}}  E_{masks of k bytes}  [ mean cross-entropy of the k masked bytes ]

    The mean is taken within each block, then over blocks and sequences; over all masks of the batch it would be another
    objective. Block diffusion (BD3-LM) is that in each block of n bytes, given the clean ones before: by the chain rule
    a bound, too; for n = 1 the likelihood. Added to it, next_byte_weight times the mean cross-entropy of the clean
    stream's next bytes, but for the first and those where the order of writing jumps, which only the blocks predict.

    x0: int64 [B, L], PAD where a sequence is shorter; t and noise: of `draw_noise`, by default drawn by torch's
    generator; place [L]: the order of writing, by default from left to right. Returns a scalar, nats per byte.
    """
    if t is None:
        generator = torch.Generator(x0.device).manual_seed(int(torch.randint(2**62, ())))
        t, noise = draw_noise(*x0.shape, generator, block_length_of(model))
    x0 = x0 if place is None else x0[:, place]
    logits, nats, is_masked = predict_masked(model, x0, t, noise, place)
    num_blocks = t.numel() // len(x0)
    lengths = (x0 != PAD).unflatten(1, (num_blocks, -1)).sum(dim=-1)  # [B, blocks]
    means = mean_of_masked(nats, is_masked, num_blocks)
    loss = ((means * lengths).sum(dim=1) / lengths.sum(dim=1).clamp(min=1)).mean()
    if next_byte_weight and block_length_of(model) > 1:  # the next byte's loss; for n = 1 the loss above is it
        is_next = x0[:, 1:] != PAD if place is None else (x0[:, 1:] != PAD) & (place.diff() == 1)
        nats = cross_entropy(logits[:, : x0.shape[1] - 1], x0[:, 1:], is_next)
        loss = loss + next_byte_weight * mean_of_masked(nats, is_next, 1).mean()
    return loss


def block_length_of(model):
    return getattr(getattr(model, "module", model), "block_length", 0)  # module: of DistributedDataParallel


# === Sampler: from MASKs to text ======================================================================================


def run_conditional_diffusion_inference(
    model, prompt, response_length, config, suffix="", seed=None, on_step=None, until=None
):
    """Write `response_length` bytes after `prompt`, and before `suffix` if there is one (infilling); 0: only the holes.
    What follows the last given byte ends with the first `until` in it, a str or bytes, if that comes sooner.

    `prompt` is a str, bytes or a sequence of ints: 0..255, and MASK for each byte of a hole. Of a list of prompts the
    i-th has the seed + i (default: config.seed); those with MASKs in the same places are one batch, and each comes out
    as it would alone. Of `config` it uses Sampling, block_length, seed, rope_max_length_buffer. `on_step` is called
    with the sequences of a batch, x [N, L] int64, before the first pass and after each, which overwrites x; the last
    call shows the finished bytes, PAD after `until`.

    Returns prompt, response and suffix as one str, with invalid UTF-8 replaced by U+FFFD; for a list, a list of those.
    Raises InputError if the whole exceeds rope_max_length_buffer or an argument is not possible.
    """
    is_batch = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], (int, np.integer)))
    suffix, until, on_step = to_tokens(suffix, "suffix"), to_tokens(until or "", "until"), on_step or (lambda x: None)
    texts = [to_tokens(one) + [MASK] * response_length + suffix for one in (prompt if is_batch else [prompt])]
    seed = config.seed if seed is None else seed
    ends = [max((place + 1 for place, token in enumerate(text) if token != MASK), default=0) for text in texts]
    check_sampling(model, config, response_length, seed, texts, ends)
    longest = max(map(len, texts), default=0)
    batches, results, size = {}, [""] * len(texts), max(1, BYTES_AT_ONCE // max(1, longest))
    for number, text in enumerate(texts):
        batches.setdefault((number // size, *(token == MASK for token in text)), []).append(number)
    write = write_in_blocks if block_length_of(model) else denoise
    model.extend_rope(longest + 2 * max(64, block_length_of(model)))  # the drafts of blocks reach beyond the end
    with evaluation_mode(model):
        for numbers in batches.values():
            given, seeds = [texts[i] for i in numbers], [seed + i for i in numbers]
            x, end = torch.tensor(given, dtype=torch.int64, device=next(model.parameters()).device), ends[numbers[0]]
            on_step(x)
            for x in write(model, x, config, seeds):  # noqa: B020  x is overwritten in place
                on_step(x)
                if until and not ((x == MASK) & ~after(x, end, until)).any():
                    break
            if until:
                x = x.masked_fill(after(x, end, until), PAD)
                on_step(x)
            for i, row in zip(numbers, x.tolist()):
                results[i] = bytes(token for token in row if token != PAD).decode(errors="replace")
    return results if is_batch else results[0]


@torch.inference_mode()
def write_in_blocks(model, x, config, seeds):
    """Fill the MASKs of x [N, L] in place, from left to right; yields x after each pass.

    Each byte is drawn from the clean stream given all before it (the first of the text, or of a hole, from a block of
    MASKs as long as in the training). The noisy blocks draft the next n - 1 bytes; the next pass reads the drafts as if
    they were written, keeps them up to the first that is not what the clean stream draws there with the same noise, and
    writes that instead. So the text is, byte for byte, the same for every n. (Speculative decoding, arXiv 2211.17192,
    by Gumbel noise.) One pass reads the last byte and its drafts, verifies these, and drafts anew after each (TiDAR).
    """
    (N, L), n, own, device = x.shape, config.block_length, model.block_length, x.device
    beyond = 2 * max(n, own)  # so many turns after the end are drafted, too, but not written
    place, is_given = torch.arange(L + beyond, device=device), F.pad(x[0] != MASK, (0, beyond))
    place = torch.cat([place[is_given], place[~is_given]])  # of each turn
    text = F.pad(x, (0, beyond), value=MASK)[:, place]
    noise = gumbel_noise(seeds, len(place), device)[:, place] if config.temperature else None

    def draw(hidden, turns):
        of_turns = None if noise is None else noise.gather(1, turns[..., None].expand(-1, -1, NUM_BYTES))
        return draw_bytes(model.output(hidden).float(), config.temperature, config.top_p, of_turns)

    is_jump, rows = [True, *(place.diff() != 1).tolist()], torch.arange(N, device=device)
    cache = ReadCache(rows, len(place), len(place) if any(is_jump[1:]) else max(model.max_length, model.conv_width))
    num_given = int(is_given.sum())
    starts = [turn for turn in range(num_given, L) if turn == num_given or is_jump[turn]]
    for start, end in zip(starts, [*starts[1:], L]):  # of each hole, and of what is to follow the text
        num_read = start - 1 if start > num_given else 0  # in a later hole all but the last byte
        turns, drafts = torch.arange(num_read, start, device=device).expand(N, -1), text[:, :0]
        first, length = torch.full((N,), start, device=device), own  # the next turn to write, of each row
        while (first < end).any():
            C, num_drafts = turns.shape[1], drafts.shape[1]
            new = first[:, None] + torch.arange(num_drafts + 1, device=device)  # [N, drafts + 1]: what may be written
            begins = new if n > 1 or is_jump[start] else new[:, :0]  # of a noisy block after each draft
            masks = text.new_full((N, begins.shape[1] * length), MASK)
            clean = torch.cat([text.gather(1, turns[:, : C - num_drafts]), drafts], dim=1)
            hidden = model.hidden(masks, clean, length, place, begins, cache=cache.see(turns))
            noisy = hidden[:, C:].unflatten(1, (-1, length))  # [N, drafts + 1, n, D]
            drawn = draw(noisy[:, :, 0] if is_jump[start] else hidden[:, C - num_drafts - 1 : C], new)
            agreed = (drawn[:, :-1] == drafts).cumprod(dim=1).sum(dim=1)  # verify, [N]: how many, from the first on
            agreed = torch.minimum(agreed, end - 1 - first)  # -1: the row has ended
            is_new = torch.arange(num_drafts + 1, device=device) <= agreed[:, None]
            text.scatter_(1, new, torch.where(is_new, drawn, text.gather(1, new)))
            x[:, place[:L]] = text[:, :L]
            yield x
            first, is_jump[start] = first + agreed + 1, False
            if n > 1:  # draft
                last = noisy[rows, agreed.clamp(min=0), 1:n]  # of this block the first byte has been drawn
                drafts = draw(last, first[:, None] + torch.arange(last.shape[1], device=device))
            turns, length = first[:, None] - 1 + torch.arange(drafts.shape[1] + 1, device=device), n


@torch.inference_mode()
def denoise(model, x, config, seeds):
    """Fill the MASKs of x [N, L] in place, by a model of whole texts; yields x after each pass.

    This is LLaDA's sampler (arXiv 2502.09992, algorithms 4 and 5). The text is cut into blocks, filled from left to
    right. Each pass predicts all of x, draws a byte for each MASK of the block and unmasks some of them: those whose
    drawn byte is most probable (LLaDA remasks the others, hence the field's name), or any, "random" (MDLM, MD4). A
    row's random numbers depend on its seed and block alone.
    """
    for block, passes in plan_blocks(x == MASK, config):
        generators = [torch.Generator(x.device).manual_seed(derive_seed(seed, block.start)) for seed in seeds]
        for number in range(passes):
            is_masked = x[:, block] == MASK  # [N, W]
            logits = model.output(model.hidden(x)[:, block]).float()
            noise = torch.stack([draw_gumbel((is_masked.shape[1], 257), generator) for generator in generators])
            drawn = draw_bytes(logits, config.temperature, config.top_p, noise[..., :256])
            of_drawn = logits.softmax(dim=-1).gather(-1, drawn[..., None])[..., 0]
            scores = of_drawn if config.remasking == "low_confidence" else noise[..., 256]
            counts = -(-is_masked.sum(dim=1) // (passes - number))  # an equal part for each of the passes left
            x[:, block] = torch.where(choose_positions(is_masked, scores, counts), drawn, x[:, block])
            yield x


def draw_gumbel(shape, generator):
    """Gumbel noise, in float64 where the device has it: float32 silently lowers the temperature (arXiv 2409.02908)."""
    dtype = torch.float32 if generator.device.type == "mps" else torch.float64  # Apple GPUs have no float64
    uniform = torch.rand(shape, generator=generator, dtype=dtype, device=generator.device)
    return -(-uniform.log()).log()


def gumbel_noise(seeds, length, device):
    """[N, length, 256], of each place: a function of the row's seed and the place alone, however much is written."""
    rows = []
    for seed in seeds:
        seeds_of_row = [derive_seed(seed, start) for start in range(0, length, 64)]
        generators = [torch.Generator(device).manual_seed(number) for number in seeds_of_row]
        rows.append(torch.cat([draw_gumbel((64, NUM_BYTES), generator) for generator in generators])[:length])
    return torch.stack(rows)


def draw_bytes(logits, temperature, top_p, gumbel):
    """A byte for each row of logits [..., 256], drawn from softmax(logits / temperature), of which top_p keeps the most
    probable bytes that together reach this probability (arXiv 1904.09751). Temperature 0 takes the most probable one.
    The byte is the largest of logit / temperature + gumbel [..., 256] (Gumbel-max): with the same noise, draws from two
    similar predictions are mostly equal."""
    if not temperature:
        return logits.argmax(dim=-1)
    logits = logits.to(gumbel.dtype) / temperature
    if top_p < 1:
        probs, order = logits.softmax(dim=-1).sort(descending=True)
        is_tail = probs.cumsum(dim=-1) - probs >= top_p
        is_tail[..., 0] = False  # the most probable one stays, however small top_p is
        logits = logits.masked_fill(is_tail.scatter(-1, order, is_tail), -torch.inf)
    return (logits + gumbel).argmax(dim=-1)


def plan_blocks(is_masked, config):
    """[(block, passes)]: the slices of is_masked [N, L] that hold a MASK, from left to right, and in how many passes
    each is unmasked: inference_steps in all. Blocks start at the first MASK."""
    columns = is_masked[0].nonzero().flatten().tolist()
    if not columns:
        return []
    start, stop, length = columns[0], columns[-1] + 1, config.block_length or is_masked.shape[1]
    length = max(length, -(-(stop - start) // (config.inference_steps or stop)))  # for few passes longer blocks
    blocks = [slice(begin, min(begin + length, stop)) for begin in range(start, stop, length)]
    masks = [int(is_masked[0, block].sum()) for block in blocks]
    blocks, masks = zip(*((block, number) for block, number in zip(blocks, masks) if number))
    passes = [1] * len(blocks)
    for _ in range(min(config.inference_steps or len(columns), len(columns)) - len(blocks)):
        passes[max(range(len(blocks)), key=lambda i: masks[i] / passes[i])] += 1
    return list(zip(blocks, passes))


def after(x, end, until):
    """bool [N, L]: True after the first `until`, a list of bytes, that stands in x [N, L] from `end` on."""
    is_over, size = torch.zeros_like(x, dtype=torch.bool), len(until)
    if x.shape[1] > end + size:
        windows = x[:, end:-1].unfold(1, size, 1)  # [N, L - end - size, size]
        is_over[:, end + size :] = (windows == torch.tensor(until, device=x.device)).all(dim=-1)
    return is_over.cumsum(dim=1) > 0


def to_tokens(text, name="prompt"):
    """A text as a list of ints, 0..255 and MASK. Raises InputError, which calls it by `name`."""
    try:
        tokens = list(text.encode(errors="surrogateescape") if isinstance(text, str) else text)
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: {error.object[error.start]!r} is half a character; give bytes instead") from None
    for token in tokens:
        require(0 <= token < NUM_BYTES or token == MASK, name, token, f"made of bytes 0..255 and MASK={MASK}")
    return [int(token) for token in tokens]


# === Training: the loop first, then its parts =========================================================================


def train(config, run_dir=None, checkpoint=None):
    """Train as `config` says, from scratch or from `checkpoint` (what `read_checkpoint` returned), in run_dir. Ctrl-C,
    SIGTERM, SIGUSR1 and a closed terminal end the run in order, after the step. Returns the exit code: 0, or 128 + the
    signal. Raises TrainingError: the loss was not finite, or the last checkpoint could not be written."""
    if checkpoint is None:
        write_starter_corpus(config)
    check_writable(run_dir or Path("runs"))
    train_set, validation_set = open_datasets(config, (checkpoint or {}).get("folder", "."))
    state = TrainingState(config, checkpoint)
    state.know_texts(train_set, validation_set)
    check_sampling(state.ema, config)
    if state.is_over():
        limit = "--max_steps" if state.step >= config.max_steps else "--max_minutes"
        ended = f"{run_dir or 'the run'} ended at step {state.step:,}, after {state.minutes:.1f} minutes"
        say(f"{ended}; to go on raise {limit}")
        return 0
    run_dir = run_dir or make_run_dir(config)
    lock = claim_run(run_dir, config) if rank() == 0 else None  # noqa: F841  held to the end
    log, model = Log(state, run_dir), in_parallel(state.model)
    loss_function = compile_loss(model, state)
    intervals = config.log_every, config.validate_every, config.checkpoint_every
    announce(state, train_set, validation_set, run_dir)
    with stop_signals() as received, closing(log):
        started, stop = time.perf_counter() - 60 * state.minutes, None
        log.restart()
        while stop is None:
            loss, norm = train_step(state, model, loss_function, train_set)
            log.losses.append(loss)  # on the device, so that no step waits for it
            stop = reason_to_stop(state, (time.perf_counter() - started) / 60, received)
            to_log, to_validate, to_save = (stop is not None or state.step % every == 0 for every in intervals)
            if to_log or to_validate or to_save:
                log.step(loss, norm)  # log; raises TrainingError if they are not finite, before anything is saved
            if to_validate and not stop:
                validate(state, train_set, validation_set, log)  # saves best.pt
            if to_save and not save_checkpoint(run_dir, "latest.pt", state) and stop is not None:
                raise TrainingError(f"step {state.step:,} could not be saved to {run_dir}, see the warning above")
            if to_validate or to_save:
                log.restart()
        folder = shlex.quote(str(run_dir))
        if stop:
            say(f"stopped at step {state.step:,} and saved; to go on add to the command: --resume {folder}")
            return 128 + stop
        num_bytes = min(len(validation_set.bytes), 2**20)  # the whole validation text, up to this size
        figures = judge(state.ema, validation_set, num_bytes)
        log.add_result(figures)
    say(f"done: {state.step:,} steps in {tqdm.format_interval(60 * state.minutes)}")
    say(f"final {in_words(figures)} bits per byte, on {num_bytes:,} bytes of validation text")
    say(f"try the best checkpoint: python main.py generate --watch --checkpoint {folder}")
    return 128 + received[0] if received else 0


def train_step(state, model, loss_function, train_set):
    """One step on one batch: returns its loss, nats per byte, and the norm of its gradient, scalars on the device."""
    config, num_micro_batches = state.config, state.config.gradient_accumulation_steps
    t, noise, place = draw_step(state)  # of all rows of the step, whoever computes them
    loss = torch.zeros((), device=config.device)
    for micro_batch in range(num_micro_batches):
        first = (micro_batch * world_size() + rank()) * config.batch_size
        rows, is_last = slice(first, first + config.batch_size), micro_batch == num_micro_batches - 1
        x0 = train_set.random_crops(config.seed, state.step, rows, len(t))  # fetch
        x0 = x0.pin_memory() if config.device.startswith("cuda") else x0  # else the copy would be waited for
        x0 = x0.to(config.device, non_blocking=x0.is_pinned()).long()
        with nullcontext() if is_last or model is state.model else model.no_sync():
            with autocast(config):  # forward
                part = loss_function(model, x0, t[rows], noise[rows], place, config.next_byte_weight)
                part = part / num_micro_batches
            state.scaler.scale(part).backward()  # backward
        loss += part.detach()
    if dist.is_initialized():
        dist.all_reduce(loss)  # on a GPU the host does not wait for it
    return loss / world_size(), optimizer_step(state)  # step


def reason_to_stop(state, minutes, received):
    """None: go on; 0: the training is over; else the number of the signal that was received. The same answer in all
    processes, which agree on it at every step. Sets state.minutes."""
    is_orphan = is_distributed() and os.getppid() != state.parent  # the torchrun that started this process is gone
    state.minutes, number = over_processes("max", [minutes, max(received, default=signal.SIGTERM * is_orphan)]).tolist()
    return 0 if state.is_over() else int(number) or None  # a signal in the last step comes too late


def derive_seed(*numbers):
    """One 63-bit seed from several numbers, such as (seed, step). So a resumed run draws what it would have drawn."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def draw_step(state):
    """What is drawn for a step: t, noise and place of `masked_diffusion_loss`. A function of (seed, step), for the
    whole batch, so that any split of it into processes and micro-batches gets the same; of whole texts with the mask
    ratios of training. Seeds torch's generator for dropout, too."""
    config = state.config
    torch.manual_seed(derive_seed(config.seed, state.step, 1 + rank()))
    generator = torch.Generator(config.device).manual_seed(derive_seed(config.seed, state.step))
    num_rows = config.batch_size * config.gradient_accumulation_steps * world_size()
    t, noise = draw_noise(num_rows, config.max_length, generator, config.block_length)
    t = t if config.block_length else training_mask_ratios(t, config.mask_ratio_std)
    return t, noise, draw_order(config, state.step)


def learning_rate_scale(config, step, minutes):
    """Factor of the peak learning rate: linear warm-up times linear decay to zero at max_steps or max_minutes,
    whichever comes first. A function of the step and the clock alone, so there is no scheduler to save."""
    progress = max(step / config.max_steps, minutes / config.max_minutes if config.max_minutes else 0.0)
    return min(1.0, (step + 1) / (config.warmup_steps + 1)) * max(0.0, 1.0 - progress)


@torch.no_grad()
def optimizer_step(state):
    """Clip the gradients, update and average the weights; returns the gradient norm before clipping. In fp16 a step
    whose gradients are not finite is skipped, and the GradScaler lowers its scale."""
    config, scaler = state.config, state.scaler
    scale = learning_rate_scale(config, state.step, state.minutes)
    for optimizer, peak in zip(state.optimizers, (config.learning_rate, config.muon_learning_rate)):
        for group in optimizer.param_groups:
            group["lr"] = scale * peak
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.gradient_clip_val)
    if not scaler.is_enabled() or norm.isfinite():  # waits for the device, in fp16 alone
        for optimizer in state.optimizers:
            scaler.step(optimizer)
    scaler.update()
    state.model.zero_grad()
    decay = min(config.ema_decay, (1 + state.step) / (10 + state.step))  # so that the random start is soon forgotten
    # PyTorch's AveragedModel takes twice as long, and would wait for the GPU at each step
    torch._foreach_lerp_(list(state.ema.parameters()), list(state.model.parameters()), 1 - decay)
    state.step += 1
    return norm


def validate(state, train_set, validation_set, log):
    """Bounds and samples of the EMA weights, to console, TensorBoard and samples.txt; saves best.pt."""
    config, model = state.config, state.ema
    of_training_text = judge(model, train_set, config.validation_bytes)
    figures = judge(model, validation_set, config.validation_bytes)
    bound, *_ = next(iter(figures.values()))
    best_before, state.best_bound = state.best_bound, min(state.best_bound, bound)
    if rank() == 0:
        report = f"step {state.step:,}: {in_words(figures)} bits per byte"
        say(f"{report}; on training text {in_words(of_training_text)}")
        log.add_figures("train/", of_training_text)
        log.add_figures("val/", figures)
        log.add("scalar", "val/best_bits_per_byte", state.best_bound)
        if config.num_samples:
            show_samples(state, validation_set, log, f"## {report}\n\n")
        if bound < best_before and not save_checkpoint(log.run_dir, "best.pt", state):
            state.best_bound = best_before  # best.pt is still that of the bound before


def show_samples(state, validation_set, log, report):
    """Prompts from evenly spaced places of the validation text (five eighths of max_length), continued, beside the true
    continuation; and how the first continuation came about."""
    config, steps = state.config, []
    prompt_length = config.max_length * 5 // 8
    places = (np.arange(config.num_samples) + 0.5) / config.num_samples
    x0 = validation_set.read((places * (len(validation_set.bytes) - config.max_length)).astype(np.int64)).tolist()
    prompts, length = [row[:prompt_length] for row in x0], config.max_length - prompt_length
    run_conditional_diffusion_inference(state.ema, prompts, length, config, on_step=lambda x: steps.append(x.clone()))
    ends = [number for number, x in enumerate(steps) if not (x == MASK).any()]  # of each batch
    finished, steps = torch.cat([steps[end] for end in ends]).tolist(), steps[: ends[0] + 1]
    for prompt, written, truth in zip(prompts, finished, x0):
        texts = {"prompt": prompt, "model": written[prompt_length:], "truth": truth[prompt_length:]}
        for title, tokens in texts.items():
            text = bytes(tokens).decode(errors="replace").strip("\ufffd")  # characters that are cut in two
            say(f"    {title:<6}  {text[-60:] if title == 'prompt' else text[:60]!r}")  # about 80 columns
            report += as_code(title, text)
    for number in range(1, len(steps), math.ceil(len(steps) / 4)):
        title = f"the first sample after {number} of {len(steps) - 1} passes"
        report += as_code(title, show_masks(steps[number][0].tolist()))
    log.add("text", "samples", report)
    with suppress(OSError), open(log.run_dir / "samples.txt", "a+", encoding="utf-8") as file:  # a disk may be full
        file.seek(0)
        if report.partition(":")[0] + ":" not in file.read():  # the step may have been validated before a crash
            file.write(report)


# ######################################################################################################################
# PART 2: THE MACHINERY. What any trainer needs; skip it at first, and look things up.
#         evaluation, text files, optimizer, checkpoints, logging, devices and processes, profile, checks, command line
# ######################################################################################################################


# === Evaluation =======================================================================================================


@contextmanager
def evaluation_mode(model):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def chunks_of(dataset, max_bytes, batch_size):
    """(their number, [(their rows, x0 [rows, L]), ...] of this process): chunks of max_length, spread evenly over the
    text, as many as about max_bytes hold, or all of them if it is 0."""
    num_chunks = len(dataset) if not max_bytes else min(len(dataset), math.ceil(max_bytes / dataset.max_length))
    chunks = np.arange(num_chunks) * len(dataset) // num_chunks
    batches = torch.arange(num_chunks).split(batch_size)[rank() % world_size() :: world_size()]
    return num_chunks, ((rows, torch.stack([dataset[chunks[row]] for row in rows])) for rows in batches)


@torch.no_grad()
def measure(model, dataset, max_bytes=0, batch_size=16, seed=0):
    """Mask each block of a text once, and predict it, in the precision of the weights. Returns three float64 [blocks]:
    lengths, mask ratios and mean cross-entropies of the masked bytes in bits. If max_bytes is above 0 about so many
    bytes are measured, in chunks spread evenly. The noise is a function of `seed` alone. All processes of a distributed
    run take part and get the same result."""
    device = next(model.parameters()).device
    num_chunks, batches = chunks_of(dataset, max_bytes, batch_size)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same masks whatever the device
    t, noise = draw_noise(num_chunks, dataset.max_length, generator, block_length_of(model))
    measured, num_blocks = torch.zeros(3, *t.shape, dtype=torch.double), t.shape[1]
    with evaluation_mode(model):
        for rows, x0 in batches:
            x0 = x0.to(device)
            _, nats, is_masked = predict_masked(model, x0, t[rows].to(device), noise[rows].to(device))
            lengths, masked = (x.unflatten(1, (num_blocks, -1)).sum(dim=-1) for x in (x0 != PAD, is_masked))
            bits = mean_of_masked(nats, is_masked, num_blocks) * BITS_PER_NAT
            measured[:, rows] = torch.stack([x.cpu().double() for x in (lengths, masked / lengths, bits)])
    measured = over_processes("sum", measured).flatten(1)
    return measured[:, measured[0] > 0]


@torch.no_grad()
def estimate_next_byte(model, dataset, max_bytes=0):
    """(mean, standard error) of the exact cost of a text written from left to right by the clean stream, in bits per
    byte. The chunks, and the processes, are those of `measure`."""
    num_chunks, batches = chunks_of(dataset, max_bytes, batch_size=16)
    measured = torch.zeros(2, num_chunks, dtype=torch.double)
    for rows, x0 in batches:
        bits, is_byte = exact_likelihood(model, x0.to(next(model.parameters()).device)), x0 != PAD
        measured[:, rows] = torch.stack([is_byte.sum(dim=1).double(), mean_of_masked(bits, is_byte, 1)[:, 0]])
    lengths, bits = over_processes("sum", measured)
    return mean_over_bytes(bits, lengths)


def judge(model, dataset, max_bytes=0):
    """{"bound": (mean, standard error), "next byte": the same, exact}, in bits per byte; of the autoregressive twin
    {"exact likelihood": ...}, of a model of whole texts the bound alone."""
    n = block_length_of(model)
    figures = {"exact likelihood" if n == 1 else "bound": estimate_nelbo(model, dataset, max_bytes)}
    if n > 1:
        figures["next byte"] = estimate_next_byte(model, dataset, max_bytes)
    return figures


def in_words(figures):
    return ", ".join(f"{name} {with_error(*figure)}" for name, figure in figures.items())


def mean_over_bytes(values, lengths, ratios=None):
    """(mean, standard error) of a figure of each block or chunk, weighted by length; of one alone the error is nan.

    Most of the spread comes from the mask ratios; as these are stratified it hardly moves the mean. So given `ratios`
    the deviations d_i from the mean, weighted by w_i, are compared with the next in the order of the ratios alone:
    SE^2 = n / (n - 1) * sum of (w_{i+1} d_{i+1} - w_i d_i)^2 / 2.
    """
    weights, n = lengths / lengths.sum(), len(values)
    mean = (values * lengths).sum() / lengths.sum()  # nan if there are none
    deviations = (values - mean) * weights
    squares = deviations.square() if ratios is None else deviations[ratios.argsort(stable=True)].diff().square() / 2
    return mean.item(), (squares.sum() * n / (n - 1)).sqrt().item() if n > 1 else math.nan


def with_error(value, error):
    return f"{value:.3f}" + ("" if error is None or math.isnan(error) else f" ± {error:.3f}")


def estimate_nelbo(model, dataset, max_bytes=0, batch_size=16, seed=0):
    """(mean, standard error) of the bound of `masked_diffusion_loss` over a text, in bits per byte; see `measure`."""
    lengths, ratios, bits = measure(model, dataset, max_bytes, batch_size, seed)
    return mean_over_bytes(bits, lengths, None if len(ratios.unique()) == 1 else ratios)


@torch.no_grad()
def exact_likelihood(model, x0, order="as_written", is_hole=None):
    """Bits of each byte of x0 [B, L] by the chain rule, float64 [B, L], on the CPU; 0 at PAD. With is_hole, bool [L],
    those of the holes, given all else (by blocks: all before them).

    as_written            by the clean stream, in one pass: the law by which text is written. n = 0: left_to_right
    left_to_right         by the masked predictions: the bytes of a block, the others MASK, are revealed from the left
    most_confident_first  in the order that follows from the bytes seen so far alone, so exact, too (arXiv 2603.01367)

    The last two take all blocks at once, each after its clean past: as many passes as a block has bytes."""
    if len(x0) > 64:  # in parts that fit into memory
        return torch.cat([exact_likelihood(model, rows, order, is_hole) for rows in x0.split(64)])
    (_, length), n, place = x0.shape, block_length_of(model), torch.arange(x0.shape[1], device=x0.device)
    is_hidden = (x0 != PAD) if is_hole is None else (x0 != PAD) & is_hole
    if n and order == "as_written":
        place = None if is_hole is None else torch.cat([place[~is_hole], place[is_hole]])
        written = x0 if place is None else x0[:, place]
        with evaluation_mode(model):
            logits = model.next_byte_logits(written, place, None if (x0 != PAD).all() else written != PAD)
        nats = cross_entropy(logits, written, written != PAD)
        nats = nats if place is None else nats[:, place.argsort()]
        return torch.where(is_hidden, nats, 0.0).cpu().double() * BITS_PER_NAT
    n = n or length
    x0, is_hidden = F.pad(x0, (0, -length % n), value=PAD), F.pad(is_hidden, (0, -length % n))
    bits, one = torch.zeros(x0.shape, dtype=torch.double), torch.ones(1, device=x0.device)
    with evaluation_mode(model):
        for _ in tqdm(range(is_hidden.view(-1, n).sum(dim=1).max()), order, leave=False, disable=None):  # on a terminal
            logits = model(x0.masked_fill(is_hidden, MASK), clean=x0)[:, -x0.shape[1] :]
            scores = logits.log_softmax(dim=-1).amax(dim=-1) * (order == "most_confident_first")  # equal: from the left
            is_next = choose_positions(is_hidden.view(-1, n), scores.reshape(-1, n), one).view_as(x0)
            bits += cross_entropy(logits, x0, is_next).cpu().double() * BITS_PER_NAT
            is_hidden &= ~is_next
    return bits[:, :length]


def write_many(model, prompts, config, seed):
    """Texts of one length with their MASKs filled, as int64 [N, L]."""
    finished = []  # of each batch
    on_step = lambda x: None if (x == MASK).any() else finished.append(x.clone())
    run_conditional_diffusion_inference(model, prompts, 0, config, seed=seed, on_step=on_step)
    return torch.cat(finished)


WORD = re.compile(rb"[\w\x80-\xff]+")  # letters of other scripts are bytes from 0x80 on
FAR_OFF = {  # a figure of the samples is marked if this holds for its value and that of the text itself
    "known words": lambda value, text: value < 0.9 * text,
    "byte entropy": lambda value, text: abs(value - text) > 0.1 * text,
    "invalid UTF-8": lambda value, text: value > text + 0.001,
}


@functools.lru_cache(1)  # of one long text
def words_of(text):
    return set(WORD.findall(text))


def text_statistics(texts, training_text):
    """What texts (a list of bytes) look like: {figure: value}. All are fractions, except the entropy (bits). Copied: of
    their pieces of 32 bytes, those that stand in the training text word for word. None: there is no such text."""
    words = [word for text in texts for word in WORD.findall(text)[1:-1]]  # those at the ends may be cut
    joined = b"".join(texts)
    frequencies = np.bincount(np.frombuffer(joined, np.uint8)) / max(1, len(joined))
    characters = "".join(text.decode(errors="replace").strip("\ufffd") for text in texts)  # an end may be cut off
    known = copied = None
    if training_text is not None:
        pieces = [text[start : start + 32] for text in texts for start in range(0, len(text) - 31, 32)]
        vocabulary = words_of(training_text)
        known = sum(word in vocabulary for word in words) / max(1, len(words))
        copied = sum(piece in training_text for piece in pieces) / max(1, len(pieces))
    entropy = -sum(p * math.log2(p) for p in frequencies if p)
    invalid = characters.count("\ufffd") / max(1, len(characters))
    return {"known words": known, "byte entropy": entropy, "invalid UTF-8": invalid, "copied": copied}


def evaluate(model, config, dataset, training_text, num_chunks=16, seed=0):
    """All that `python main.py evaluate` reports, the same for the same seed: a list of dicts. Their kinds "bound",
    "exact" and "other" are never compared; "text" is what the figure is for the text itself."""
    device, length = next(model.parameters()).device, config.max_length
    num_chunks = min(num_chunks, len(dataset.bytes) // length)
    starts = np.arange(num_chunks) * (len(dataset.bytes) // length) // num_chunks * length
    x0, rows = dataset.read(starts).to(device), []  # [num_chunks, L], without PAD

    def report(figure, kind, values, text=None, is_far_off=False):
        if not isinstance(values, tuple):  # else a mean and its standard error
            values = torch.as_tensor(math.nan if values is None else values).cpu().double().reshape(-1)
            values = mean_over_bytes(values, torch.ones_like(values))
        value, error = (None if math.isnan(number) else number for number in values)
        rows.append({"figure": figure, "kind": kind, "value": value, "standard_error": error, "text": text})
        rows[-1]["is_far_off"] = bool(is_far_off)

    def sample(prompts, **overrides):
        return write_many(model, prompts, dataclasses.replace(config, **overrides), seed)

    n = block_length_of(model)
    kind = ("likelihood", "exact") if n == 1 else ("NELBO", "bound")
    report(*kind, estimate_nelbo(model, dataset, seed=seed))
    if n > 1:
        report("next byte", "exact", estimate_next_byte(model, dataset))
    half, hole, place = length // 2, min(20, length // 2), torch.arange(length, device=device)
    left_to_right = exact_likelihood(model, x0)
    report("left to right", "exact", left_to_right.mean(dim=1))
    if n > 1:
        report("left to right, in blocks", "exact", exact_likelihood(model, x0, "left_to_right").mean(dim=1))
    if n != 1:
        report("most confident first", "exact", exact_likelihood(model, x0, "most_confident_first").mean(dim=1))
    if model.fills_holes:
        start = (length - hole) // 2
        is_hole = (place >= start) & (place < start + hole)
        of_hole = exact_likelihood(model, x0, is_hole=is_hole)[:, start : start + hole].mean(dim=1)
        of_left = left_to_right[:, start : start + hole].mean(dim=1)
        report("holes, the left given", "exact", of_left)
        report("holes, both sides given", "exact", of_hole)
        report("what the right is worth", "other", of_left - of_hole)
        for name, temperature in (("greedy", 0.0), ("drawn", config.temperature)):
            is_right = sample(x0.masked_fill(is_hole, MASK).tolist(), temperature=temperature) == x0
            report(f"holes, {name}", "other", is_right[:, start : start + hole].float().mean(dim=1))
    for kind, given in (("free", 0), ("prompted", half)):
        text, samples = x0[:, given:], sample(x0.masked_fill(place >= given, MASK).tolist())[:, given:]
        if kind == "free":
            own, usual = exact_likelihood(model, samples).mean(dim=1), left_to_right.mean().item()
            report("likelihood of own samples", "exact", own, usual, own.mean() < 0.5 * usual)
        of_text, of_samples = (text_statistics(list(map(bytes, x.tolist())), training_text) for x in (text, samples))
        for name, value in of_samples.items():
            is_far_off = name in FAR_OFF and value is not None and FAR_OFF[name](value, of_text[name])
            report(f"{name}, {kind}", "other", value, of_text[name], is_far_off)
    return rows


def as_table(rows):
    lines = [f"{'':<31}{'bound':<14}{'exact':<14}{'other':<14}{'of the text':<13}"]
    for row in rows:
        number = "none" if row["value"] is None else with_error(row["value"], row["standard_error"])
        cells = "".join(f"{number if row['kind'] == kind else '':<14}" for kind in ("bound", "exact", "other"))
        text = "" if row["text"] is None else f"{row['text']:.3f}" + " (far off)" * row["is_far_off"]
        lines.append(f"{row['figure']:<31}{cells}{text}".rstrip())
    return "\n".join(lines)


# === Text files =======================================================================================================


def file_size(path):
    if not os.path.isfile(path):  # opening a named pipe would wait for ever
        raise InputError(f"{path}: is missing or no regular file; check the path, or copy the text into a file")
    return os.path.getsize(path)


def what_it_looks_like(text):
    """What a text seems to be if not UTF-8, and how to convert it; None: UTF-8, or nearly."""
    if text.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        return "a gzip or zip archive (unpack it with gunzip or unzip)"
    if text.startswith((b"\xff\xfe", b"\xfe\xff")) or text[:4096].count(0) > 0.3 * len(text[:4096]):
        return "UTF-16 (convert it with iconv -f UTF-16 -t UTF-8)"
    if text.decode(errors="replace").count("\ufffd") > 0.1 * len(text):
        return "no UTF-8 (if it is text in another encoding, convert it with iconv -t UTF-8)"
    return None


STARTER_LINE = b"These little stories were made up by main.py. Put your own text in their place.\n\n"

# Rules: names = alternatives. Names joined by / are chosen together: if the animal is a fox, its home is the forest.
STARTER_GRAMMAR = """
name/they/their = Mia/she/her | Lily/she/her | Anna/she/her | Tom/he/his | Ben/he/his | Max/he/his
animal/home/food = fox/forest/berries | bear/cave/honey | mouse/barn/cheese | duck/lake/bread | frog/pond/flies |
    rabbit/meadow/carrots | cat/mill/fish | goat/valley/clover
friend/species = Hugo/owl | Nora/crow | Clara/hen | Bruno/dog | Ida/swan | Otto/toad
thing/deed = key/opened a tiny door | lamp/lit up the whole night | kite/flew above the clouds |
    drum/made everybody dance | bell/rang until all came | boat/took them to an island | map/showed the way home
trait = little | small | young | brave | shy | clever | kind | lazy | curious | cheerful
color = red | blue | green | yellow | golden | silver | white | shiny
where = under the bridge | behind the church | beside the road | in the tall grass | on the hill |
    near the river | in an old house | under a stone
day = day | morning | evening | summer day | rainy day | windy night
opening = Once there was a {trait} {animal} named {name} who lived in the {home}. |
    A {trait} {animal} named {name} loved {food}.
find = One {day} {name} found a {color} {thing} {where}. |
    One {day} {name} saw something {where}. It was a {color} {thing}! |
    One {day} {name} lost {their} {color} {thing}. It was {where}. |
    One {day} {their} {color} {thing} was gone. {name} found it {where}.
use = The {thing} {deed}. | And the {thing} {deed}!
end = {They} went home and ate all the {food}. | "What a day!" said {name}. | {They} told {friend} the {species}. |
    {name} and {friend} the {species} became friends.
story = {opening} {find} {use} {end}
"""


class Story(dict):
    """What each name of the grammar stands for in one story: chosen at its first use, the same from then on."""

    rules = tuple(rule.split(" = ") for rule in STARTER_GRAMMAR.strip().replace("\n    ", " ").split("\n"))

    def __init__(self, choose):
        self.choose = choose  # maps a list to one of its elements

    def __missing__(self, name):
        if name[0].isupper():  # {They} begins a sentence
            return self[name.lower()].capitalize()
        names, alternatives = next(rule for rule in self.rules if name in rule[0].split("/"))
        chosen = self.choose(alternatives.split(" | ")).format_map(self)
        self.update(zip(names.split("/"), chosen.split("/")))
        return self[name]


def starter_corpus():
    """[training, validation] bytes of made-up stories in the manner of TinyStories (arXiv 2305.07759)."""
    random = Random(0)
    choose = lambda options: options[int(random.random() * len(options))]  # random.choice may differ between Pythons
    stories = [Story(choose)["story"] + "\n" for _ in range(5500)]
    return [STARTER_LINE + "\n".join(part).encode() for part in (stories[:5000], stories[5000:])]


def write_starter_corpus(config):
    """Write the starter corpus if there is neither training nor validation text; only to files of the default names."""
    paths = Path("train.txt"), Path("validation.txt")
    is_default = config.train_data_file == "train.txt" and config.validation_data_file in ("auto", "validation.txt")
    if rank() == 0 and is_default and not any(os.path.lexists(path) for path in paths):
        for path, text in zip(paths, starter_corpus()):
            with open(path, "xb") as file:  # x: fails if the file exists
                file.write(text)
            say(f"wrote {path}: {len(text):,} bytes of made-up stories; put your own text in its place")
    over_processes("max", [0])  # the other processes wait for the files


def open_datasets(config, folder="."):
    """The (training, validation) datasets of a run; see CONFIG.validation_data_file. Files that are not here are looked
    for in `folder`, in which the run was started."""
    paths, split = (config.train_data_file, config.validation_data_file), None
    train_file, validation_file = (path if os.path.exists(path) else os.path.join(folder, path) for path in paths)
    if config.validation_data_file == "auto":
        validation_file = Path(train_file).parent / "validation.txt"
        if Path(train_file).name != "train.txt" or not validation_file.exists():
            validation_file, split = train_file, file_size(train_file) * 95 // 100
            say(f"no validation text of its own: the last 5 % of {train_file} are held out for validation")
    validation_set = ByteLevelTextDataset(validation_file, config.max_length, start=split or 0)
    train_set = ByteLevelTextDataset(train_file, config.max_length, stop=split)
    for dataset in (train_set, validation_set):
        if looks_like := what_it_looks_like(dataset.bytes[: 2**20].tobytes()):
            say(f"warning: {dataset.path} looks like {looks_like}; it is used as it is, byte by byte")
    if train_set.identity() == validation_set.identity():
        say(f"warning: {train_file} and {validation_file} are the same text; the bound says nothing new then")
    are_starters = [bytes(d.bytes[: len(STARTER_LINE)]) == STARTER_LINE for d in (train_set, validation_set)]
    if are_starters == [False, True]:
        say(f"warning: {validation_file} is the starter corpus, but {train_file} is not; delete it to hold out 5 %")
    return train_set, validation_set


# === Optimizer ========================================================================================================


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalized update, for matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    torch.optim.Muon works in bf16, one matrix after the other: 22 ms for the default size on a CPU that has bf16, and a
    hundred times as long elsewhere. Here CPUs stay in float32, and matrices of one shape are stacked: 13 ms.
    """

    def __init__(self, matrices, lr, momentum=0.9):
        by_shape = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        super().__init__([{"params": group} for group in by_shape.values()], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices, momentum = group["params"], group["momentum"]
            gradients = torch.stack([matrix.grad for matrix in matrices])  # [N, rows, columns]
            state = self.state[matrices[0]]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradients)
            average = state["momentum_buffer"].lerp_(gradients, 1 - momentum)
            update = orthogonalize(gradients.lerp(average, momentum))  # Nesterov's momentum
            update = update.to(gradients.dtype).contiguous()  # so that a GPU adds all matrices in one kernel
            scale = max(1, gradients.shape[1] / gradients.shape[2]) ** 0.5
            torch._foreach_add_(matrices, list(update), alpha=-group["lr"] * scale)


def orthogonalize(matrices):
    """About U V^T for each matrix U S V^T of the stack [N, rows, columns]: three odd polynomials in the way of Polar
    Express (arXiv 2505.16932) take all singular values from 1 % of the Frobenius norm on to 0.73..1.27."""
    x = matrices.bfloat16() if matrices.is_cuda and has_bf16("cuda") else matrices
    x = x.mT if matrices.shape[1] > matrices.shape[2] else x  # the Gram matrix of the shorter side
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in POLYNOMIALS:  # a x + b x^3 + c x^5
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


POLYNOMIALS = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)


def build_optimizers(model, config):
    """[AdamW, Muon]: Muon for the matrices of the layers, AdamW (arXiv 1711.05101) for embedding, head and vectors; or
    AdamW alone if muon_learning_rate is 0. Weight decay is AdamW's, decoupled and on matrices only."""
    hidden = [module.weight for module in model.layers.modules() if isinstance(module, nn.Linear)]
    matrices = [model.tok_embeddings.weight, model.output.weight] + ([] if config.muon_learning_rate else hidden)
    taken = {id(p) for p in matrices + hidden}
    vectors = [p for p in model.parameters() if id(p) not in taken]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    return [adamw, Muon(hidden, lr=config.muon_learning_rate)] if config.muon_learning_rate else [adamw]


# === Checkpoints ======================================================================================================


class TrainingState:
    """Everything that changes while training. A checkpoint holds it and CONFIG; each step seeds its generators anew."""

    def __init__(self, config, checkpoint=None):
        self.config, self.step, self.minutes, self.best_bound, self.texts = config, 0, 0.0, math.inf, {}
        self.parent, here, is_here = os.getppid(), os.getcwd(), os.path.exists(config.train_data_file)
        self.folder = here if is_here else (checkpoint or {}).get("folder", here)  # in which its texts are
        check_compiler_cache()
        torch.manual_seed(derive_seed(config.seed))  # a CPU's generator knows only the lowest 32 bits of a seed
        self.model = MaskPredictor(config).to(config.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)  # exponential moving average of the weights
        self.optimizers = build_optimizers(self.model, config)
        self.scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.amp_dtype == "fp16")
        if checkpoint:
            self.load_state_dict(checkpoint)

    def know_texts(self, train_set, validation_set):
        """Note which texts the run is about; if they are others than so far there is no best bound to compare with."""
        for name, dataset in (("training", train_set), ("validation", validation_set)):
            identity = dataset.identity()
            if self.texts.get(name, identity) != identity:
                say(f"warning: {dataset.path} is another {name} text than before; best bound and best.pt begin anew")
                self.best_bound = math.inf
            self.texts[name] = identity

    def is_over(self):
        return self.step >= self.config.max_steps or 0 < self.config.max_minutes <= self.minutes

    def state_dict(self):
        parts = {name: getattr(self, name).state_dict() for name in ("model", "ema", "scaler")}
        parts |= {name: getattr(self, name) for name in ("step", "minutes", "best_bound", "texts")}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"config": dataclasses.asdict(self.config), "folder": self.folder, "optimizers": optimizers, **parts}

    def load_state_dict(self, state):
        """Raises InputError if the state is that of another CONFIG."""
        try:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})  # rates are CONFIG's
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.step, self.minutes, self.texts = state["step"], state["minutes"], state.get("texts", {})
            measured = ("validation_bytes", "max_length")
            if all(state["config"][name] == getattr(self.config, name) for name in measured):
                self.best_bound = state["best_bound"]  # else there is nothing to compare it with
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            fits = "the checkpoint does not fit this CONFIG; leave out the flags that change it"
            raise InputError(f"{fits} ({reason})") from None


def save_checkpoint(run_dir, name, state):
    """Write beside, then rename: whenever the process dies there is a whole file, the new one or the one before.
    Returns whether it could be written; if not, one warning, and the file before stays."""
    if rank() != 0:
        return True
    path, temporary = run_dir / name, run_dir / f"{name}.tmp"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)  # somebody may have renamed it
        with open(temporary, "wb") as file:
            torch.save(state.state_dict(), file)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no fsync
                    raise
        for seconds in (0.0, 0.1, 0.5, 2.0):
            time.sleep(seconds)
            with suppress(PermissionError):  # on Windows a virus scanner may hold the file for a moment
                os.replace(temporary, path)
                return True
        raise OSError("another program holds it")
    except (OSError, RuntimeError) as error:  # on a full disk torch.save raises a RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        say(f"warning: {path} cannot be written ({str(error).splitlines()[0]}); the checkpoint before it is untouched")
        return False


def read_checkpoint(path):
    """The dict of a checkpoint file. Raises InputError: it is missing, damaged or something else."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares with the CRC-32 of each record, which torch.load does not
        if damaged:
            raise InputError(f"{damaged} fails its checksum: the file is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)  # weights_only: a pickle cannot run code
        if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
            raise InputError("it holds no CONFIG")
        return state
    except Exception as error:  # noqa: BLE001  damaged files make zipfile and torch.load raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        best = path.with_name("best.pt")
        hint = f"; go on from the best one with --resume {best}" if path.name == "latest.pt" and best.exists() else ""
        raise InputError(f"{path}: not a readable checkpoint ({reason}){hint}") from None


def saved_config(state, **overrides):
    """The CONFIG of a checkpoint. A field that this file no longer has is an InputError, a new one gets its default."""
    unknown = state["config"].keys() - {field.name for field in dataclasses.fields(CONFIG)}
    if unknown:
        raise InputError(f"the checkpoint has fields that CONFIG no longer has: {', '.join(sorted(unknown))}")
    saved, config = state["config"], CONFIG(**{**state["config"], **overrides})
    for name in MODEL_FIELDS:
        value, made_for = getattr(config, name), saved.get(name, getattr(config, name))
        require(value == made_for, name, value, f"{made_for!r}, which the checkpoint's weights were made for")
    is_elsewhere = config.device.split(":")[0] != str(saved.get("device")).split(":")[0]
    if is_elsewhere or config.amp_dtype == "bf16" and not has_bf16(config.device):  # then choose its own precision
        config = CONFIG(**{**saved, "amp_dtype": "auto", **overrides})
    return config


def newest_run(must_exist=True):
    checkpoints = [*Path("runs").glob("*/latest.pt"), *Path("runs").glob("*/best.pt")]
    if must_exist and not checkpoints:
        raise InputError("runs: no run with a checkpoint in it; train one first with: python main.py")
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent if checkpoints else None


def load_checkpoint(path, device="auto"):
    """(model in eval mode with the EMA weights, its CONFIG, the checkpoint's dict). `path` is a checkpoint or a run's
    folder: its best.pt, else latest.pt; `device` need not be the training's. InputError: missing or damaged."""
    path = Path(path)
    if path.is_dir():
        path = path / ("best.pt" if (path / "best.pt").exists() else "latest.pt")
    state = read_checkpoint(path)
    config = saved_config(state, device=device)
    model = MaskPredictor(config).to(config.device).eval().requires_grad_(False)
    try:
        model.load_state_dict(state["ema"])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its weights are not of its CONFIG ({str(error).splitlines()[-1].strip()})") from None
    return model, config, state


# === Logging ==========================================================================================================


def on_terminal():
    return getattr(sys.stdout, "isatty", bool)()  # a notebook's stream may lack it


def say(text):
    """Print a line above the progress bar, on the first process alone."""
    if rank() == 0:
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError:  # a closed pipe, a full disk: the run matters more than what it says
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered must go somewhere
            with suppress(OSError):
                print("warning: the standard output is gone; going on without it", file=sys.stderr)


class Log:
    """What a run reports: to TensorBoard, and to a tqdm bar or, where the output is no terminal, to a line every ten
    seconds. Silent on every process but the first."""

    def __init__(self, state, run_dir):
        try:
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # else it misses CUDA on a CPU
            from torch.utils.tensorboard import SummaryWriter  # imported late: it takes seconds
        except (ImportError, TypeError) as error:  # protobuf raises the latter
            reason = str(error).partition("\n")[0]
            raise InputError(f"tensorboard: {reason}; run: pip install --upgrade -r requirements.txt") from None
        self.state, self.run_dir, self.next_line, self.losses = state, run_dir, 0.0, []
        self.writer = SummaryWriter(run_dir, purge_step=state.step + 1) if rank() == 0 else None
        self.add("text", "settings", as_code("", json.dumps(dataclasses.asdict(state.config), indent=2)))
        is_hidden = rank() != 0 or not on_terminal()
        self.bar = tqdm(
            total=state.config.max_steps, initial=state.step, file=sys.stdout, disable=is_hidden, dynamic_ncols=True
        )
        self.bar.bar_format = "{desc} |{bar}|"  # a narrow terminal cuts the bar, not the text

    def add(self, kind, *values):
        """A scalar, a text or a summary to TensorBoard, as long as its disk is not full."""
        try:
            if self.writer:
                writer = self.writer.file_writer if kind == "summary" else self.writer
                getattr(writer, f"add_{kind}")(*values, self.state.step)
        except OSError as error:
            say(f"warning: TensorBoard's log cannot be written ({error.strerror}); going on without it")
            self.writer = None

    def add_figures(self, prefix, figures):
        for name, (value, _) in figures.items():
            self.add("scalar", prefix + "next_byte_" * (name == "next byte") + "bits_per_byte", value)

    def add_result(self, figures):
        """For TensorBoard's HPARAMS, which sorts runs: the final figures, and the settings that are not the defaults.
        (`add_hparams` would write the list of columns, too, and TensorBoard shows that of one run alone.)"""
        from torch.utils.tensorboard.summary import hparams  # imported late, as SummaryWriter

        config, state = self.state.config, self.state
        self.add_figures("val/final_", figures)
        self.add("scalar", "final/steps", state.step)
        self.add("scalar", "final/minutes", state.minutes)
        defaults = vars(CONFIG(device=config.device)) | {"name": config.name}
        settings = {name: value for name, value in vars(config).items() if value != defaults[name]}
        for summary in hparams(settings, {})[1:]:
            self.add("summary", summary)

    def restart(self):
        """Begin a new interval: time spent before it, as for a validation, is not the training's."""
        self.started, self.first_step = time.perf_counter(), self.state.step

    def close(self):
        self.bar.close()
        with suppress(OSError):
            if self.writer:
                self.writer.close()

    def step(self, loss, norm):
        """Report a step from its loss and gradient norm, scalars on the device. TrainingError: they are not finite."""
        config, step = self.state.config, self.state.step
        loss, norm = loss.item(), norm.item()  # waits for the device
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.state.scaler.is_enabled()):
            found = f"step {step:,}: the loss is {loss:.3g}, the norm of the gradient {norm:.3g}; the checkpoints hold "
            hint = "lower --learning_rate and --muon_learning_rate, or use --amp_dtype fp32"
            raise TrainingError(found + "the last good weights; " + hint)
        seconds, steps = time.perf_counter() - self.started, step - self.first_step
        bytes_per_second = steps * bytes_per_step(config) / seconds
        rate = self.state.optimizers[0].param_groups[0]["lr"]
        left = (config.max_steps - step) * seconds / steps
        left = min(left, max(0, 60 * (config.max_minutes - self.state.minutes))) if config.max_minutes else left
        loss, self.losses = torch.stack(self.losses).mean().item(), []
        scalars = {"loss": loss, "learning_rate": rate, "bytes_per_second": bytes_per_second, "gradient_norm": norm}
        for name, value in scalars.items():
            self.add("scalar", f"train/{name}", value)
        text = f"step {step:,}/{config.max_steps:,}  loss {loss:.3f}  lr {rate:.1e}  "
        text += f"{bytes_per_second:,.0f} bytes/s  {tqdm.format_interval(left)} left"
        self.bar.update(step - self.bar.n)
        self.bar.set_description_str(text)
        if self.bar.disable and time.perf_counter() >= self.next_line:
            say(text)
            self.next_line = time.perf_counter() + 10
        self.restart()


def bytes_per_step(config):
    return config.batch_size * config.max_length * config.gradient_accumulation_steps * world_size()


def announce(state, train_set, validation_set, run_dir):
    config = state.config
    parameters = sum(p.numel() for p in state.model.parameters())
    epochs = config.max_steps * bytes_per_step(config) / len(train_set.bytes)
    gpu = f" ({torch.cuda.get_device_name(config.device)})" if config.device.startswith("cuda") else ""
    end = f"or {config.max_minutes:g} minutes" if config.max_minutes else f"{epochs:.1f} times the training text"
    say(f"device      {config.device}{gpu}, {config.amp_dtype}, {world_size()} process(es), torch {torch.__version__}")
    say(f"model       {parameters:,} parameters, {config.max_length} bytes of context")
    say(f"training    {train_set.path}, {len(train_set.bytes):,} bytes")
    say(f"validation  {validation_set.path}, {len(validation_set.bytes):,} bytes")
    say(f"steps       {state.step:,} to {config.max_steps:,} of {bytes_per_step(config):,} bytes, {end}")
    if rank() == 0:
        say(f"watch       tensorboard --logdir={run_dir.parent.resolve()}  (this run: {run_dir.name})")


def check_writable(path):
    """Raises InputError if this folder, or the one in which it would be made, does not let files be made in it."""
    folder = next(parent for parent in (path, *path.resolve().parents) if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        why = "is no folder" if not folder.is_dir() else "does not let you write"
        raise InputError(f"{path}: cannot be written, as {folder} {why}; change that, or start in another folder")


def make_run_dir(config):
    if rank() != 0:
        return None
    run_dir = Path("runs") / f"{config.name}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    run_dir.parent.mkdir(exist_ok=True)
    while True:
        try:
            run_dir.mkdir()
            return run_dir
        except FileExistsError:  # begun within the same second, perhaps by another process
            run_dir = run_dir.with_name(run_dir.name + "_2")


def claim_run(run_dir, config):
    """Write config.json, and keep it locked: no other process may go on with the same run. Returns the open file."""
    file = open(run_dir / "config.json", "a", encoding="utf-8")  # noqa: SIM115
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{run_dir}: another process is training this run; wait for its end, or end it") from None
    except (ImportError, OSError):  # Windows and some network file systems have no locks
        pass
    file.truncate(0)
    file.write(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    file.flush()
    return file


def as_code(title, text):
    return f"{title}\n\n" + "".join(f"    {line}\n" for line in text.splitlines()) + "\n"


def show_masks(tokens):
    return printable(b"".join("·".encode() if token == MASK else bytes([token]) for token in tokens if token != PAD))


def printable(text):
    """Bytes as a terminal may show them: what could move its cursor or turn the direction of text becomes U+FFFD."""
    text = text.decode(errors="replace").replace("\r", "")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", text)


def watch(x):
    """Draws the sequences x [N, L] on the terminal, in place of those before, masks as dots."""
    if on_terminal():
        print("\x1b[H\x1b[2J" + "\n".join(map(show_masks, x.tolist())), flush=True)


# === Devices and processes ============================================================================================

AMP_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def has_bf16(device):
    """Whether the device computes in bf16; elsewhere that is emulated, on a CPU a hundred times slower."""
    if device == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 or newer
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(config):
    dtype = AMP_DTYPES[config.amp_dtype]
    return torch.autocast(torch.device(config.device).type, dtype, enabled=dtype != torch.float32)


def compile_loss(model, state):
    """`masked_diffusion_loss` as one compiled graph, masks and cross-entropy included; tried on one batch.
    Where it fails (no C++ compiler, Windows) one warning, and the function itself."""
    config = state.config
    if not config.compile or config.device == "mps":  # compiling for Apple's GPUs is a prototype, at times wrong
        return masked_diffusion_loss
    say("compiling the model, which takes a minute or two ...")
    failure = None
    try:
        compiled = torch.compile(masked_diffusion_loss, dynamic=False)
        with warnings.catch_warnings(), model.no_sync() if dist.is_initialized() else nullcontext():
            warnings.filterwarnings("ignore", message="TensorFloat32")  # advice, no error
            x0 = torch.zeros(config.batch_size, config.max_length, dtype=torch.int64, device=config.device)
            t, noise, place = draw_step(state)
            with autocast(config):
                loss = compiled(model, x0, t[: len(x0)], noise[: len(x0)], place, config.next_byte_weight)
            loss.backward()
    except Exception as error:  # noqa: BLE001  whatever went wrong inside the compiler, training works without it
        failure = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    model.zero_grad()
    if not over_processes("max", [failure is not None]).item():
        return compiled
    say(f"warning: torch.compile does not work here ({failure or 'another process'}); going on without it, slower")
    return masked_diffusion_loss


def check_compiler_cache():
    """torch imports its compiler with its first optimizer, and fails there if it cannot make its cache folder."""
    try:
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        print(f"warning: torch.compile does not work here ({error}); going on without it", file=sys.stderr)
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": os.getcwd(), "TORCH_COMPILE_DISABLE": "1"}


def claim_gpu(config):
    """Makes config.device, if it is a GPU, the one that torch takes by default; in a torchrun one for each process."""
    if config.device.startswith("cuda"):
        if is_distributed():
            number, found = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
            require(number < found, "nproc_per_node", number + 1, f"at most {found}, the GPUs of this machine")
            config.device = f"cuda:{number}"
        torch.cuda.set_device(torch.device(config.device).index or 0)


@contextmanager
def distributed_run(config):
    """Joins the processes of a torchrun; a plain `python main.py` passes through."""
    claim_gpu(config)
    if not is_distributed():
        yield
        return
    on_cuda, has_failed = config.device.startswith("cuda"), True
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    try:
        yield
        has_failed = False
    finally:
        if not (on_cuda and has_failed):  # NCCL would wait for the other processes, which wait for this one
            gc.collect()  # DDP's threads must not outlive the process group: else one run in thirty aborted at its exit
            dist.destroy_process_group()


@contextmanager
def stop_signals():
    """A list that receives SIGINT, SIGTERM, SIGHUP (a closed terminal) or SIGUSR1 (a scheduler's limit is near), to end
    in order; a second ends it at once."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
    numbers = numbers if threading.current_thread() is threading.main_thread() else []  # others may not ask for them
    heeded = [number for number in numbers if signal.getsignal(number) not in (None, signal.SIG_IGN)]  # else: nohup
    before = {number: signal.signal(number, receive) for number in heeded}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_parallel(model):
    """The model, or among several processes PyTorch's wrapper that averages its gradients over them."""
    if not dist.is_initialized():
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.13 has a new name for broadcast_buffers
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def is_distributed():
    """Whether torchrun started this process; a RANK alone may be left over from anything."""
    return all(os.environ.get(name, "").isdecimal() for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))


def rank():
    return int(os.environ["RANK"]) if is_distributed() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def over_processes(operation, numbers):
    """Each number's "max" or "sum" over all processes, float64: so they decide alike, and wait for each other."""
    numbers = torch.as_tensor(numbers, dtype=torch.double)
    if dist.is_initialized():
        dist.all_reduce(numbers, getattr(dist.ReduceOp, operation.upper()))
    return numbers


# === Profile ==========================================================================================================


def count_flops(function):
    from torch.nn.attention import SDPBackend, sdpa_kernel  # imported late: no other command needs them
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # a CPU's kernel is not counted
        function()
    return counter.get_total_flops()


def time_components(step, device):
    """{component: [forward, backward] in seconds} of one call of step, a function, without torch.compile; and the
    profiler. An operator counts for the innermost component in which it was called, or whose gradient it computes."""
    functions = [
        ("data", ByteLevelTextDataset, "random_crops"),
        ("masks", sys.modules[__name__], "draw_step"),
        ("masks", sys.modules[__name__], "mask_bytes"),
        ("layout", MaskPredictor, "layout"),
        ("embedding", nn.Embedding, "forward"),
        ("convolution", DepthwiseConvolution, "forward"),
        ("attention", Attention, "forward"),
        ("feed-forward", FeedForward, "forward"),
        ("norms", RMSNorm, "forward"),
        ("head and loss", sys.modules[__name__], "masked_diffusion_loss"),  # but for the components called in it
        ("clipping", nn.utils, "clip_grad_norm_"),
        ("Muon", Muon, "step"),
        ("AdamW", torch.optim.AdamW, "step"),
        ("EMA", torch, "_foreach_lerp_"),
    ]
    seconds, maker = {name: [0.0, 0.0] for name, *_ in functions} | {"rest": [0.0, 0.0]}, {}
    with ExitStack() as stack:
        for name, owner, function in functions:
            named = torch.profiler.record_function(name)(getattr(owner, function))
            stack.enter_context(mock.patch.object(owner, function, named))
        step()  # warms up
        with torch.profiler.profile() as profiler:
            step()
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        root = event
        while root and root.name not in seconds and "evaluate_function" not in root.name:
            root = root.cpu_parent
        is_backward = root is not None and root.name not in seconds
        name = maker.get(root.sequence_nr, "rest") if is_backward else root.name if root else "rest"
        if not is_backward:
            maker[event.sequence_nr] = name  # of the node of autograd's graph with this number
        took = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        seconds[name][is_backward] += took / 1e6
    return seconds, profiler


def profile_command(argv):
    """Print the speed of training, its fraction of the rate of a large matrix product, and where the time goes, by
    PyTorch's profiler, whose trace is written. Returns 0."""
    from torch.utils.benchmark import Timer

    parser = OneLineParser("profile", "How fast a training step is, and where its time goes.")
    add_config_flags(parser)
    config = CONFIG(**vars(parser.parse_args(argv)))
    if is_distributed():
        raise InputError("profile measures one process; run it without torchrun")
    claim_gpu(config)
    check_writable(Path("runs"))
    write_starter_corpus(config)
    train_set, _ = open_datasets(config)
    state, on_cuda = TrainingState(config), config.device.startswith("cuda")
    num_bytes, size = bytes_per_step(config), 8192 if on_cuda else 1024
    matrix = torch.randn(size, size, device=config.device, dtype=AMP_DTYPES[config.amp_dtype])
    compiled = compile_loss(state.model, state)
    tasks = {"as trained": lambda: train_step(state, state.model, compiled, train_set)}
    tasks["not compiled"] = lambda: train_step(state, state.model, masked_diffusion_loss, train_set)
    tasks["product"] = lambda: matrix @ matrix
    timers = [Timer("task()", globals={"task": task}, num_threads=torch.get_num_threads()) for task in tasks.values()]
    times = [[timer.timeit(1).mean for timer in timers] for _ in range(25)][5:]  # in turn; the first five warm up
    seconds = dict(zip(tasks, np.median(times, axis=0)))
    x0 = torch.zeros(num_bytes // config.max_length, config.max_length, dtype=torch.int64, device=config.device)
    flops = count_flops(lambda: masked_diffusion_loss(state.model, x0).backward())  # without the optimizer's
    state.model.zero_grad()
    ceiling = 2 * size**3 / seconds["product"]
    print(f"{config.device} {config.amp_dtype}, {config.num_layers} x {config.model_dim}, {num_bytes:,} bytes per step")
    rate = flops / seconds["as trained"]
    print(f"{num_bytes / seconds['as trained']:,.0f} bytes/s, {rate / 1e9:,.1f} GFLOP/s, ", end="")
    print(f"{rate / ceiling:.0%} of {ceiling / 1e9:,.1f} of a large product")
    for kind in ("as trained", "not compiled"):
        print(f"{seconds[kind] * 1e3:8,.1f} ms per step, {kind} (median of 20, in turn)")
    parts, profiler = time_components(tasks["not compiled"], config.device)
    total = sum(map(sum, parts.values()))
    print(f"\n{'one step, not compiled':<24}{'forward ms':>12}{'backward ms':>13}{'share':>8}")
    for name, (forward, backward) in parts.items():
        print(f"{name:<24}{forward * 1e3:12.2f}{backward * 1e3:13.2f}{(forward + backward) / total:8.1%}")
    run_dir = make_run_dir(dataclasses.replace(config, name=f"profile_{config.name}"))
    profiler.export_chrome_trace(str(run_dir / "trace.json"))
    print(f"\ntrace   {run_dir / 'trace.json'} (open it in ui.perfetto.dev)")
    return 0


# === Checks of CONFIG =================================================================================================


def resolve_defaults(config):
    """Puts in what depends on the device: the device itself, the fields of `by_size`, the precision."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # not so if the driver is too old
    devices = ["cuda"] * (num_gpus > 0) + [f"cuda:{number}" for number in range(num_gpus)]
    devices += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    accepted = "auto or what torch finds here: " + ", ".join(devices)
    require(config.device in ("auto", *devices), "device", config.device, accepted)
    config.device = devices[0] if config.device == "auto" else config.device
    for field in dataclasses.fields(config):
        value, expected = getattr(config, field.name), field.type
        if value is None and field.metadata:
            value = field.metadata["cpu" if config.device == "cpu" else "gpu"]
        if expected is float and type(value) is int and abs(value) < 2**63:  # no other type is converted
            value = float(value)
        fits = type(value) is expected and (expected is not float or math.isfinite(value))
        require(fits, field.name, value, "a finite number" if expected is float else f"of type {expected.__name__}")
        setattr(config, field.name, value)
    if config.amp_dtype == "auto":
        on_cuda = config.device.startswith("cuda")
        config.amp_dtype = "bf16" if has_bf16(config.device) else "fp16" if on_cuda else "fp32"


STRATEGIES = ("low_confidence", "random")
MODEL_FIELDS = ["model_dim", "num_layers", "num_heads", "kv_latent_dim", "ffn_dim", "conv_width", "block_length"]
MODEL_FIELDS += ["attention", "qk_rope_head_dim", "rope_theta"]
SAMPLING = ["block_length", "remasking", "inference_steps", "temperature", "top_p"]
MAY_BE_ZERO = "dropout block_length next_byte_weight hole_share conv_width mask_ratio_std muon_learning_rate "
MAY_BE_ZERO += "weight_decay warmup_steps ema_decay max_minutes inference_steps temperature num_samples seed"


def check_config(c):
    for name, value in vars(c).items():
        if type(value) in (int, float):
            may_be_zero, most = name in MAY_BE_ZERO.split(), 2**63 - 1 if name == "seed" else 10**9
            require(value > 0 or value == 0 and may_be_zero, name, value, "0 or more" if may_be_zero else "above 0")
            require(value <= most, name, value, f"at most {most:,}")
    for name, values in {"attention": ATTENTIONS, "remasking": STRATEGIES, "amp_dtype": AMP_DTYPES}.items():
        require(getattr(c, name) in values, name, getattr(c, name), "one of " + ", ".join(values))
    D, H, R = c.model_dim, c.num_heads, c.qk_rope_head_dim
    require(D % (2 * H) == 0, "num_heads", H, f"so that model_dim={D} / num_heads is even")
    fits = c.attention != "mla" or R % 2 == 0 and R < D // H
    require(fits, "qk_rope_head_dim", R, f"even, and below model_dim={D} / num_heads={H}")
    longest = c.rope_max_length_buffer
    require(c.max_length <= longest, "max_length", c.max_length, f"at most rope_max_length_buffer={longest}")
    require(c.conv_width % 2 or not c.conv_width, "conv_width", c.conv_width, "odd, to be centred, or 0")
    require(c.dropout < 1, "dropout", c.dropout, "at least 0 and below 1")
    require(c.ema_decay < 1, "ema_decay", c.ema_decay, "at least 0 and below 1")
    require(c.hole_share <= 1, "hole_share", c.hole_share, "at most 1")
    require(c.top_p <= 1, "top_p", c.top_p, "above 0 and at most 1")
    require(not 0 < c.temperature < 1e-3, "temperature", c.temperature, "0, or at least 0.001")
    is_name = re.fullmatch(r"[^/\\]+", c.name) and c.name.isprintable()
    require(is_name, "name", c.name, "a plain folder name without slashes")


def check_sampling(model, config, response_length=0, seed=0, texts=(), ends=()):
    """InputError: the model was not trained for what is asked of it, or would ignore a setting, or a number is none."""
    require(seed >= 0, "seed", seed, "0 or more")
    require(response_length >= 0, "response_length", response_length, "0 or more")
    own, n, limit = block_length_of(model), config.block_length, config.rope_max_length_buffer
    has_holes, longest = any(MASK in text[:end] for text, end in zip(texts, ends)), max(map(len, texts), default=0)
    accepted = "0, or above 1 with a hole_share above 0, in the training, to fill holes with text after them"
    require(model.fills_holes or not has_holes, "block_length", own, accepted)
    if not own:
        if longest > limit:  # in blocks a window slides over the text
            found = f"prompt, response_length and suffix, {longest} bytes, exceed rope_max_length_buffer={limit}"
            raise InputError(found + "; shorten one of them")
        return
    accepted = "1, as in the training" if own == 1 else "1 to 64 in blocks"
    require(n == 1 if own == 1 else 0 < n <= 64, "block_length", n, accepted)
    for name in ("remasking", "inference_steps"):
        value, default = getattr(config, name), CONFIG.__dataclass_fields__[name].default
        require(value == default, name, value, f"{default!r}, but for models that were trained with block_length=0")


def require(condition, name, value, accepted):
    if not condition:
        raise InputError(f"{name}={value!r} is not possible: it must be {accepted}")


# === Command line =====================================================================================================


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line."""

    def __init__(self, command, description=""):
        super().__init__(f"main.py {command}", description=description, allow_abbrev=False)

    def parse_args(self, argv):
        with_hyphens = r"^--[a-z]+(-[a-z]+)+(?==|$)"  # --max-steps is --max_steps
        return super().parse_args([re.sub(with_hyphens, lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv])

    def error(self, message):
        dash = re.match("argument (--[a-z_]+).*: expected one argument", message)
        hint = f"a value that begins with - is written {dash[1]}=-..." if dash else "see --help"
        raise InputError(f"{message}; {hint}")


def parse_bool(text):
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def add_config_flags(parser, only=None):
    """One flag for each field of CONFIG, explained by the comment behind the field."""
    source = Path(__file__).read_text("utf-8") if "__file__" in globals() else ""  # not so if a notebook ran it
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    for field in dataclasses.fields(CONFIG):
        if only is None or field.name in only:
            default = "{cpu} on a CPU, {gpu} on a GPU".format(**field.metadata) if field.metadata else field.default
            default = default if only is None or field.name == "device" else "that of the run"
            about = f"{comments.get(field.name, '')} (default: {default})".replace("%", "%%")
            kind = os.path.expanduser if field.name.endswith("_file") else field.type
            options = {"type": kind, "metavar": field.type.__name__.upper(), "help": about}
            if field.type is bool:  # --compile, --compile false
                options |= {"type": parse_bool, "nargs": "?", "const": True}
            parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **options)  # only given flags override


def train_command(argv):
    parser = OneLineParser("[train]", "Train. Other commands: generate, evaluate, profile")
    about = "go on with this run (folder or checkpoint); auto: the newest, or a new one if there is none"
    parser.add_argument("--resume", metavar="RUN", nargs="?", const="auto", type=os.path.expanduser, help=about)
    add_config_flags(parser)
    overrides = vars(parser.parse_args(argv))
    run_dir, checkpoint = overrides.pop("resume"), None
    if run_dir == "auto" and (run_dir := newest_run(must_exist=False)) is None:
        say("no run to go on with: a new one begins")
    if run_dir is not None:
        path = Path(run_dir)
        names = [name for name in ("latest.pt", "best.pt") if (path / name).exists()] or ["latest.pt"]
        path = path / names[0] if path.is_dir() else path
        checkpoint = read_checkpoint(path)
        run_dir = path.parent if (path.parent / "config.json").exists() else None  # else it is alone: a new folder
        say(f"going on with {path}")
    config = saved_config(checkpoint, **overrides) if checkpoint else CONFIG(**overrides)
    with distributed_run(config):
        return train(config, run_dir, checkpoint)


def load_for_command(parser, fields, argv):
    """The arguments, the model of --checkpoint, its CONFIG with the flags put into it, the path and the checkpoint."""
    about = "a checkpoint or a run's folder (default: the newest run)"
    parser.add_argument("--checkpoint", metavar="PATH", type=os.path.expanduser, help=about)
    add_config_flags(parser, fields)
    arguments = parser.parse_args(argv)
    path = newest_run() if arguments.checkpoint is None else Path(arguments.checkpoint)
    model, config, state = load_checkpoint(path, getattr(arguments, "device", "auto"))
    overrides = {name: value for name, value in vars(arguments).items() if name in fields}
    return arguments, model, dataclasses.replace(config, **overrides), path, state


def generate_command(argv):
    fields = [*SAMPLING, "seed", "device"]
    parser = OneLineParser("generate", "Write text after a prompt, before a suffix, or into holes.")
    about = r"text to continue; {12} is a hole of 12 bytes, {2-12} one of 2 to 12, whichever fits; {{ }} \n \t \\ are "
    about += r"braces, a line's end, a tab and a backslash; - reads the standard input, which is taken as it is "
    parser.add_argument("--prompt", help=about + "(default: what follows an empty line)")
    parser.add_argument("--suffix", default="", help="text to lead up to, which may have holes, too")
    parser.add_argument("--response_length", type=int, help="bytes to write (default: up to max_length; 0 with holes)")
    parser.add_argument("--until", help=r"end with this text, such as \n (default: \n\n if there is no prompt)")
    parser.add_argument("--samples", type=int, default=1, help="how many: seeds from --seed on, or the best fillings")
    parser.add_argument("--watch", action="store_true", help="show the text emerge, pass by pass, in a terminal")
    arguments, model, config, path, state = load_for_command(parser, fields, argv)
    require(0 < arguments.samples <= 4096, "samples", arguments.samples, "1 to 4096")
    is_free, length = arguments.prompt is None and not arguments.suffix, arguments.response_length
    until = "\n\n" if arguments.until is None and is_free and length != 0 else unescape(arguments.until or "")
    prompt = "\n\n" if arguments.prompt is None else arguments.prompt
    if prompt == "-":
        prompts = [[*open(0, "rb", closefd=False).read()]]  # noqa: SIM115
    else:
        prompts = holes_to_masks(prompt)
    suffixes, on_step = holes_to_masks(arguments.suffix, "suffix"), watch if arguments.watch else None
    given = prompts[-1] + suffixes[-1]
    if length is None:
        length = 0 if MASK in given else config.max_length - len(given)
        accepted = f"below max_length={config.max_length}, or give --response_length"
        require(length > 0 or MASK in given, "prompt", f"{len(given)} bytes", accepted)
    require(length >= 0, "response_length", length, "0 or more")
    accepted = "without one of unknown length where the prompt has one"
    require(len(prompts) == 1 or len(suffixes) == 1, "suffix", arguments.suffix, accepted)
    texts = [prompt + [MASK] * length + suffix for prompt in prompts for suffix in suffixes]
    ends_open, is_filled = texts[0][-1:] == [MASK], len(texts) > 1
    require(ends_open or not until, "until", until, "left out where the text's end is given: it ends what follows")
    texts = best_fillings(model, texts, config, arguments.samples) if is_filled else texts * arguments.samples
    texts = texts[: arguments.samples]
    if len(texts) < arguments.samples:
        print(f"notice: {len(texts)} different fillings were drawn; --temperature 2 varies more", file=sys.stderr)
    samples = run_conditional_diffusion_inference(model, texts, 0, config, until=os.fsencode(until), on_step=on_step)
    for number, text in enumerate(samples):
        text = text.removeprefix("\n\n").removesuffix("\n\n") if is_free else text.removesuffix("\ufffd")  # half
        if arguments.samples > 1:
            print(f"--- filling {number + 1}" if is_filled else f"--- seed {config.seed + number}")
        print(printable(text.encode()) if on_terminal() else text)
    print(f"({path}, step {state.get('step', 0):,})", file=sys.stderr)
    return 0


ESCAPES = {"{{": "{", "}}": "}", r"\n": "\n", r"\t": "\t", r"\\": "\\"}
HOLE = r"\{([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?\}|(\{[\d ,.:_-]*\d[\d ,.:_-]*\})"  # the second: what looks like one


def unescape(text):
    return re.sub(r"\\[nt\\]", lambda match: ESCAPES[match[0]], text)


def holes_to_masks(text, name="prompt"):
    """Texts as lists of tokens: a{3}b becomes [[97, MASK, MASK, MASK, 98]], and a hole of unknown length, {2-12}, one
    text for each of its lengths; {{ }} \\n \\t \\\\ become what they stand for."""
    texts = [[]]
    for match in re.finditer(r"\{\{|\}\}|\\[nt\\]|" + HOLE + "|.", text, re.DOTALL):
        shortest, longest, wrong = match.groups()
        lengths = range(int(shortest or 0), int(longest or shortest or 0) + 1)
        accepted = "{4}, a hole of 4 bytes, or {2-12}, one of 2 to 12; for these characters themselves write {{ for {"
        require(lengths and not wrong, name, match[0], accepted)
        accepted = "the only hole of unknown length, and of at most 64 lengths"
        require(len(lengths) == 1 or len(texts) == 1 and len(lengths) <= 64, name, match[0], accepted)
        literal = [] if shortest else [*os.fsencode(ESCAPES.get(match[0], match[0]))]
        texts = [tokens + literal + [MASK] * length for tokens in texts for length in lengths]
    return texts


def best_fillings(model, texts, config, number, candidates=16):
    """The texts, lists of tokens, one for each length of a hole, with their holes filled; different ones, the best
    first. Each is filled 16 times or as often as `number` says, with the seeds from config.seed on. The best is the one
    whose hole and what is given after it are most probable together, written from left to right: a probability among
    texts of all lengths."""
    tails = {next((i for i, token in enumerate(text[::-1]) if token != MASK), len(text)) for text in texts}
    require(len(tails) == 1, "prompt", "a hole of unknown length", "followed by text, which tells its length")
    bits, candidates, tail = {}, max(candidates, number), tails.pop()
    work = f"{len(texts)} lengths of up to {len(texts[-1])} bytes, each filled {candidates} times"
    require(len(texts) * len(texts[-1]) * candidates <= 2**20, "prompt", work, "at most 1,048,576 bytes in all")
    print(f"filling {work}; the most probable stay", file=sys.stderr)
    for text in texts[::-1]:  # the longest first: if that does not fit nothing has been computed in vain
        rows = write_many(model, [text[: len(text) - tail]] * candidates, config, config.seed)
        costs = exact_likelihood(model, rows)[:, text.index(MASK) :].sum(dim=1).tolist()
        bits |= {(*row, *[MASK] * tail): cost for row, cost in zip(rows.tolist(), costs)}
    return [list(text) for text in sorted(bits, key=bits.get)]


def evaluate_command(argv):
    fields = [*SAMPLING, "train_data_file", "validation_data_file", "max_length", "device"]
    parser = OneLineParser("evaluate", "Likelihoods, infilling and samples of a model, with their errors.")
    parser.add_argument("--file", metavar="TEXT", type=os.path.expanduser, help="another text to evaluate on")
    parser.add_argument("--chunks", type=int, default=16, help="chunks, holes and samples of each figure but the bound")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--seed", type=int, default=0, help="of masks and samples (default: 0)")
    arguments, model, config, path, state = load_for_command(parser, fields, argv)
    require(1 < arguments.chunks <= 4096, "chunks", arguments.chunks, "2 to 4096")
    require(0 <= arguments.seed < 2**63, "seed", arguments.seed, "0 to 2^63 - 1")
    training_text = None
    with redirect_stdout(sys.stderr):  # notices; the standard output is for the figures
        dataset = None if arguments.file is None else ByteLevelTextDataset(arguments.file, config.max_length)
        try:
            train_set, own_dataset = open_datasets(config, state.get("folder", "."))
            training_text = train_set.bytes[: 2**24].tobytes()  # samples are compared with so much of it
            if state.get("texts", {}).get("training", train_set.identity()) != train_set.identity():
                say(f"warning: {train_set.path} is not the text that this model was trained on")
        except InputError as error:
            if arguments.file is None:
                raise InputError(f"{error} (sought here and in {state.get('folder')}), or give --file TEXT") from None
            say(f"notice: {error}; known words and copied text cannot be told without the training text")
        dataset = dataset or own_dataset
    rows = evaluate(model, config, dataset, training_text, arguments.chunks, arguments.seed)
    print(json.dumps(rows, indent=2) if arguments.json else as_table(rows))
    print(f"({path}, step {state.get('step', 0):,}, {dataset.path}, {len(dataset.bytes):,} bytes)", file=sys.stderr)
    return 0


COMMANDS = {"train": train_command, "generate": generate_command, "evaluate": evaluate_command}
COMMANDS["profile"] = profile_command


def main(argv=None):
    """Run the command line `argv` (default: sys.argv). Returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  the shell's >&- closes it
    if hasattr(sys.stdout, "reconfigure"):  # not so in a notebook
        is_console = on_terminal()  # one that is not UTF-8 shows what it can; a file or pipe loses nothing
        sys.stdout.reconfigure(encoding=None if is_console else "utf-8", errors="replace")
    command, rest = (COMMANDS[argv[0]], argv[1:]) if argv and argv[0] in COMMANDS else (train_command, argv)
    try:
        code = command(rest)
        sys.stdout.flush()  # while a full disk or a closed pipe can still be told
        return code
    except BrokenPipeError:  # nobody reads on: silence, as of cat
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered must go somewhere
        return 141  # 128 + SIGPIPE
    except (InputError, TrainingError, OSError, dist.DistError) as error:
        print("error:", *str(error).splitlines(), file=sys.stderr)  # one line, whatever was typed
        return 2 if isinstance(error, InputError) else 1
    except (RuntimeError, MemoryError) as error:  # torch has no kinds of errors for these on a CPU
        reason = str(error).partition("\n")[0]
        is_memory = isinstance(error, MemoryError) or re.search("out of memory|allocate memory|Storage size", reason)
        if not is_memory and not (is_distributed() and "by peer" in reason):
            raise
        lower = "--samples or --response_length" if command is generate_command else "--chunks or --max_length"
        lower = lower if command in (generate_command, evaluate_command) else "batch_size or max_length"
        what = f"out of memory; lower {lower}" if is_memory else "another process is gone; use --resume"
        print(f"error: {what} ({reason})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before or after the training loop, which catches the signal itself
        return 130


if __name__ == "__main__":
    sys.exit(main())
