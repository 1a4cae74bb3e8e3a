"""Train a masked diffusion language model on raw bytes and watch it learn: one file, to be read from top to bottom.

    python main.py                                        train on train.txt, validate on validation.txt
    tensorboard --logdir=runs                             watch the run
    python main.py --model_dim 256 --max_steps 5000       every field of CONFIG is a flag
    python main.py --resume auto                          go on with the newest run
    python main.py generate --prompt "ROMEO:" --watch     sample from the newest run and see the text crystallize
    python main.py evaluate                               how good the newest run is, in many figures
    python main.py profile                                where the time of a training step goes
    torchrun --nproc_per_node=8 main.py                   the same training on eight GPUs

The idea: hide k of the L bytes of a text behind a MASK, let a bidirectional transformer predict all of them at once,
and train it for every k from 1 to L. Such a model writes by starting from nothing but MASK and uncovering it, surest
bytes first.

Shapes: B sequences, L bytes each, D model_dim, H heads of d = D / H, R kv_latent_dim, 256 byte values.

LLaDA  arXiv 2502.09992   the recipe: masked diffusion with a plain transformer, and its sampler
MDLM   arXiv 2406.07524   the same objective, derived as a continuous-time evidence bound
MD4    arXiv 2406.04329   the same objective, derived as a weighted integral of cross-entropies
"""

import argparse
import copy
import dataclasses
import difflib
import gc
import itertools
import json
import math
import mmap
import os
import re
import signal
import sys
import time
import zipfile
from contextlib import closing, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn import RMSNorm  # x / sqrt(mean(x^2) + eps) * weight
from torch.profiler import record_function
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

PAD, MASK, UNK = 256, 257, 258  # input embedding alone: the output has 256 rows. UNK is free, all bytes are known
NUM_BYTES, NUM_TOKENS = 256, 259
BITS_PER_NAT = 1 / math.log(2)


class InputError(ValueError):
    """Something the user can put right. `main` prints it as one line and exits with code 2, without a traceback."""


class TrainingError(RuntimeError):
    """Training cannot go on. `main` prints it as one line and exits with code 1."""


# === CONFIG: edit a default here, or give the flag of the same name ===================================================


def by_size(cpu, gpu):
    """A field with two defaults: one for training on a CPU, one for a GPU."""
    return dataclasses.field(default=None, metadata={"cpu": cpu, "gpu": gpu})


@dataclass
class CONFIG:
    """All settings of a run, checked on creation: an InputError names the field, its value and what it accepts."""

    # The two default sizes: 0.8 M parameters for ten minutes on a laptop, 10.8 M for a GPU
    model_dim: int = by_size(cpu=128, gpu=384)  # [D] width of the residual stream
    num_layers: int = by_size(cpu=4, gpu=6)  # transformer blocks
    num_heads: int = by_size(cpu=4, gpu=6)  # [H] attention heads; model_dim / num_heads must be even for RoPE
    kv_latent_dim: int = by_size(cpu=64, gpu=256)  # [R] latent of keys and values (kv_lora_rank); not of mha
    qk_nope_head_dim: int = by_size(cpu=24, gpu=48)  # of mla: part of a head's query and key that RoPE leaves
    qk_rope_head_dim: int = by_size(cpu=8, gpu=16)  # of mla: part that it turns, even; all heads share its key
    v_head_dim: int = by_size(cpu=32, gpu=64)  # of mla: width of a head's value
    ffn_dim: int = by_size(cpu=352, gpu=1024)  # hidden width of the feed-forward network, usually 8/3 of model_dim
    max_length: int = by_size(cpu=128, gpu=256)  # [L] bytes of context
    batch_size: int = by_size(cpu=16, gpu=64)  # [B] sequences per process and micro-batch
    learning_rate: float = by_size(cpu=3e-2, gpu=1e-2)  # peak, after the warm-up, of AdamW
    max_steps: int = by_size(cpu=4000, gpu=10000)  # optimizer steps of the whole run
    ema_decay: float = by_size(cpu=0.99, gpu=0.999)  # of the averaged weights that are evaluated and sampled from
    dropout: float = by_size(cpu=0.0, gpu=0.1)  # after each attention and feed-forward; many epochs need some
    validation_bytes: int = by_size(cpu=32768, gpu=524288)  # at most this much of the validation text each time

    # Data
    train_data_file: str = "train.txt"  # training text, any bytes; without both files a starter corpus is written
    validation_data_file: str = "validation.txt"  # without it the last 5 % of the training text are held out
    random_length_prob: float = 0.01  # share of steps on shorter sequences, so that the model knows short texts too
    num_workers: int = 0  # DataLoader processes; 0 reads in the training process, fast enough from a local disk

    # Model
    attention: str = "simplified_mla"  # or mla, as in DeepSeek-V2, or mha, ordinary multi-head attention
    q_lora_rank: int = 0  # of mla: latent from which the queries come; 0: direct
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_max_length_buffer: int = 4096  # longest sequence, in bytes, that the rotary table covers

    # Not in the papers: what makes the model learn faster (README, Results); 0 switches each off
    conv_width: int = 9  # bytes, odd: depthwise convolution before each block
    mask_ratio_std: float = 0.1  # training draws the share of masks from a normal around 1/2; 0: uniform, the bound
    muon_learning_rate: float = 0.02  # peak, of Muon for the matrices of the blocks; 0: AdamW for all

    # Optimization
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    gradient_clip_val: float = 1.0  # largest global gradient norm
    weight_decay: float = 0.1  # of AdamW, decoupled, on matrices only; Muon's matrices have none
    warmup_steps: int = 50  # linear rise of the learning rate, before its linear decay to zero
    max_minutes: float = 0.0  # end by the clock, learning rate decayed by then; 0: only max_steps counts

    # Sampling
    remasking: str = "low_confidence"  # which masks are filled first: see `score_positions`
    inference_steps: int = 0  # forward passes per response, of the first four strategies; 0: one for each byte
    commit_schedule: str = "linear"  # how many bytes each of them commits: linear; cosine begins slowly
    confidence_threshold: float = 0.9  # of the strategy threshold: all bytes at least so probable are committed
    entropy_bound: float = 1.0  # nats, of the strategy entropy_bound: higher commits more bytes at once
    temperature: float = 1.0  # of the byte distribution; 0 takes the most probable byte
    top_p: float = 1.0  # draw from the most probable bytes that together have this probability; 1: from all
    guidance_scale: float = 0.0  # classifier-free guidance: away from what the model says without the prompt; 0: none
    remask_share: float = 0.0  # of the committed bytes, hidden again at each step to be corrected (ReMDM); 0: none
    block_length: int = 16  # bytes of each block, decoded left to right (semi-autoregressive); 0: one block
    cache_refresh: int = 1  # steps between passes over all bytes, the rest compute the block alone; 0: one each block
    num_samples: int = 3  # prompts from the validation text that each validation continues

    # Run
    name: str = "diffusion"  # the run's folder is runs/NAME_TIME
    seed: int = 0  # of the weights, the data order and the masks
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    amp_dtype: str = "auto"  # bf16, fp16 (with a GradScaler), fp32; auto: bf16 or fp16 on CUDA, fp32 elsewhere
    compile: bool = True  # torch.compile; without a C++ compiler the run warns once and goes on without
    validate_every: int = 1000  # steps between validations
    checkpoint_every: int = 500  # steps between checkpoints
    log_every: int = 10  # steps between points in TensorBoard
    stop_if_unsaved: bool = False  # end the run when a checkpoint cannot be written; false: warn, train on, try again

    def __post_init__(self):
        self.device = resolve_device(self.device)
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None and field.metadata:
                setattr(self, field.name, field.metadata["cpu" if self.device == "cpu" else "gpu"])
            setattr(self, field.name, check_type(field.name, getattr(self, field.name), field.type))
        if self.amp_dtype == "auto":
            on_cuda = self.device.startswith("cuda")
            has_bf16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
            self.amp_dtype = "bf16" if has_bf16 else "fp16" if on_cuda else "fp32"
        for name, value in vars(self).items():
            if type(value) in (int, float):
                require(value <= 1e9 or name == "seed" and value < 2**63, name, value, "at most 10^9 (seed: 2^63)")
            if name in CHOICES:
                require(value in CHOICES[name], name, value, "one of " + ", ".join(CHOICES[name]))
            elif name in SHARES:
                require(0 <= value < 1, name, value, "at least 0 and below 1")
            elif name in MAY_BE_0:
                require(value >= 0, name, value, "0 or more")
            elif type(value) in (int, float):
                require(value > 0, name, value, "above 0")
        even = self.model_dim % (2 * self.num_heads) == 0
        require(even, "num_heads", self.num_heads, f"so that model_dim={self.model_dim} / num_heads is even")
        require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", self.qk_rope_head_dim, "even")
        fits = self.max_length <= self.rope_max_length_buffer
        require(fits, "max_length", self.max_length, f"at most rope_max_length_buffer={self.rope_max_length_buffer}")
        require(self.conv_width % 2 or not self.conv_width, "conv_width", self.conv_width, "odd, to be centred, or 0")
        require(self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require(not 0 < self.temperature < 1e-3, "temperature", self.temperature, "0, or at least 0.001")
        require(self.temperature or self.top_p == 1, "top_p", self.top_p, "1 at temperature=0, where nothing is drawn")
        if self.remasking in ("threshold", "entropy_bound"):  # they have no plan of steps to follow
            unplanned = f"the default with remasking={self.remasking}"
            require(self.commit_schedule == "linear", "commit_schedule", self.commit_schedule, unplanned)
            require(not self.remask_share, "remask_share", self.remask_share, unplanned)
        is_plain = re.fullmatch(r"[^/\\]+", self.name) and self.name.isprintable()
        require(is_plain, "name", self.name, "a plain folder name without slashes")


AMP_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STRATEGIES = ("random", "low_confidence", "margin", "entropy", "threshold", "entropy_bound")
CHOICES = {"remasking": STRATEGIES, "commit_schedule": ("linear", "cosine"), "amp_dtype": tuple(AMP_DTYPES)}
CHOICES |= {"attention": ("simplified_mla", "mla", "mha")}
SHARES = {"dropout", "ema_decay", "random_length_prob", "remask_share"}
MAY_BE_0 = {"seed", "num_workers", "conv_width", "mask_ratio_std", "muon_learning_rate", "weight_decay", "warmup_steps"}
MAY_BE_0 |= {"max_minutes", "entropy_bound", "temperature", "guidance_scale", "block_length", "cache_refresh"}
MAY_BE_0 |= {"num_samples", "q_lora_rank", "inference_steps"}


def require(condition, name, value, accepted):
    if not condition:
        raise InputError(f"{name}={value!r} is not possible: it must be {accepted}")


def check_type(name, value, expected):
    """`value` as the field's type; an int passes for a float, nothing else is converted."""
    if expected is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    fits = type(value) is expected and (expected is not float or math.isfinite(value))
    require(fits, name, value, "a finite number" if expected is float else f"of type {expected.__name__}")
    return value


def resolve_device(name):
    num_gpus = torch.cuda.device_count()
    devices = ["cuda"] * (num_gpus > 0) + [f"cuda:{number}" for number in range(num_gpus)]
    devices += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    require(name in ("auto", *devices), "device", name, "auto or what torch finds here: " + ", ".join(devices))
    return devices[0] if name == "auto" else name


# === Data: a file of bytes becomes batches of x0 [B, L] ===============================================================


class ByteLevelTextDataset(Dataset):
    """Sequences of `max_length` bytes of a file, or of its bytes start..stop: int64 [max_length], 0..255 and PAD.

    The file is mapped into memory, so its size does not matter. With a `seed`, index i is the i-th sequence of an
    endless stream of epochs: each epoch cuts the file anew, at a random phase (the file is taken as a circle), and
    visits the pieces in a pseudo-random order that takes no memory. With `seed=None` the pieces come in file order.
    Either way an epoch of `len(self)` sequences holds every byte once, the last few in a sequence filled up with PAD.
    Raises InputError if the file is missing, unreadable or shorter than `max_length`.
    """

    def __init__(self, path, max_length, seed=None, start=0, stop=None):
        self.path, self.max_length, self.seed, self.start, self.stop = str(path), max_length, seed, start, stop
        num_bytes = len(range(file_size(path))[start:stop])
        if num_bytes < max_length:
            found = f"{path}: {num_bytes:,} bytes" + (f" from byte {start:,} on" if start else "")
            raise InputError(f"{found} are less than one sequence of max_length={max_length:,}; add text or lower it")
        self.file = open(path, "rb")  # noqa: SIM115  stays open, to see whether it shrinks
        self.size = os.fstat(self.file.fileno()).st_size
        mapping = mmap.mmap(self.file.fileno(), self.size, access=mmap.ACCESS_READ)
        if hasattr(mapping, "madvise"):  # no read-ahead: at random places of a huge file it costs 160 times the read
            mapping.madvise(mmap.MADV_RANDOM)
        self.bytes = np.frombuffer(mapping, np.uint8)[start:stop]

    def __reduce__(self):  # a DataLoader worker opens the file anew instead of receiving a copy of its content
        return ByteLevelTextDataset, (self.path, self.max_length, self.seed, self.start, self.stop)

    def __len__(self):
        return math.ceil(len(self.bytes) / self.max_length)

    def __iter__(self):
        """The first epoch; further ones are at the indices from len(self) on."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """The batch [B, max_length] of these indices; torch's DataLoader prefers this method."""
        if os.fstat(self.file.fileno()).st_size < self.size:  # reading beyond the end of a mapping kills the process
            raise InputError(f"{self.path}: has become shorter than its {self.size:,} bytes while it was in use")
        phases, offsets = self.locate(indices)
        x0 = self.bytes[(phases + offsets) % len(self.bytes)].astype(np.int64)
        x0[offsets >= len(self.bytes)] = PAD
        return torch.from_numpy(x0)

    def locate(self, indices):
        """Phases [B, 1] and offsets [B, max_length]: their sum, modulo the text's length, is where each byte stands."""
        epochs, pieces = np.divmod(np.asarray(indices), len(self))
        phases = np.zeros_like(pieces)
        if self.seed is not None:
            for epoch in np.unique(epochs):
                *keys, phase = np.random.SeedSequence([self.seed, epoch]).generate_state(5, np.uint64)
                phases[epochs == epoch] = phase % len(self.bytes)
                pieces[epochs == epoch] = permute(pieces[epochs == epoch], len(self), keys)
        return phases[:, None], pieces[:, None] * self.max_length + np.arange(self.max_length)


def permute(index, size, keys):
    """A pseudo-random bijection of range(size) without a table: a Feistel network over the next power of four, repeated
    for the indices that leave the range (Luby and Rackoff 1988; cycle walking as in Black and Rogaway 2002)."""
    half = np.uint64(max(1, math.ceil((size - 1).bit_length() / 2)))
    low_bits = (np.uint64(1) << half) - np.uint64(1)
    index = index.astype(np.uint64)
    outside = np.ones(index.shape, bool)
    while outside.any():
        left, right = index[outside] >> half, index[outside] & low_bits
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # wraps at 2^64
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32)) & low_bits
        index[outside] = left << half | right
        outside = index >= size
    return index.astype(np.int64)


def file_size(path):
    try:
        with open(path, "rb") as file:
            return file.seek(0, os.SEEK_END)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); check the path and its permissions") from None


def starter_corpus():
    """Training and validation bytes from real English that every CPython carries, its language reference: every tenth
    topic is held out."""
    from pydoc_data.topics import topics

    texts = sorted({text.strip() for text in topics.values()})
    held_out = texts[5::10]
    return ["\n\n\n".join(part).encode() for part in ([t for t in texts if t not in held_out], held_out)]


def write_starter_corpus(config):
    """Write the starter corpus if there is neither training nor validation text; only to files of the default names."""
    paths = Path(config.train_data_file), Path(config.validation_data_file)
    if rank() == 0 and paths == DEFAULT_DATA_FILES and not any(path.exists() for path in paths):
        for path, text in zip(paths, starter_corpus()):
            with open(path, "xb") as file:  # x: fails if the file exists
                file.write(text)
            say(f"wrote {path}: {len(text):,} bytes of Python's language reference; put your own text in its place")
    over_processes("max", [0])  # the other processes wait for the files


DEFAULT_DATA_FILES = Path("train.txt"), Path("validation.txt")


def open_datasets(config):
    """The (training, validation) datasets of a run. The last 5 % of the training text are the validation text if there
    is no other, or if only the training text was chosen, since validation.txt is then likely of another kind."""
    train_file, validation_file = Path(config.train_data_file), Path(config.validation_data_file)
    has_no_partner = train_file != DEFAULT_DATA_FILES[0] or not validation_file.exists()
    split = None
    if has_no_partner and validation_file == DEFAULT_DATA_FILES[1]:
        validation_file, split = train_file, file_size(train_file) * 95 // 100
    validation_set = ByteLevelTextDataset(validation_file, config.max_length, start=split or 0)
    train_set = ByteLevelTextDataset(train_file, config.max_length, config.seed, stop=split)
    if split is not None:
        say(f"no validation text of its own: the last 5 % of {train_file} are held out for validation")
    if np.array_equal(train_set.bytes, validation_set.bytes):
        say(f"warning: {train_file} and {validation_file} are the same text; the bound tells nothing new then")
    starter_sizes = [len(text) for text in starter_corpus()]
    if len(validation_set.bytes) == starter_sizes[1] and len(train_set.bytes) != starter_sizes[0]:
        say(f"warning: {validation_file} is the starter corpus, {train_file} is not; delete it to hold out 5 %")
    return train_set, validation_set


def batch_indices(config, first_step):
    """Indices of each micro-batch of this process, in order, without end.

    The global batch of a step is one range of indices, whatever the number of processes and of micro-batches that
    share it: row (micro * world_size + rank) * batch_size + b.
    """
    for micro_batch in itertools.count(first_step * config.gradient_accumulation_steps):
        first = (micro_batch * world_size() + rank()) * config.batch_size
        yield range(first, first + config.batch_size)


def data_loader(dataset, config, first_step):
    batches = batch_indices(config, first_step)  # the dataset returns each one whole: nothing is left to collate
    options = {"num_workers": config.num_workers, "pin_memory": config.device.startswith("cuda")}
    return DataLoader(dataset, batch_sampler=batches, collate_fn=torch.as_tensor, worker_init_fn=leave_group, **options)


def leave_group(_):
    """Ctrl-C is for the trainer: the DataLoader's workers are out of its reach, and end once the trainer has saved."""
    if hasattr(os, "setpgrp"):  # not so on Windows
        os.setpgrp()


def derive_seed(*numbers):
    """One 63-bit seed from several numbers, such as (seed, step): each step's randomness is a function of its number,
    so a resumed run draws what the uninterrupted one would have drawn, with no generator state to save."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


# === Model: predicts every byte of a partly masked sequence at once ===================================================


def rope_table(length, head_dim, theta):
    """freqs_cis [length, 2, d]: cosines and signed sines of position * theta^(-2i/d) (RoFormer, arXiv 2104.09864)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    angles = torch.outer(torch.arange(length).double(), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)], dim=1).float()


def apply_rope(x, freqs_cis):
    """Rotate the pairs (i, i + d/2) of x [B, H, L, d] by their position's angle, freqs_cis [L, 2, d]."""
    cos, sin = freqs_cis.to(x.dtype).unbind(dim=1)
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin  # roll swaps the two halves


class LatentCache:
    """For fast sampling alone: in training every `cache` below is None.

    What a layer keeps of a pass over the whole canvas, so that the next passes compute only the positions of `window`:
    of every position what `Attention.compress` returned, [B, L, numbers kept] (a latent, where K and V would be 2 D / R
    times larger), and for the convolution the residual stream [B, conv_width // 2, D] on either side of the window.
    """

    def __init__(self, window, conv_width):
        self.window, self.reach, self.kept = window, conv_width // 2, None

    def positions(self):
        """Those that the pass to come computes: all of them in the first one."""
        return slice(None) if self.kept is None else self.window

    def with_neighbours(self, x):
        if self.kept is not None:
            return torch.cat([self.left, x, self.right], dim=1)
        padded = F.pad(x, (0, 0, self.reach, self.reach))
        start, stop = self.window.start, self.window.stop
        self.left = padded[:, start : start + self.reach].clone()
        self.right = padded[:, stop + self.reach : stop + 2 * self.reach].clone()
        return padded

    def update(self, kept):
        if self.kept is None:
            self.kept = kept
        else:
            self.kept[:, self.window] = kept
        return self.kept


class Attention(nn.Module):
    """What the three kinds of attention share: `compress` says which numbers of a position they keep (and the sampler
    caches), `attend` what the queries of x make of all that is kept. All are bidirectional."""

    def forward(self, x, freqs_cis, attention_mask=None, cache=None):
        query_freqs = freqs_cis[cache.positions()] if cache else freqs_cis
        kept = self.compress(x)  # [B, L, numbers kept]
        kept = cache.update(kept) if cache else kept
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None, :]  # [B, 1, 1, L], the same for all heads and queries
        out = self.attend(x, kept, query_freqs, freqs_cis, attention_mask)  # [B, H, L, d]
        return self.wo(out.transpose(1, 2).flatten(-2))  # [B, L, D]

    def attend(self, x, kept, query_freqs, freqs_cis, attention_mask):
        q, k, v = map(self.split_heads, self.project(x, kept))
        q, k = apply_rope(q, query_freqs), apply_rope(k, freqs_cis)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)

    def split_heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, L, d]


class SimplifiedMLAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) at its simplest: keys and values are decompressed
    from one small latent per position; queries are direct, and RoPE turns whole heads."""

    def __init__(self, config):
        super().__init__()
        D, R, self.num_heads = config.model_dim, config.kv_latent_dim, config.num_heads
        self.wq = nn.Linear(D, D, bias=False)
        self.w_latent = nn.Linear(D, R, bias=False)
        self.wk = nn.Linear(R, D, bias=False)
        self.wv = nn.Linear(R, D, bias=False)
        self.wo = nn.Linear(D, D, bias=False)

    def compress(self, x):
        return self.w_latent(x)  # [B, L, R]

    def project(self, x, latent):
        return self.wq(x), self.wk(latent), self.wv(latent)  # [B, L, D] each


class MultiHeadAttention(Attention):
    """Ordinary attention (arXiv 1706.03762) with RoPE on whole heads, the control: it keeps keys and values."""

    def __init__(self, config):
        super().__init__()
        D, self.num_heads = config.model_dim, config.num_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(D, D, bias=False) for _ in range(4))

    def compress(self, x):
        return torch.cat([self.wk(x), self.wv(x)], dim=-1)  # [B, L, 2 D]

    def project(self, x, keys_values):
        return self.wq(x), *keys_values.chunk(2, dim=-1)


class MultiHeadLatentAttention(Attention):
    """Multi-head latent attention in full (DeepSeek-V2, arXiv 2405.04434, sec. 2.1; the names are those of its code):
    RMSNorm on the latents, and RoPE apart from them, on a part of each query and on one key that all heads share."""

    def __init__(self, config):
        super().__init__()
        D, R, H, Q = config.model_dim, config.kv_latent_dim, config.num_heads, config.q_lora_rank
        self.num_heads, self.nope_dim, self.rope_dim = H, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.wq_a = nn.Sequential(nn.Linear(D, Q, bias=False), RMSNorm(Q)) if Q else nn.Identity()
        self.wq_b = nn.Linear(Q or D, H * (self.nope_dim + self.rope_dim), bias=False)
        self.wkv_a = nn.Linear(D, R + self.rope_dim, bias=False)
        self.kv_norm = RMSNorm(R)
        self.wk_b = nn.Linear(R, H * self.nope_dim, bias=False)
        self.wv_b = nn.Linear(R, H * config.v_head_dim, bias=False)
        self.wo = nn.Linear(H * config.v_head_dim, D, bias=False)

    def compress(self, x):
        latent, k_rope = self.wkv_a(x).split([self.wk_b.in_features, self.rope_dim], dim=-1)
        return torch.cat([self.kv_norm(latent), k_rope], dim=-1)  # [B, L, R + rope_dim]

    def attend(self, x, kept, query_freqs, freqs_cis, attention_mask):
        q_nope, q_rope = self.split_heads(self.wq_b(self.wq_a(x))).split([self.nope_dim, self.rope_dim], dim=-1)
        latent, k_rope = kept.split([self.wk_b.in_features, self.rope_dim], dim=-1)
        q_rope, k_rope = apply_rope(q_rope, query_freqs), apply_rope(k_rope[:, None], freqs_cis)  # [B, 1, L, rope_dim]
        w_k, w_v = (layer.weight.unflatten(0, (self.num_heads, -1)) for layer in (self.wk_b, self.wv_b))  # [H, d, R]
        is_window = x.shape[1] != kept.shape[1]
        if is_window:  # few queries meet many latents: absorb W_k into the queries, W_v into what comes out
            q_nope, k_nope, v = q_nope @ w_k, latent[:, None], latent[:, None]
        else:
            k_nope, v = self.split_heads(self.wk_b(latent)), self.split_heads(self.wv_b(latent))
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([part.expand(-1, self.num_heads, -1, -1) for part in (k_nope, k_rope)], dim=-1)
        v, scale = v.expand(-1, self.num_heads, -1, -1), (self.nope_dim + self.rope_dim) ** -0.5
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=scale)
        return out @ w_v.mT if is_window else out  # [B, H, W, v_head_dim]


ATTENTIONS = {"simplified_mla": SimplifiedMLAttention, "mla": MultiHeadLatentAttention, "mha": MultiHeadAttention}


def mish(x):
    """x * tanh(softplus(x)) (arXiv 1908.08681) by one exponential. F.mish takes three on a CPU: a compiled step of the
    default size took 120 ms with it and 112 ms with this (the shortest of 40 each, in turn)."""
    exp = torch.exp(x.float().clamp(max=20))  # beyond 20 it is x to the last bit; float16 would overflow at 5.5
    ratio = exp * (exp + 2)
    return x * (ratio / (ratio + 2))


class FeedForward(nn.Module):
    """Gated as in GLU variants (arXiv 2002.05202), with Mish as the gate."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.model_dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.model_dim, bias=False)
        self.w3 = nn.Linear(config.model_dim, config.ffn_dim, bias=False)

    def forward(self, x):
        return self.w2(mish(self.w1(x)) * self.w3(x))


class DepthwiseConvolution(nn.Module):
    """Adds to each channel of x [B, L, D] a weighted sum of its neighbours, `width` positions wide. Written as shifts,
    which torch.compile fuses: six times faster on a CPU than nn.Conv1d(D, D, width, groups=D)."""

    def __init__(self, width, model_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, model_dim))

    def forward(self, x, cache=None):
        width, length = self.weight.shape[0], x.shape[1]
        padded = cache.with_neighbours(x) if cache else F.pad(x, (0, 0, width // 2, width // 2))
        return x + sum(padded[:, shift : shift + length] * self.weight[shift] for shift in range(width))


class TransformerBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.convolution = DepthwiseConvolution(config.conv_width, config.model_dim) if config.conv_width else None
        self.attention_norm = RMSNorm(config.model_dim)
        self.attention = ATTENTIONS[config.attention](config)
        self.ffn_norm = RMSNorm(config.model_dim)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, freqs_cis, attention_mask=None, cache=None):
        if attention_mask is not None:  # PAD is to the convolution what lies beyond the ends: zero
            x = x * (attention_mask[:, cache.positions()] if cache else attention_mask)[..., None]
        if self.convolution:
            x = self.convolution(x, cache)
        x = x + self.dropout(self.attention(self.attention_norm(x), freqs_cis, attention_mask, cache))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class MaskPredictor(nn.Module):
    """The transformer of the masked diffusion model. It sees no time: the number of MASKs tells it as much."""

    def __init__(self, config):
        super().__init__()
        self.conv_width = config.conv_width
        self.tok_embeddings = nn.Embedding(NUM_TOKENS, config.model_dim)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.model_dim)
        self.output = nn.Linear(config.model_dim, NUM_BYTES, bias=False)
        rope_dim = config.qk_rope_head_dim if config.attention == "mla" else config.model_dim // config.num_heads
        table = rope_table(config.rope_max_length_buffer, rope_dim, config.rope_theta)
        self.register_buffer("freqs_cis", table, persistent=False)
        for name, module in self.named_modules():  # the embedding keeps PyTorch's N(0, 1)
            if name.endswith(("wo", "w2", "output")):  # each block starts as the identity, the output as uniform
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, tokens, attention_mask=None):
        """Logits [B, L, 256], float32, of the byte at each position of tokens [B, L], int64: bytes and special ids.

        attention_mask, bool [B, L], is False where nothing may be seen: by default at PAD, except in compiled code,
        which cannot look: there a batch with PAD needs its mask. InputError if L exceeds rope_max_length_buffer.
        """
        if attention_mask is None and not torch.compiler.is_compiling() and (tokens == PAD).any():
            attention_mask = tokens != PAD
        return self.output(self.hidden(tokens, attention_mask)).float()  # [B, L, 256]

    def latent_caches(self, window):
        return [LatentCache(window, self.conv_width) for _ in self.layers]

    def hidden(self, tokens, attention_mask=None, caches=None):
        """What the output layer turns into logits: [B, L, D]. Given a LatentCache for each block, the first call fills
        them; the next ones compute and return only their window, [B, W, D]. Does not look for PAD."""
        length, longest = tokens.shape[1], self.freqs_cis.shape[0]
        if length > longest:
            raise InputError(f"a sequence of {length} bytes exceeds rope_max_length_buffer={longest}; raise that field")
        if attention_mask is not None:  # a row of nothing but PAD sees itself: no NaN
            attention_mask = attention_mask | ~attention_mask.any(dim=1, keepdim=True)
        caches = caches or [None] * len(self.layers)
        x = self.tok_embeddings(tokens[:, caches[0].positions()] if caches[0] else tokens)  # [B, L, D]
        for layer, cache in zip(self.layers, caches):
            x = layer(x, self.freqs_cis[:length], attention_mask, cache)
        return self.norm(x)


# === The diffusion objective ==========================================================================================


def stratified_quantiles(count, generator):
    """t [count]: one number in [0, 1) from each of `count` equal parts of it, all at the same random offset."""
    offset = torch.rand(1, generator=generator, device=generator.device)
    return (torch.arange(count, device=generator.device) + offset) / count


def draw_noise(num_rows, length, generator):
    """All the randomness of masking a batch: t [num_rows] and scores [num_rows, length], which rank the positions.

    t is LLaDA's t as a share: exactly 1 + floor(t * length) bytes will be masked, where LLaDA masks each of them with
    probability t. The bound is the same (see `masked_diffusion_loss`); it is stratified, so that every batch covers all
    shares evenly.
    """
    t = stratified_quantiles(num_rows, generator)
    return t, torch.rand(num_rows, length, generator=generator, device=generator.device)


def bell_quantile(t, std):
    """What training does with t: quantiles of the uniform distribution become those of a normal around 1/2, clamped to
    [0, 1). Almost all or almost nothing masked teaches little: after 2,000 steps of the default CPU size the bound is
    0.13 bits per byte better. The loss is then a weighted bound."""
    return (0.5 + std * math.sqrt(2) * torch.erfinv(2 * t - 1)).clamp(0, 1 - 1e-6) if std else t


def choose_positions(candidates, scores, counts):
    """In each row the `counts` [N] candidates (bool [N, W]) of highest score [N, W], as bool [N, W]."""
    order = scores.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return candidates & (order.argsort(dim=1) < counts[:, None])


def mask_bytes(x0, t, scores):
    """The forward process: replace exactly k = 1 + floor(length * t) bytes of each sequence by MASK, those with the
    lowest scores. PAD is no byte and stays. Returns xt [B, L] int64 and is_masked [B, L] bool."""
    is_byte = x0 != PAD
    lengths = is_byte.sum(dim=1)
    num_masked = torch.minimum(1 + (lengths * t).long(), lengths)  # [B]; the minimum guards t rounded up to 1
    is_masked = choose_positions(is_byte, -scores, num_masked)
    return x0.masked_fill(is_masked, MASK), is_masked


def predict_masked(model, x0, t, scores, attention_mask=None):
    """Mask x0 and predict it; returns logits [B, L, 256], the cross-entropy in nats and is_masked, both [B, L]."""
    xt, is_masked = mask_bytes(x0, t, scores)
    logits = model(xt, attention_mask)
    targets = x0.masked_fill(~is_masked, -100)  # -100: no loss
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return logits, cross_entropy.view_as(x0), is_masked


def mean_of_masked(values, is_masked):
    return (values * is_masked).sum(dim=1) / is_masked.sum(dim=1).clamp(min=1)


def masked_diffusion_loss(model, x0, t=None, scores=None, attention_mask=None):
    """The negative evidence lower bound, an upper bound of -log p(x0) / L.

    LLaDA (eq. 3), MDLM and MD4 write it as E_t[(1/t) sum of masked cross-entropies], t ~ U(0, 1), each byte masked with
    probability t. Group the draws by their number k of masks: the integral of Binomial(k; L, t) / t over t is 1/k for
    every k, so the same bound per byte is

        E_{k ~ Uniform{1..L}}  E_{masks of k bytes}  [ mean cross-entropy of the k masked bytes ]

    which has no 1/t to blow up. The mean is taken within each sequence, then over the sequences; dividing by the number
    of masks in the whole batch would be another objective.

    Args:
        model: maps int64 [B, L] to logits [B, L, 256].
        x0: int64 [B, L], clean bytes, PAD where a sequence is shorter.
        t, scores: the noise, see `draw_noise`; drawn by way of torch's default generator if not given.
        attention_mask: for the model, see `MaskPredictor.forward`.

    Returns:
        scalar, nats per byte.
    """
    if t is None:
        generator = torch.Generator(x0.device).manual_seed(int(torch.randint(2**62, ())))
        t, scores = draw_noise(*x0.shape, generator)
    _, nats, is_masked = predict_masked(model, x0, t, scores, attention_mask)
    return mean_of_masked(nats, is_masked).mean()


# === Sampler: from MASKs to text ======================================================================================


def draw_bytes(logits, temperature, top_p, uniform):
    """A byte for each row of logits [M, 256], drawn from softmax(logits / temperature), of which top_p keeps the most
    probable bytes that together reach that probability (arXiv 1904.09751). Temperature 0 takes the most probable one.

    One number of `uniform` [M] is looked up in each cumulative distribution. It is float64 where the device has it:
    float32 Gumbel noise, the usual way, silently lowers the temperature (arXiv 2409.02908).
    """
    if not temperature:
        return logits.argmax(dim=-1)
    probs = (logits / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, order = probs.sort(descending=True)
        is_tail = ordered.cumsum(dim=-1) - ordered >= top_p
        is_tail[:, 0] = False  # the most probable one stays, however small top_p is
        probs = probs.masked_fill(torch.zeros_like(is_tail).scatter(-1, order, is_tail), 0.0)
    cumulative = probs.cumsum(dim=-1, dtype=uniform.dtype)
    reached = cumulative <= uniform[:, None] * cumulative[:, -1:]
    return reached.sum(dim=-1).clamp(max=NUM_BYTES - 1)  # the product may be rounded up to the last sum


def score_positions(strategy, probs, prediction, uniform):
    """How early each masked position should be committed [M], from its probs [M, 256] and its predicted byte [M]:

    random                       by chance (MDLM, MD4)
    low_confidence, threshold    probability of the predicted byte (LLaDA; Fast-dLLM, arXiv 2505.22618)
    margin                       distance of the two highest probabilities (Dream, arXiv 2508.15487)
    entropy, entropy_bound       minus the entropy in nats (Dream; EB-Sampler, arXiv 2505.24857)
    """
    if strategy == "random":
        return uniform
    if strategy == "margin":
        first, second = probs.topk(2).values.unbind(-1)
        return first - second
    if strategy in ("entropy", "entropy_bound"):
        return -torch.special.entr(probs).sum(dim=-1)
    return probs.gather(-1, prediction[:, None])[:, 0]


def count_commits(config, scores, quota):
    """How many positions each row commits [N], given the scores [N, W] of its masks, -inf elsewhere: the quota [N], but
    `threshold` takes all from confidence_threshold on, and `entropy_bound` the largest set, in order of entropy, whose
    sum without its largest entropy stays within entropy_bound. Always at least one, if there is a mask."""
    if config.remasking == "threshold":
        return (scores >= config.confidence_threshold).sum(dim=1).clamp(min=1)
    if config.remasking == "entropy_bound":
        entropies = scores.neg().sort(dim=1).values
        return (entropies.cumsum(dim=1) - entropies <= config.entropy_bound).sum(dim=1).clamp(min=1)
    return quota.clamp(min=1)


def masks_left(num_masks, step, steps, schedule):
    """How many of num_masks [N] should be left after `step` of `steps`. `linear` as in LLaDA, the remainder on the
    first steps; `cosine` commits few at first, when least is known (MaskGIT, MD4)."""
    if schedule == "cosine":
        return (num_masks * math.cos(math.pi / 2 * step / steps)).floor().long()
    return num_masks - step * (num_masks // steps) - (num_masks % steps).clamp(max=step)


def choose_remasked(config, is_committed, confidence, target, uniform):
    """Which committed bytes are hidden again, bool [N, W]: about the share remask_share of them, drawn with weights
    exp(-confidence), and no more than the masks that are to be left (ReMDM-conf, arXiv 2503.00307, eq. 10)."""
    expected = config.remask_share * is_committed.sum(dim=1)
    counts = torch.minimum((expected + uniform[:, 0, 0]).floor(), target)  # rounded by chance, right on average
    return choose_positions(is_committed, -confidence - torch.log(-torch.log(uniform[:, :, 1])), counts)


def draw_uniform(generators, width, device):
    """The noise of a step, [N, width, 4] in [0, 1): for the bytes, for `random`, and two for `choose_remasked`. Row i
    comes from generators[i]: what a row draws does not depend on the other rows."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.stack([torch.rand(width, 4, generator=g, dtype=dtype, device=device) for g in generators])


def block_logits(model, canvas, is_given, has_pad, window, masks, caches, guidance_scale):
    """Logits [M, 256] at the `masks` (rows, columns) of canvas[:, window]. Once its caches are filled, the block alone
    is computed and they stand for the rest of the canvas (the dual cache of Fast-dLLM, arXiv 2505.22618, on latents).
    """
    if guidance_scale:  # twice as many rows, of which the second half does not see what the user gave
        canvas = torch.cat([canvas, canvas.masked_fill(is_given & (canvas != PAD), MASK)])
    hidden = model.hidden(canvas, canvas != PAD if has_pad else None, caches)
    if hidden.shape[1] == canvas.shape[1]:
        hidden = hidden[:, window]  # [N, W, D]
    if not guidance_scale:
        return model.output(hidden[masks]).float()
    logits, unconditional = (model.output(half[masks]).float() for half in hidden.chunk(2))
    return unconditional + (1 + guidance_scale) * (logits - unconditional)


def denoise_block(model, canvas, is_given, window, steps, config, generators):
    """Fill the MASKs of canvas[:, window]; yields the canvas after each step."""
    block = canvas[:, window]  # a view: what is written to it stands in the canvas
    is_hole, has_pad = block == MASK, bool((canvas == PAD).any())
    num_masks = is_hole.sum(dim=1)  # [N]
    confidence = torch.zeros(block.shape, device=canvas.device)  # of each byte when it was committed
    for step in itertools.count():
        is_masked = block == MASK
        masks = is_masked.nonzero(as_tuple=True)  # rows and columns of the M masks; the only wait for a GPU in a step
        if not len(masks[0]):
            return
        if step == 0 or (config.cache_refresh and step % config.cache_refresh == 0):
            caches = model.latent_caches(window)
        logits = block_logits(model, canvas, is_given, has_pad, window, masks, caches, config.guidance_scale)
        uniform = draw_uniform(generators, block.shape[1], canvas.device)  # [N, W, 4]
        probs = logits.softmax(dim=-1)  # [M, 256]
        drawn = draw_bytes(logits, config.temperature, config.top_p, uniform[masks][:, 0])  # [M]
        scores = torch.full_like(confidence, -torch.inf)  # [N, W]
        scores[masks] = score_positions(config.remasking, probs, drawn, uniform[masks][:, 1].float())
        target = masks_left(num_masks, min(step + 1, steps), steps, config.commit_schedule)
        quota = is_masked.sum(dim=1) - target
        if config.remask_share:
            is_remasked = choose_remasked(config, is_hole & ~is_masked, confidence, target, uniform[:, :, 2:])
            quota = quota + is_remasked.sum(dim=1)
            block.masked_fill_(is_remasked, MASK)
            confidence[masks] = probs.gather(-1, drawn[:, None])[:, 0]
        is_chosen = choose_positions(is_masked, scores, count_commits(config, scores, quota))
        block.copy_(torch.where(is_chosen, block.index_put(masks, drawn), block))
        yield canvas


@torch.no_grad()
def denoise(model, canvas, config, generators):
    """Fill every MASK of canvas [N, L] in place; yields the canvas before the first step and after each.

    The loop of `denoise_block` is LLaDA's sampler (arXiv 2502.09992, algorithms 4 and 5), and everybody else's with
    another choice of the positions to commit. The masked stretch is cut into blocks, filled from left to right. Each
    step predicts all MASKs of the block, draws a byte for each and commits some. LLaDA says it the other way round:
    fill all, then remask all but the surest, hence the name of the field `remasking`. (`remask_share` is another thing,
    it hides bytes committed earlier.) Given bytes never change, PAD is not seen.
    """
    is_given = canvas != MASK
    masked_columns = (~is_given).any(dim=0).nonzero().flatten().tolist()
    yield canvas
    if not masked_columns:
        return
    first, stop = masked_columns[0], masked_columns[-1] + 1
    block_length = min(config.block_length or stop, stop - first)
    starts = range(first, stop, block_length)
    steps = max(1, config.inference_steps // len(starts)) if config.inference_steps else block_length
    for start in starts:
        window = slice(start, min(start + block_length, stop))
        yield from denoise_block(model, canvas, is_given, window, steps, config, generators)


def fill_masks(model, texts, config, seed=None, on_step=None):
    """Fill the MASKs of several texts at once; returns a list of bytes, the given ones unchanged. With holes of the
    same shape each comes out as it would alone.

    Args:
        texts: sequences of ints, bytes 0..255 and MASK, of any lengths. They are aligned at their first MASK, so that
            these share the same blocks.
        config: the fields of its section Sampling are used.
        seed: of the noise of the first text, that of text i is seed + i; default config.seed.
        on_step: called with the canvas [N, L] int64 before the first and after each step; PAD is around shorter texts.

    Raises:
        InputError: so aligned they exceed rope_max_length_buffer, or guidance_scale meets a text without given bytes.
    """
    if not texts:
        return []
    texts, scale = [list(text) for text in texts], config.guidance_scale
    require(not scale or all(set(text) - {MASK} for text in texts), "guidance_scale", scale, "0 without a prompt")
    firsts = [[*text, MASK].index(MASK) for text in texts]
    starts = [max(firsts) - first for first in firsts]
    canvas = torch.full((len(texts), max(start + len(text) for start, text in zip(starts, texts))), PAD)
    for row, start, text in zip(canvas, starts, texts):
        row[start : start + len(text)] = torch.tensor(text, dtype=torch.int64)
    device = next(model.parameters()).device
    canvas, seed = canvas.to(device), config.seed if seed is None else seed
    generators = [torch.Generator(device).manual_seed(seed + i) for i in range(len(texts))]
    with evaluation_mode(model):
        for state in denoise(model, canvas, config, generators):
            if on_step:
                on_step(state)
    rows = zip(canvas.tolist(), starts, texts)
    return [bytes(row[start : start + len(text)]) for row, start, text in rows]


def run_conditional_diffusion_inference(model, prompt, response_length, config, suffix="", seed=None, on_step=None):
    """Write `response_length` bytes after `prompt`, and before `suffix` if there is one (infilling).

    Args:
        prompt, suffix: str or bytes; they stay as they are.
        config, seed, on_step: see `fill_masks`.

    Returns:
        prompt, response and suffix as one str, invalid UTF-8 replaced by U+FFFD.

    Raises:
        InputError: the whole is longer than rope_max_length_buffer, or response_length is negative.
    """
    text = text_with_hole(prompt, response_length, suffix, config)
    return fill_masks(model, [text], config, seed, on_step)[0].decode(errors="replace")


def text_with_hole(prompt, response_length, suffix, config):
    prompt, suffix = (s.encode(errors="surrogateescape") if isinstance(s, str) else s for s in (prompt, suffix))
    require(response_length >= 0, "response_length", response_length, "0 or more")
    total = len(prompt) + response_length + len(suffix)
    if total > config.rope_max_length_buffer:
        sizes = f"prompt ({len(prompt)}) + response_length ({response_length}) + suffix ({len(suffix)}) = {total} bytes"
        raise InputError(f"{sizes} exceed rope_max_length_buffer={config.rope_max_length_buffer}; shorten one of them")
    return [*prompt, *[MASK] * response_length, *suffix]


@contextmanager
def evaluation_mode(model):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class CanvasView:
    """Shows each canvas in place of the one before: masks as dim dots, fresh bytes in bold green (plain where
    NO_COLOR is set); where the output is no terminal, nothing."""

    before = None

    def __call__(self, canvas):
        if not sys.stdout.isatty():
            return
        was_masked = (canvas if self.before is None else self.before) == MASK
        self.before = canvas.clone()
        dim, fresh, plain = ("", "", "") if os.environ.get("NO_COLOR") else ("\x1b[2m", "\x1b[1;32m", "\x1b[0m")
        screen = "\x1b[H\x1b[2J"
        for row in zip(canvas.tolist(), was_masked.tolist()):
            for (is_masked, is_fresh), group in itertools.groupby(zip(*row), lambda t: (t[0] == MASK, t[1])):
                text = show_masks(token for token, _ in group)
                screen += (dim if is_masked else fresh if is_fresh else plain) + text + plain
            screen += "\n"
        print(screen, end="", flush=True)


def show_masks(tokens):
    return printable(b"".join("·".encode() if token == MASK else bytes([token]) for token in tokens if token != PAD))


def printable(text):
    """Bytes as a terminal may show them: what is neither text nor a new line becomes U+FFFD, and cannot control it."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text.decode(errors="replace"))


def commit_order(canvases):
    """The picture of a sample's making from its canvases [L], uint8 [steps, L]: masks black, bytes grey, and white in
    the step that committed them."""
    is_known = torch.stack(canvases) != MASK
    return (96 * is_known[1:] + 159 * (is_known[1:] & ~is_known[:-1])).to(torch.uint8)


# === Evaluation =======================================================================================================


@torch.no_grad()
def measure_chunks(model, dataset, max_bytes=0, batch_size=64, seed=0):
    """Mask each chunk of a text once, and predict it. Returns four float64 [chunks]: its length, the share of it that
    was masked, the mean cross-entropy of the masked bytes in bits, and the share of them that the most probable byte
    hits.

    The noise is a function of `seed` alone, so that two calls agree and two models are compared on the same masks.
    All processes of a distributed run take part and get the same result.

    Args:
        dataset: a ByteLevelTextDataset, whose first epoch is measured: chunks that do not overlap.
        max_bytes: if above 0, about so many bytes, in chunks spread evenly over the text.
    """
    device = next(model.parameters()).device
    num_chunks = len(dataset) if not max_bytes else min(len(dataset), math.ceil(max_bytes / dataset.max_length))
    chunks = np.arange(num_chunks) * len(dataset) // num_chunks
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same masks whatever the device
    t = stratified_quantiles(num_chunks, generator)[torch.randperm(num_chunks, generator=generator)]
    measured = torch.zeros(4, num_chunks, dtype=torch.double)
    with evaluation_mode(model):
        for number, rows in enumerate(torch.arange(num_chunks).split(batch_size)):
            scores = torch.rand(len(rows), dataset.max_length, generator=generator)
            if number % world_size() == rank() % world_size():
                x0 = dataset.__getitems__(chunks[rows.numpy()]).to(device)
                logits, nats, is_masked = predict_masked(model, x0, t[rows].to(device), scores.to(device))
                lengths = (x0 != PAD).sum(dim=1)
                bits, hits = (mean_of_masked(v, is_masked) for v in (nats * BITS_PER_NAT, logits.argmax(-1) == x0))
                results = lengths, is_masked.sum(dim=1) / lengths, bits, hits
                measured[:, rows] = torch.stack([result.cpu().double() for result in results])
    return over_processes("sum", measured)


def mean_over_bytes(values, lengths):
    """(mean, standard error) of a figure of each chunk, weighted by the chunks' lengths; nan for want of chunks."""
    mean, n = (values * lengths).sum() / lengths.sum(), len(values)
    spread = ((values - mean) * lengths).square().sum().sqrt() / lengths.sum()
    return mean.item(), spread.item() * math.sqrt(n / (n - 1)) if n > 1 else math.nan


def estimate_nelbo(model, dataset, max_bytes=0, batch_size=64, seed=0):
    """(mean, standard error) of the bound of `masked_diffusion_loss` over a whole text, in bits per byte: total bits
    over total bytes, and how far chance (of the text's chunks and of the masks) may have moved it. For the arguments
    see `measure_chunks`."""
    lengths, _, bits, _ = measure_chunks(model, dataset, max_bytes, batch_size, seed)
    return mean_over_bytes(bits, lengths)


def by_mask_ratio(ratios, bits, hits, bins=10):
    """What `measure_chunks` returned, sorted by the share of masks k / L: a list of ten (upper end of the bin in
    percent, bits per masked byte of its chunks, their shares of hits)."""
    number = (ratios * bins - 1e-5).ceil().clamp(1, bins)  # k / L of exactly 10 % is of the first bin
    return [(100 * i // bins, bits[number == i], hits[number == i]) for i in range(1, bins + 1)]


@torch.no_grad()
def exact_left_to_right(model, x0, start=0, batch_size=64):
    """Bits of each byte of x0 [L] from `start` on, by the chain rule: a byte is predicted with those before it in view,
    itself and those after it masked. Their sum is the exact -log2 p(x0[start:] | x0[:start]) of decoding from left to
    right, as an autoregressive model has it."""
    positions, bits = torch.arange(len(x0), device=x0.device), []
    with evaluation_mode(model):
        for rows in positions[start:].split(batch_size):
            xt = x0.repeat(len(rows), 1).masked_fill(positions >= rows[:, None], MASK)
            logits = model.output(model.hidden(xt)[torch.arange(len(rows)), rows]).float()
            bits.append(F.cross_entropy(logits, x0[rows], reduction="none").cpu().double() * BITS_PER_NAT)
    return torch.cat(bits)


@torch.no_grad()
def exact_most_confident_first(model, x0):
    """Bits per byte of each row of x0 [B, L] by the chain rule in another order: next comes the byte whose prediction
    is the surest. The order follows from the bytes seen so far alone, which makes the likelihood exact (DUEL, arXiv
    2603.01367)."""
    rows, xt = torch.arange(len(x0), device=x0.device), torch.full_like(x0, MASK)
    bits = torch.zeros(len(x0), dtype=torch.double)
    with evaluation_mode(model):
        for _ in range(x0.shape[1]):
            log_probs = model(xt).log_softmax(dim=-1)
            positions = log_probs.amax(dim=-1).masked_fill(xt != MASK, -torch.inf).argmax(dim=1)
            truth = x0[rows, positions]
            bits -= log_probs[rows, positions, truth].cpu().double() * BITS_PER_NAT
            xt[rows, positions] = truth
    return bits / x0.shape[1]


def text_statistics(samples, training_text):
    """What samples (list of bytes) look like beside the text the model learned from: {figure: (value, unit, about)}."""
    word = re.compile(rb"[\w\x80-\xff]+")  # letters of other scripts are bytes from 0x80 on
    known = {match[0] for match in word.finditer(training_text)}
    words = [word.findall(sample)[1:-1] for sample in samples]  # those at the ends may be cut
    trigrams = [trigram for sample in words for trigram in zip(sample, sample[1:], sample[2:])]
    flat = list(itertools.chain(*words))
    shares = np.bincount(np.frombuffer(b"".join(samples), np.uint8)) / max(1, sum(map(len, samples)))
    longest = 0
    for sample in samples:
        for start in range(len(sample)):
            while start + longest < len(sample) and sample[start : start + longest + 1] in training_text:
                longest += 1
    known_words = sum(word in known for word in flat) / max(1, len(flat))
    return {
        "known words": (known_words, "share", "words of the samples that the training text has"),
        "distinct-3": (len(set(trigrams)) / max(1, len(trigrams)), "share", "3-grams of their words that are distinct"),
        "byte entropy": (-sum(p * math.log2(p) for p in shares if p), "bits", "of their single bytes"),
        "longest copy": (longest, "bytes", "their longest piece that stands in the training text"),
    }


def figure(name, kind, values, unit, about, lengths=None):
    """A row of `evaluate`: the mean of `values` and its standard error, None where there is none."""
    values = torch.as_tensor(values, dtype=torch.double).cpu().reshape(-1)
    numbers = mean_over_bytes(values, torch.ones_like(values) if lengths is None else lengths)
    mean, error = (None if math.isnan(number) else number for number in numbers)
    return {"figure": name, "kind": kind, "value": mean, "standard_error": error, "unit": unit, "about": about}


def evaluate(model, config, dataset, training_text, num_chunks=16, seed=0):
    """All that `python main.py evaluate` tells, the same for the same seed: a list of what `figure` returns. The kinds
    "bound", "exact" and "other" are never compared."""
    whole = len(dataset.bytes) // config.max_length  # chunks without PAD
    chosen = min(num_chunks, whole)
    x0 = torch.stack([dataset[i * whole // chosen] for i in range(chosen)]).to(next(model.parameters()).device)
    length, hole = config.max_length, min(20, config.max_length // 2)
    rows = likelihood_figures(model, measure_chunks(model, dataset, seed=seed), x0)
    for name, temperature, top_p in (("greedy", 0.0, 1.0), ("drawn", config.temperature or 1.0, config.top_p)):
        settings = dataclasses.replace(config, temperature=temperature, top_p=top_p)
        about = f"restored bytes of {hole}-byte holes in {length} bytes"
        rows.append((f"infilling, {name}", "other", infilling_hits(model, x0, hole, settings, seed), "share", about))
    settings = dataclasses.replace(config, guidance_scale=0.0)  # without a prompt there is nothing to be guided by
    samples = fill_masks(model, [[MASK] * length] * num_chunks, settings, seed)
    exact = [exact_left_to_right(model, torch.tensor([*x], device=x0.device)).mean() for x in samples]
    rows.append(("of its samples", "exact", exact, "bits/byte", f"{num_chunks} free samples of {length} bytes"))
    rows += [(name, "other", *row) for name, row in text_statistics(samples, training_text).items()]
    return [figure(*row) for row in rows]


def likelihood_figures(model, measured, x0):
    """Bounds from what `measure_chunks` returned, and exact likelihoods of the chunks x0 [B, L]."""
    lengths, *measured = measured
    rows = [("nelbo", "bound", measured[1], "bits/byte", "whole text, one mask a chunk", lengths)]
    for end, bits, hits in by_mask_ratio(*measured):
        rows.append((f"masked to {end} %", "bound", bits, "bits/byte", "chunks with so many masks"))
        rows.append((f"hits to {end} %", "other", hits, "share", "masked bytes that the most probable byte hits"))
    half = x0.shape[1] // 2
    swapped = torch.cat([x0.roll(1, dims=0)[:, :half], x0[:, half:]], dim=1)
    exact = torch.stack([exact_left_to_right(model, x) for x in x0])  # [B, L]
    surest_first = exact_most_confident_first(model, x0)
    after_others = torch.stack([exact_left_to_right(model, x, start=half) for x in swapped]).mean(dim=1)
    after_others = after_others if len(x0) > 1 else after_others[:0]  # a single chunk has no other to swap with
    return [
        *rows,
        ("left to right", "exact", exact.mean(dim=1), "bits/byte", f"{len(x0)} chunks; as of autoregressive models"),
        ("surest first", "exact", surest_first, "bits/byte", "the same chunks in another order"),
        ("continuation", "exact", exact[:, half:].mean(dim=1), "bits/byte", "second half of a chunk, given the first"),
        ("its prompt swapped", "exact", after_others, "bits/byte", "second half, given the first of another chunk"),
    ]


def infilling_hits(model, x0, hole, config, seed):
    """Share of the bytes in a hole amid each chunk of x0 [B, L] that come out as they were: [B]."""
    start = (x0.shape[1] - hole) // 2
    texts = [[*x[:start], *[MASK] * hole, *x[start + hole :]] for x in x0.tolist()]
    filled = torch.tensor([list(text) for text in fill_masks(model, texts, config, seed)], device=x0.device)
    return (filled == x0)[:, start : start + hole].float().mean(dim=1)


def as_table(figures):
    lines = [f"{'':<20}{'bound':<18}{'exact':<18}{'other':<18}"]
    for row in figures:
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
        number = "none" if row["value"] is None else f"{row['value']:.4f}{error}"
        cells = "".join(f"{number if row['kind'] == kind else '':<18}" for kind in ("bound", "exact", "other"))
        lines.append(f"{row['figure']:<20}{cells}{row['unit']}: {row['about']}")
    return "\n".join(lines)


def continue_validation_prompts(model, dataset, config, on_step=None):
    """Cut prompts at evenly spaced places of the validation text and continue them; returns a list of (prompt,
    response, true continuation), as bytes: five eighths of max_length prompt, three eighths response."""
    prompt_length = config.max_length * 5 // 8
    chunks = [len(dataset) * number // config.num_samples for number in range(config.num_samples)]
    x0 = [bytes(b for b in dataset[chunk].tolist() if b != PAD) for chunk in chunks]
    texts = [[*x[:prompt_length], *[MASK] * len(x[prompt_length:])] for x in x0]
    filled = fill_masks(model, texts, config, on_step=on_step)
    return [(x[:prompt_length], y[prompt_length:], x[prompt_length:]) for x, y in zip(x0, filled)]


# === Optimizer and schedule ===========================================================================================


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalized update, for matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    torch.optim.Muon does so by five fixed steps in bfloat16, one matrix after the other. On a CPU without bf16
    arithmetic its products are a hundred times slower than float32. So a CPU stays in float32 here, and matrices of one
    shape are stacked, their momentum in the first's state.
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
            average = self.state[matrices[0]].setdefault("momentum_buffer", torch.zeros_like(gradients))
            average.lerp_(gradients, 1 - momentum)
            update = orthogonalize(gradients.lerp(average, momentum)).to(gradients.dtype)  # Nesterov's momentum
            scale = max(1, gradients.shape[1] / gradients.shape[2]) ** 0.5
            torch._foreach_add_(matrices, list(update), alpha=-group["lr"] * scale)


def orthogonalize(matrices):
    """About U V^T for each matrix U S V^T of the stack [N, rows, columns]: three odd polynomials, each the best of its
    degree for what the one before leaves (the method of Polar Express, arXiv 2505.16932), take all singular values from
    1 % of the Frobenius norm on to 0.73..1.27. Muon's own five steps reach 0.7..1.2."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x.mT if matrices.shape[1] > matrices.shape[2] else x  # the Gram matrix of the shorter side
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in POLYNOMIALS:  # a x + b x^3 + c x^5
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


POLYNOMIALS = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)


def build_optimizers(model, config):
    """[AdamW, Muon]: Muon for the matrices of the blocks, AdamW (arXiv 1711.05101) for embedding, head and vectors; or
    AdamW alone if muon_learning_rate is 0. Weight decay is AdamW's, decoupled and on matrices only."""
    hidden = [module.weight for module in model.layers.modules() if isinstance(module, nn.Linear)]
    matrices = [model.tok_embeddings.weight, model.output.weight] + ([] if config.muon_learning_rate else hidden)
    taken = {id(p) for p in matrices + hidden}
    vectors = [p for p in model.parameters() if id(p) not in taken]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    return [adamw, Muon(hidden, lr=config.muon_learning_rate)] if config.muon_learning_rate else [adamw]


def learning_rate_scale(config, step, minutes):
    """Factor of the peak learning rate: linear warm-up, then linear decay to zero at max_steps or max_minutes,
    whichever comes first. A function of the step and the clock alone, hence nothing to save or to restore."""
    progress = max(step / config.max_steps, minutes / config.max_minutes if config.max_minutes else 0.0)
    return min(1.0, (step + 1) / (config.warmup_steps + 1)) * max(0.0, 1.0 - progress)


# === Checkpoints ======================================================================================================

CHECKPOINT_VERSION = 2


class TrainingState:
    """Everything that changes while training, hence what a checkpoint holds. The state of random generators is not
    among it: each step seeds them anew from its number (see `derive_seed`)."""

    def __init__(self, config):
        self.config, self.step, self.minutes, self.best_bound = config, 0, 0.0, math.inf
        torch.manual_seed(config.seed)
        self.model = MaskPredictor(config).to(config.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)  # exponential moving average of the weights
        self.optimizers = build_optimizers(self.model, config)
        self.scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.amp_dtype == "fp16")

    def state_dict(self):
        return {
            "version": CHECKPOINT_VERSION,
            "config": dataclasses.asdict(self.config),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "minutes": self.minutes,
            "best_bound": self.best_bound,
        }

    def load_state_dict(self, state):
        """Raises InputError if the state is that of another CONFIG."""
        try:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise InputError(f"the checkpoint does not fit this CONFIG, leave out what changes it ({reason})") from None
        self.step, self.minutes, self.best_bound = state["step"], state["minutes"], state["best_bound"]


def save_checkpoint(run_dir, name, state, **extra):
    """Write beside, then rename: whenever the process dies there is a whole file, the new one, the old one or, between
    the two renamings of latest.pt, the old one as previous.pt. Returns whether it could be written."""
    if rank() != 0:
        return True
    path, temporary = run_dir / name, run_dir / f"{name}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state.state_dict() | extra, file)
            file.flush()
            os.fsync(file.fileno())
        if name == "latest.pt" and path.exists():
            os.replace(path, run_dir / "previous.pt")
        os.replace(temporary, path)
        return True
    except (OSError, RuntimeError) as error:  # on a full disk torch.save raises a RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        message = f"{path} cannot be written ({str(error).splitlines()[0]}); the checkpoint before it is untouched"
        if state.config.stop_if_unsaved:
            raise TrainingError(message) from None
        say(f"warning: {message}")
        return False


def read_checkpoint(path):
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares with the CRC-32 of each record, which torch.load does not
        if damaged:
            raise InputError(f"{damaged} does not have its checksum: the file is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)  # weights_only: a pickle cannot run code
    except PermissionError:
        raise  # says nothing of what the file holds
    except Exception as error:  # noqa: BLE001  damaged files make zipfile and torch.load raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a readable checkpoint ({reason[:120]})") from None
    is_ours = isinstance(state, dict) and isinstance(state.get("config"), dict)
    version = state.get("version") if is_ours else None
    if version != CHECKPOINT_VERSION:
        raise InputError(f"{path}: a checkpoint of version {version}, and this program reads {CHECKPOINT_VERSION}")
    return state


def resumable_checkpoint(run_dir):
    """The state in latest.pt. If that is damaged it is put aside and previous.pt, the one before it, is taken."""
    latest, previous = run_dir / "latest.pt", run_dir / "previous.pt"
    try:
        return read_checkpoint(latest)
    except InputError as error:
        if not previous.exists():
            raise
        state = read_checkpoint(previous)
        say(f"warning: {error}; going on from {previous}, step {state['step']:,}")
    if rank() == 0 and latest.exists():
        os.replace(latest, run_dir / "damaged.pt")
    return state


def saved_config(state, **overrides):
    """The CONFIG of a checkpoint. A field that this file no longer has is an InputError, a new one gets its default."""
    unknown = state["config"].keys() - {field.name for field in dataclasses.fields(CONFIG)}
    if unknown:
        raise InputError(f"the checkpoint has fields that CONFIG no longer has: {', '.join(sorted(unknown))}")
    return CONFIG(**{**state["config"], **overrides})


def newest_run():
    checkpoints = [*Path("runs").glob("*/latest.pt"), *Path("runs").glob("*/previous.pt")]
    if not checkpoints:
        raise InputError("runs: no run with a checkpoint; train one first with: python main.py")
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent


def load_checkpoint(path, device="auto"):
    """A trained model, ready to evaluate and to sample.

    Args:
        path: a checkpoint file, or a run's folder, which means its best.pt (before any validation: latest.pt).
        device: as in CONFIG; it need not be the one of the training.

    Returns:
        (model in eval mode with the averaged weights, its CONFIG, the checkpoint's dict).

    Raises:
        InputError: the file is missing, damaged or not a checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        paths = [path / name for name in ("best.pt", "latest.pt", "previous.pt")]
        path = next((path for path in paths if path.exists()), paths[1])
    state = read_checkpoint(path)
    config = saved_config(state, device=device, amp_dtype="auto")
    model = MaskPredictor(config).to(config.device).eval().requires_grad_(False)
    try:
        model.load_state_dict(state["ema"])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its weights are not of its CONFIG ({str(error).splitlines()[-1].strip()})") from None
    return model, config, state


# === Logging ==========================================================================================================


def say(text):
    """Print a line above the progress bar, once per run."""
    if rank() == 0:
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError as error:  # a closed pipe, a full disk: the run matters more than what it says
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered must go somewhere
            with suppress(OSError):
                print(f"warning: the standard output is gone ({error.strerror}); going on without it", file=sys.stderr)


class Writer:
    """TensorBoard's writer; silent on every process but the first, and after a warning once the disk is full.
    Resumed runs give a purge_step: what they wrote from it on is no longer shown."""

    def __init__(self, folder, purge_step=None):
        from torch.utils.tensorboard import SummaryWriter  # imported late: it takes seconds

        self.writer = SummaryWriter(folder, purge_step=purge_step) if rank() == 0 else None

    def __getattr__(self, name):
        def write(*args, **kwargs):
            try:
                return self.writer and getattr(self.writer, name)(*args, **kwargs)
            except OSError as error:
                say(f"warning: TensorBoard's log cannot be written ({error.strerror}); training goes on without it")
                self.writer = None

        return write


CUSTOM_SCALARS = {  # and the other tabs sort by name: train and val come first, what is looked at less after them
    "bound": {
        "training and validation text": ["Multiline", ["train/bits_per_byte", "val/.*bits_per_byte"]],
        "by share of masks": ["Multiline", ["val_bits_by_mask_ratio/.*"]],
        "hits by share of masks": ["Multiline", ["val_hits_by_mask_ratio/.*"]],
    },
    "norms by group": {
        "of the gradients": ["Multiline", ["train_gradient_norm/.*"]],
        "of the weights": ["Multiline", ["weight_norm/.*"]],
    },
}


def describe_run(writer, config, step):
    """What TensorBoard shows of a run as a whole: CONFIG as text, its fields up to the sampling for HPARAMS, and which
    curves share a chart."""
    if rank() != 0:
        return
    from torch.utils.tensorboard.summary import hparams

    settings = dataclasses.asdict(config)
    writer.add_text("config", as_code("", json.dumps(settings, indent=2)), step)
    names = [*itertools.takewhile(lambda name: name != "remasking", settings), "seed"]
    settings = {name: settings[name] for name in names}
    settings |= {name: printable(os.fsencode(v)) for name, v in settings.items() if type(v) is str}
    writer.add_custom_scalars(CUSTOM_SCALARS)
    for summary in hparams(settings, dict.fromkeys(("val/final_bits_per_byte", "val/best_bits_per_byte"))):
        if writer.writer:  # its own add_hparams would make a second run of each run
            writer.writer.file_writer.add_summary(summary)


def bar_chart(values):
    """Bars of 0 to 8 bits with a line at each bit, uint8 [128, 24 * number of values]; none for nan."""
    height = torch.arange(128, 0, -1)[:, None]
    bars = torch.where(height <= 16 * torch.tensor(values), 64, 255)  # [128, values]
    bars[::16] = bars[::16] * 3 // 4
    return bars.repeat_interleave(24, dim=1).to(torch.uint8)


def make_run_dir(config):
    run_dir = Path("runs") / f"{config.name}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    while run_dir.exists():  # begun within the same second
        run_dir = run_dir.with_name(run_dir.name + "_2")
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    return run_dir


# === Many processes: each does the same on its share of the batch (torchrun sets RANK, WORLD_SIZE and LOCAL_RANK) =====


@contextmanager
def distributed_run(config):
    """Joins the processes of a torchrun, one GPU each; a plain `python main.py` passes through."""
    if "RANK" not in os.environ:
        yield
        return
    on_cuda = config.device.startswith("cuda")
    if on_cuda:
        config.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(config.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    try:
        yield
    finally:
        gc.collect()  # DDP's threads must not outlive the process group: else one run in thirty aborted at its exit
        dist.destroy_process_group()


@contextmanager
def explained_errors(config):
    """Says what to do about errors that torch raises in many forms: too little memory, another process that is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        too_large = "can't allocate memory" in reason or "Storage size" in reason
        if isinstance(error, torch.OutOfMemoryError) or too_large:
            names = "batch_size", "max_length", "model_dim", "ffn_dim", "num_layers"
            sizes = ", ".join(f"{name}={getattr(config, name)}" for name in names)
            raise TrainingError(f"out of memory with {sizes}; lower the first, or any of them ({reason})") from None
        if "DataLoader worker" in reason:
            raise TrainingError(f"a process that reads the text is gone; go on with --resume auto ({reason})") from None
        if isinstance(error, dist.DistError) or "gloo" in reason:
            raise TrainingError(f"another process is gone; go on with --resume auto ({reason})") from None
        raise


def rank():
    return int(os.environ.get("RANK", "0"))


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def over_processes(operation, numbers):
    """Each number's "max" or "sum" over all processes, float64: so they decide alike, and wait for each other."""
    numbers = torch.as_tensor(numbers, dtype=torch.double)
    if dist.is_initialized():
        dist.all_reduce(numbers, {"max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}[operation])
    return numbers


# === Training =========================================================================================================

FINAL_VALIDATION_BYTES = 2**20  # the bound told at the end is that of the whole validation text, up to this size


def autocast(config):
    dtype = AMP_DTYPES[config.amp_dtype]
    return torch.autocast(torch.device(config.device).type, dtype, enabled=dtype != torch.float32)


def sequence_length(config, step):
    """max_length or, in a share random_length_prob of the steps, a half, a quarter or an eighth of it: the batch is
    then cut into so many times more sequences (what a length does not divide is left out)."""
    rng = np.random.default_rng([config.seed, step])
    is_short = rng.random() < config.random_length_prob
    return max(1, config.max_length >> int(rng.integers(1, 4))) if is_short else config.max_length


def trial_step(forward, config):
    """Seconds that forward and backward take on a made-up batch."""
    started = time.monotonic()
    x0 = torch.zeros(config.batch_size, config.max_length, dtype=torch.int64, device=config.device)
    with autocast(config):
        masked_diffusion_loss(forward, x0).backward()
    float(next(forward.parameters()).grad.sum())  # waits for the GPU
    forward.zero_grad()
    return time.monotonic() - started


def compile_model(model, config):
    """torch.compile, tried on one batch; where it fails (no C++ compiler, Windows), one warning and the plain model."""
    if not config.compile:
        return model
    compiled = torch.compile(model, dynamic=False)
    try:
        say("compiling the model, which takes up to a minute ...")
        trial_step(compiled, config)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  whatever went wrong inside the compiler, training works without it
        say(f"warning: torch.compile does not work here ({type(error).__name__}); going on without it, which is slower")
        model.zero_grad()
        return model
    return compiled


def bytes_per_step(config):
    return config.batch_size * config.max_length * config.gradient_accumulation_steps * world_size()


def announce(config, state, train_set, validation_set, run_dir, trial_seconds):
    seconds = 1.25 * trial_seconds * config.gradient_accumulation_steps  # with optimizer and validations, on a CPU
    steps = config.max_steps
    if config.max_minutes:
        steps = min(steps, state.step + max(0, int(60 * (config.max_minutes - state.minutes) / seconds)))
    epochs = steps * bytes_per_step(config) / len(train_set.bytes)
    parameters = sum(p.numel() for p in state.model.parameters())
    gpu = f" ({torch.cuda.get_device_name(config.device)})" if config.device.startswith("cuda") else ""
    shape = f"{config.num_layers} layers, {config.model_dim} wide, {config.max_length} bytes of context"
    say(f"device      {config.device}{gpu}, {config.amp_dtype}, {world_size()} process(es), torch {torch.__version__}")
    say(f"model       {parameters:,} parameters: {shape}")
    say(f"training    {train_set.path}, {len(train_set.bytes):,} bytes")
    say(f"validation  {validation_set.path}, {len(validation_set.bytes):,} bytes")
    say(f"steps       {state.step:,} to {steps:,}, {bytes_per_step(config):,} bytes each, {epochs:.1f} epochs in all")
    say(f"duration    about {tqdm.format_interval(seconds * (steps - state.step))}")
    if rank() == 0:
        say(f"logs        {run_dir.resolve()}")
        say(f"watch       tensorboard --logdir={run_dir.parent.resolve()}")


def validate(state, train_set, validation_set, log):
    """Bounds and samples of the averaged weights, to console, TensorBoard and samples.txt; saves best.pt."""
    started = time.monotonic()
    config, model, step, writer = state.config, state.ema, state.step, log.writer
    train_bound, _ = estimate_nelbo(model, train_set, config.validation_bytes)
    lengths, *measured = measure_chunks(model, validation_set, config.validation_bytes)
    bound, error = mean_over_bytes(measured[1], lengths)
    is_best, state.best_bound = bound < state.best_bound, min(state.best_bound, bound)
    if rank() != 0:
        return
    say(f"step {step:,}: bound {bound:.3f} ± {error:.3f} bits per byte, on training text {train_bound:.3f}")
    writer.add_scalar("train/bits_per_byte", train_bound, step)
    writer.add_scalar("val/bits_per_byte", bound, step)
    writer.add_scalar("val/best_bits_per_byte", state.best_bound, step)
    log.vs_bytes.add_scalar("vs_bytes/bits_per_byte", bound, step * bytes_per_step(config))
    bins = [(end, bits.mean().item(), hits.mean().item()) for end, bits, hits in by_mask_ratio(*measured)]
    for end, bits, hits in bins:
        writer.add_scalar(f"val_bits_by_mask_ratio/to_{end:03d}_percent", bits, step)
        writer.add_scalar(f"val_hits_by_mask_ratio/to_{end:03d}_percent", hits, step)
    writer.add_image("val_bits_by_mask_ratio", bar_chart([bits for _, bits, _ in bins]), step, dataformats="HW")
    show_samples(state, validation_set, log, f"## step {step:,}: bound {bound:.3f} bits per byte\n\n")
    if is_best:
        save_checkpoint(log.run_dir, "best.pt", state)
    log.validating += time.monotonic() - started


def show_samples(state, validation_set, log, report):
    """Continued prompts beside the truth, and how the first of them came about."""
    canvases, config = [], state.config
    samples = continue_validation_prompts(state.ema, validation_set, config, lambda x: canvases.append(x[0].clone()))
    for texts in samples:
        for title, text in zip(("prompt", "model", "truth"), texts):
            say(f"    {title:<6}  {text.decode(errors='replace')!r}")
            report += as_code(title, text.decode(errors="replace"))
    for number in range(1, len(canvases), math.ceil(len(canvases) / 4) or 1):
        title = f"the first sample after {number} of {len(canvases) - 1} steps"
        report += as_code(title, show_masks(canvases[number].tolist()))
    if canvases:
        order = commit_order(canvases).repeat_interleave(4, 0).repeat_interleave(4, 1)
        log.writer.add_image("val_commit_order", order, state.step, dataformats="HW")
    log.writer.add_text("samples", report, state.step)
    with suppress(OSError), open(log.run_dir / "samples.txt", "a", encoding="utf-8") as file:  # a disk may be full
        file.write(report)


def as_code(title, text):
    return f"{title}\n\n" + "".join(f"    {line}\n" for line in text.splitlines()) + "\n"


@contextmanager
def stop_signals():
    """A list that receives SIGINT or SIGTERM, so that training can end in order; a second signal ends it at once."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def backward_pass(forward, scaler, batches, config, step):
    """One step's gradients, averaged over its micro-batches (and over the processes, by DDP).

    The noise is drawn for the whole global batch and cut into rows, so that any split of the same batch into processes
    and micro-batches gives the same masks. Returns the loss, a scalar on the device, in nats per byte: that of the mask
    shares of `bell_quantile`, no likelihood. `estimate_nelbo` tells the bound.
    """
    length = sequence_length(config, step)
    pieces = config.max_length // length
    num_rows, splits = config.batch_size * pieces, config.gradient_accumulation_steps
    generator = torch.Generator(config.device).manual_seed(derive_seed(config.seed, step))
    t, scores = draw_noise(num_rows * splits * world_size(), length, generator)
    t = bell_quantile(t, config.mask_ratio_std)
    torch.manual_seed(derive_seed(config.seed, step, 1 + rank()))  # for dropout
    total = torch.zeros((), device=config.device)
    for micro_batch in range(splits):
        first = (micro_batch * world_size() + rank()) * num_rows
        rows = slice(first, first + num_rows)
        with record_function("fetch"):
            x0 = next(batches)[:, : pieces * length].reshape(num_rows, length)
        attention_mask = (x0 != PAD).to(config.device) if (x0 == PAD).any() else None  # once an epoch, seldom compiled
        x0 = x0.to(config.device, non_blocking=True)
        is_last = micro_batch == splits - 1
        with nullcontext() if is_last or not dist.is_initialized() else forward.no_sync():
            with record_function("forward and loss"), autocast(config):
                loss = masked_diffusion_loss(forward, x0, t[rows], scores[rows], attention_mask) / splits
            with record_function("backward"):
                scaler.scale(loss).backward()
        total += loss.detach()
    return total


@torch.no_grad()
def optimizer_step(state, scale):
    """Clip, update and average the weights. Returns the gradient norms before clipping, see `norms_by_group`. Raises
    FloatingPointError, the weights as before, if one is not finite; in fp16 such a step is skipped instead, and the
    GradScaler lowers its scale."""
    config, scaler = state.config, state.scaler
    for optimizer, peak in zip(state.optimizers, (config.learning_rate, config.muon_learning_rate)):
        for group in optimizer.param_groups:
            group["lr"] = scale * peak
        scaler.unscale_(optimizer)
    norms = norms_by_group(state.model, lambda parameter: parameter.grad)
    nn.utils.clip_grads_with_norm_(state.model.parameters(), config.gradient_clip_val, norms["all"])
    if norms["all"].isfinite():  # waits for the device
        for optimizer in state.optimizers:
            scaler.step(optimizer)
    elif not scaler.is_enabled():
        raise FloatingPointError(", ".join(f"{name} {norm.item():.3g}" for name, norm in norms.items()))
    scaler.update()
    state.model.zero_grad()
    with record_function("average of the weights"):  # PyTorch's AveragedModel would wait for the GPU at each step
        decay = min(config.ema_decay, (1 + state.step) / (10 + state.step))  # a shorter memory at first
        torch._foreach_lerp_(list(state.ema.parameters()), list(state.model.parameters()), 1 - decay)
    return norms


def norms_by_group(model, tensor_of):
    """The Euclidean norm of tensor_of(parameter) for embedding, each layer, head and all together."""
    groups = {"embedding": model.tok_embeddings, "head": nn.ModuleList([model.norm, model.output])}
    groups |= {f"layer_{number}": layer for number, layer in enumerate(model.layers)}
    norms = {name: nn.utils.get_total_norm([tensor_of(p) for p in part.parameters()]) for name, part in groups.items()}
    return norms | {"all": torch.stack(list(norms.values())).norm()}


class StepLog:
    """Collects losses on the device; every `log_every` steps their mean goes to TensorBoard and to a tqdm bar or, where
    the output is no terminal, to a plain line every ten seconds."""

    def __init__(self, state, run_dir):
        self.state, self.config, self.run_dir, self.next_line, self.validating = state, state.config, run_dir, 0.0, 0.0
        self.writer = Writer(run_dir, state.step + 1)
        self.vs_bytes = Writer(run_dir and run_dir / "vs_bytes", state.step * bytes_per_step(state.config) + 1)
        describe_run(self.writer, state.config, state.step)
        hidden = rank() != 0 or not sys.stdout.isatty()
        shape = "{desc} |{bar}|"  # a narrow terminal cuts the bar, not the text
        self.bar = tqdm(
            total=self.config.max_steps, initial=state.step, file=sys.stdout, disable=hidden, bar_format=shape
        )
        self.restart()

    def restart(self):
        """Begin a new interval: time spent before it, as for a validation, is not the training's."""
        self.started, self.first_step, self.losses = time.monotonic(), self.state.step, []

    def close(self):
        self.bar.close()
        self.writer.close()
        self.vs_bytes.close()

    def add(self, loss, norms, scale):
        """After each step: note its loss, and write where something is due."""
        self.losses.append(loss)
        self.norms, self.scale = norms, scale
        config, step = self.config, self.state.step
        if not all(step % every for every in (config.log_every, config.validate_every, config.checkpoint_every)):
            self.write()

    def write(self):
        """Write the interval, if any; always called before saving. Raises TrainingError if a loss was not finite."""
        if not self.losses:
            return
        config, step, writer = self.config, self.state.step, self.writer
        mean = torch.stack(self.losses).mean().item()  # waits for the device
        loss = over_processes("sum", [mean]).item() / world_size()
        norms = {name: norm.item() for name, norm in self.norms.items()}
        if not math.isfinite(loss):  # in fp16, where the GradScaler has skipped the steps
            raise TrainingError(f"the loss is {loss} since step {self.first_step}; use --amp_dtype bf16 or fp32")
        seconds, steps = time.monotonic() - self.started, step - self.first_step
        bytes_seen, bytes_per_second = step * bytes_per_step(config), steps * bytes_per_step(config) / seconds
        left = (config.max_steps - step) * seconds / steps
        left = min(left, max(0, 60 * (config.max_minutes - self.state.minutes))) if config.max_minutes else left
        learning_rate = self.scale * config.learning_rate
        writer.add_scalar("train/loss", loss, step)
        writer.add_scalar("train/learning_rate", learning_rate, step)
        writer.add_scalar("train/bytes_per_second", bytes_per_second, step)
        writer.add_scalar("train/gradient_norm", norms.pop("all"), step)
        self.vs_bytes.add_scalar("vs_bytes/loss", loss, bytes_seen)
        weights = norms_by_group(self.state.model, torch.detach)
        for kind, group in (("train_gradient_norm", norms), ("weight_norm", weights)):
            for name, norm in group.items():
                writer.add_scalar(f"{kind}/{name}", norm, step)
        text = f"step {step:,}/{config.max_steps:,}  loss {loss:.3f} nats/byte  lr {learning_rate:.2e}  "
        text += f"{bytes_per_second:,.0f} bytes/s  {tqdm.format_interval(left)} left"
        self.bar.update(step - self.bar.n)
        self.bar.set_description_str(text)
        if self.bar.disable and time.monotonic() >= self.next_line:
            say(text)
            self.next_line = time.monotonic() + 10
        self.restart()


def stop_for_autopsy(state, loss, norms, train_set, run_dir):
    """Raises TrainingError for a step that was not taken, having saved what led to it beside the good checkpoints."""
    batches = itertools.islice(batch_indices(state.config, state.step), state.config.gradient_accumulation_steps)
    phases, offsets = train_set.locate(list(itertools.chain(*batches)))
    starts = (train_set.start + (phases[:, 0] + offsets[:, 0]) % len(train_set.bytes)).tolist()
    save_checkpoint(run_dir, "not_finite.pt", state, offsets=starts, gradient_norms=norms)
    raise TrainingError(
        f"the gradient of step {state.step + 1} is not finite and was not applied (loss {loss.item():.3g}; norms: "
        f"{norms}); its sequences begin at the bytes {', '.join(map(str, starts[:8]))}{' ...' * (len(starts) > 8)} of "
        f"{train_set.path}; not_finite.pt holds the weights before it, latest.pt the last good checkpoint; lower "
        "--learning_rate and --muon_learning_rate, or use --amp_dtype fp32"
    )


def train(config, received, run_dir=None, checkpoint=None):
    """Train as `config` says, from the start or on from a checkpoint of run_dir; a signal in `received`, the list of
    `stop_signals`, ends the run after the step. Returns the exit code: 0, or 128 + the signal that ended it. Raises
    TrainingError: the gradient was not finite, or the last checkpoint could not be written."""
    started = time.monotonic()
    if not checkpoint:
        write_starter_corpus(config)
    train_set, validation_set = open_datasets(config)
    state = TrainingState(config)
    if checkpoint:
        state.load_state_dict(checkpoint)
        started -= 60 * state.minutes
        for leftover in run_dir.glob("*.tmp"):  # of a process that was killed while it saved
            leftover.unlink(missing_ok=True)
    elif rank() == 0:
        run_dir = make_run_dir(config)
    forward = compile_model(state.model, config)
    trial_step(forward, config)  # the first one warms up
    announce(config, state, train_set, validation_set, run_dir, trial_step(forward, config))
    if dist.is_initialized():
        forward = nn.parallel.DistributedDataParallel(forward, forward_sync_buffers=False)
    batches = iter(data_loader(train_set, config, state.step))
    signal_number = 0
    eager = torch.compiler.set_stance("eager_on_recompile")  # seldom other shapes are not worth a compilation
    with eager, closing(StepLog(state, run_dir)) as log:
        while state.step < config.max_steps:
            minutes = (time.monotonic() - started) / 60
            state.minutes, signal_number = over_processes("max", [minutes, max(received, default=0)]).tolist()
            if signal_number or (config.max_minutes and state.minutes >= config.max_minutes):
                break
            scale = learning_rate_scale(config, state.step, state.minutes)
            loss = backward_pass(forward, state.scaler, batches, config, state.step)
            try:
                norms = optimizer_step(state, scale)
            except FloatingPointError as error:
                stop_for_autopsy(state, loss, str(error), train_set, run_dir)
            state.step += 1
            log.add(loss, norms, scale)
            is_last = state.step == config.max_steps  # is validated and saved below
            if state.step % config.validate_every == 0 and not is_last:
                validate(state, train_set, validation_set, log)
                log.restart()
            if state.step % config.checkpoint_every == 0 and not is_last:
                save_checkpoint(run_dir, "latest.pt", state)
        log.write()
        if not signal_number:
            validate(state, train_set, validation_set, log)
        if not save_checkpoint(run_dir, "latest.pt", state):
            raise TrainingError(f"step {state.step:,} could not be saved to {run_dir}; make room and use --resume")
        if signal_number:
            say(f"stopped at step {state.step:,} and saved; go on with: python main.py --resume '{run_dir}'")
            return 128 + int(signal_number)
        bound, error = estimate_nelbo(state.ema, validation_set, FINAL_VALIDATION_BYTES)
        log.writer.add_scalar("val/final_bits_per_byte", bound, state.step)
    evaluated = min(len(validation_set.bytes), FINAL_VALIDATION_BYTES)
    minutes, validating = tqdm.format_interval(60 * state.minutes), tqdm.format_interval(log.validating)
    say(f"done: {state.step:,} steps in {minutes}; all validations took {validating}")
    say(f"final bound on {evaluated:,} bytes of validation text: {bound:.3f} ± {error:.3f} bits per byte")
    say(f"try the best checkpoint: python main.py generate --checkpoint '{run_dir}' --watch")
    return 128 + received[0] if received else 0


# === Profile ==========================================================================================================


def seconds_of(function, config):
    wait = (lambda: None) if config.device == "cpu" else torch.accelerator.synchronize
    wait()
    started = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - started


def flops_per_byte(model, config):
    """Of training: 6 for each weight of a matrix product and 12 L D for each layer's attention, the usual count (PaLM,
    arXiv 2204.02311, appendix B). Looking up embeddings costs none."""
    if config.attention == "mla":
        width = config.num_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim) / 2
    else:
        width = config.model_dim
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return 6 * weights + 12 * config.num_layers * config.max_length * width


def trace_parts(state, train_step, trace_file, steps=5):
    """Milliseconds per step of each part of an eager step (a compiled one has none); writes the profiler's trace."""
    model, parts = state.model, ["embedding", "convolution", "attention", "feed-forward", "head"]
    kinds = nn.Embedding, DepthwiseConvolution, Attention, FeedForward
    found = [
        (part, module) for part, kind in zip(parts, kinds) for module in model.modules() if isinstance(module, kind)
    ]
    for part, module in [*found, ("head", model.output)]:
        module.forward = record_function(part)(module.forward)
    train_step(model)
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            record_function("step")(train_step)(model)
    profiler.export_chrome_trace(str(trace_file))
    on_cuda = next(model.parameters()).is_cuda
    total = dict.fromkeys(parts, 0.0)
    for event in profiler.key_averages():  # of one name there may be two, of the CPU and of the GPU
        total[event.key] = max(total.get(event.key, 0.0), event.device_time_total if on_cuda else event.cpu_time_total)
    total["optimizer"] = sum(time for key, time in total.items() if key.startswith("Optimizer.step"))
    total["norms, masks, loss"] = total["forward and loss"] - sum(total[name] for name in parts)
    shown = ["fetch", *parts, "norms, masks, loss", "backward", "optimizer", "average of the weights"]
    return {name: total[name] / steps / 1e3 for name in shown} | {"whole step": total["step"] / steps / 1e3}


def profile(config, steps=20):
    """Print the speed of training, its share of the measured ceiling, the memory and the parts of a step. Returns 0."""
    config = dataclasses.replace(config, random_length_prob=0.0)  # all steps alike
    write_starter_corpus(config)
    train_set, _ = open_datasets(config)
    state = TrainingState(config)
    batches = iter(data_loader(train_set, config, 0))

    def train_step(forward):
        backward_pass(forward, state.scaler, batches, config, step=0)
        optimizer_step(state, 1e-3)

    forward = compile_model(state.model, config)
    size = 8192 if config.device.startswith("cuda") else 1024
    matrix = torch.randn(size, size, device=config.device, dtype=AMP_DTYPES[config.amp_dtype])
    tasks = (lambda: matrix @ matrix), (lambda: train_step(forward))  # the ceiling and the step, measured in turn
    times = [[seconds_of(task, config) for task in tasks] for _ in range(3 + steps)]
    product_seconds, step_seconds = np.median(times[3:], axis=0)  # the first three warm up
    step_bytes = bytes_per_step(config)
    flops, ceiling = flops_per_byte(state.model, config) * step_bytes / step_seconds, 2 * size**3 / product_seconds
    kept = itertools.chain(state.model.parameters(), state.model.parameters(), state.ema.parameters())
    kept = itertools.chain(kept, *(values.values() for o in state.optimizers for values in o.state.values()))
    state_bytes = sum(tensor.nbytes for tensor in kept)
    step_ms, share = step_seconds * 1e3, flops / ceiling
    shape = f"{config.num_layers} x {config.model_dim}"
    print(f"{config.device} {config.amp_dtype}, {shape}, {step_bytes:,} bytes per step")
    print(f"speed    {step_bytes / step_seconds:,.0f} bytes/s, {step_ms:,.1f} ms per step, median of {steps}")
    print(f"compute  {flops / 1e9:,.1f} GFLOP/s, {share:.0%} of {ceiling / 1e9:,.1f} of a large matrix product")
    print(f"memory   {state_bytes / 2**20:,.1f} MiB of weights, their average, gradients and optimizer state")
    if config.device.startswith("cuda"):
        del matrix, tasks  # are not the training's
        torch.cuda.reset_peak_memory_stats()
        train_step(forward)
        print(f"peak     {torch.cuda.max_memory_allocated() / 2**20:,.1f} MiB, activations included")
    run_dir = make_run_dir(dataclasses.replace(config, name=f"profile_{config.name}"))
    parts = trace_parts(state, train_step, run_dir / "trace.json")
    print("parts of a step that is not compiled, in milliseconds:")
    for name, milliseconds in parts.items():
        print(f"{milliseconds:10.2f}  {milliseconds / parts['whole step']:4.0%}  {name}")
    print(f"trace    {run_dir / 'trace.json'} (open it in ui.perfetto.dev)")
    return 0


# === Command line =====================================================================================================


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, with a suggestion for a misspelt flag."""

    def __init__(self, program, description):
        super().__init__(program, description=description, allow_abbrev=False)

    def error(self, message):
        raise InputError(message)

    def parse_args(self, argv):
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            known = [*self._option_string_actions, *COMMANDS]
            close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            hint = "a command comes first" if unknown[0] in COMMANDS else hint
            raise InputError(f"unknown argument {unknown[0]}; {hint}")
        return arguments


def parse_bool(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def add_config_flags(parser, only=None):
    """One flag for each field of CONFIG, explained by the comment behind the field."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", Path(__file__).read_text("utf-8"), re.MULTILINE))
    for field in dataclasses.fields(CONFIG):
        if only is None or field.name in only:
            default = field.default
            if field.metadata:
                default = "{cpu} on a CPU, {gpu} on a GPU".format(**field.metadata)
            parser.add_argument(
                f"--{field.name}",
                type=parse_bool if field.type is bool else field.type,
                default=argparse.SUPPRESS,  # only flags that were given override
                metavar=field.type.__name__.upper(),
                help=f"{comments.get(field.name, '')} (default: {default})".replace("%", "%%"),
            )


def train_command(argv):
    parser = OneLineParser("main.py", "Train. Other commands: " + ", ".join(COMMANDS))
    parser.add_argument("--resume", metavar="RUN", help="go on with this run's folder, or with the newest: auto")
    add_config_flags(parser)
    overrides = vars(parser.parse_args(argv))
    run_dir, checkpoint = overrides.pop("resume"), None
    if run_dir is not None:
        run_dir = newest_run() if run_dir == "auto" else Path(run_dir)
        checkpoint = resumable_checkpoint(run_dir)
    config = saved_config(checkpoint, **overrides) if checkpoint else CONFIG(**overrides)
    with explained_errors(config), stop_signals() as received, distributed_run(config):
        return train(config, received, run_dir, checkpoint)


def load_for_command(parser, fields, argv):
    """The parsed arguments, the model of --checkpoint, its CONFIG with the other flags put into it, the checkpoint's
    path and its step."""
    parser.add_argument("--checkpoint", metavar="PATH", help="a checkpoint or a run's folder (default: the newest run)")
    add_config_flags(parser, fields)
    arguments = parser.parse_args(argv)
    path = newest_run() if arguments.checkpoint is None else Path(arguments.checkpoint)
    model, config, state = load_checkpoint(path, getattr(arguments, "device", "auto"))
    overrides = {name: value for name, value in vars(arguments).items() if hasattr(config, name)}
    return arguments, model, dataclasses.replace(config, **overrides), path, state["step"]


def generate_command(argv):
    fields = [field.name for field in dataclasses.fields(CONFIG)]
    fields = fields[fields.index("remasking") : fields.index("num_samples")] + ["seed", "device"]
    parser = OneLineParser("main.py generate", "Write text after a prompt, before a suffix, or into holes.")
    parser.add_argument("--prompt", default="", help="text to continue; {12} in it is a hole of 12 bytes")
    parser.add_argument("--suffix", default="", help="text to lead up to, which may have such holes, too")
    parser.add_argument(
        "--response_length", type=int, help="bytes to write (default: up to max_length, 0 if the prompt has holes)"
    )
    parser.add_argument("--samples", type=int, default=1, help="how many, in one batch, with seeds from --seed on")
    parser.add_argument("--watch", action="store_true", help="show the text crystallize, step by step, in a terminal")
    arguments, model, config, path, step = load_for_command(parser, fields, argv)
    require(0 < arguments.samples <= 4096, "samples", arguments.samples, "1 to 4096")
    prompt, suffix = holes_to_masks(arguments.prompt), holes_to_masks(arguments.suffix)
    given, length = prompt + suffix, arguments.response_length
    if length is None:
        length = 0 if MASK in given else config.max_length - len(given)
        accepted = f"below max_length={config.max_length}, or give --response_length"
        require(length > 0 or MASK in given, "prompt", f"{len(given)} bytes", accepted)
    text, on_step = text_with_hole(prompt, length, suffix, config), CanvasView() if arguments.watch else None
    with explained_errors(config):
        samples = fill_masks(model, [text] * arguments.samples, config, on_step=on_step)
    for number, filled in enumerate(samples):
        if arguments.samples > 1:
            print(f"--- seed {config.seed + number}")
        print(printable(filled) if sys.stdout.isatty() else filled.decode(errors="replace"))
    print(f"({path}, step {step:,})", file=sys.stderr)
    return 0


def holes_to_masks(text):
    """ "a{3}b" as [97, MASK, MASK, MASK, 98]."""
    parts = re.split(r"\{([0-9]{1,6})\}", text)  # text and lengths of holes in turn
    return [token for i, part in enumerate(parts) for token in ([MASK] * int(part) if i % 2 else os.fsencode(part))]


MEMORIZED_BYTES = 2**26  # samples are compared with so much of the training text


def evaluate_command(argv):
    fields = ("train_data_file", "validation_data_file", "max_length", "temperature", "seed", "device")
    parser = OneLineParser("main.py evaluate", "Likelihoods, infilling and samples of a model, with their errors.")
    parser.add_argument("--file", metavar="TEXT", help="another text to evaluate on")
    parser.add_argument("--chunks", type=int, default=16, help="chunks, holes and samples of each figure but the bound")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments, model, config, path, step = load_for_command(parser, fields, argv)
    require(1 < arguments.chunks <= 4096, "chunks", arguments.chunks, "2 to 4096")
    with redirect_stdout(sys.stderr):  # notices; the standard output is for the figures
        train_set, dataset = open_datasets(config)
    if arguments.file is not None:
        dataset = ByteLevelTextDataset(arguments.file, config.max_length)
    training_text = train_set.bytes[:MEMORIZED_BYTES].tobytes()
    with explained_errors(config):
        figures = evaluate(model, config, dataset, training_text, arguments.chunks, getattr(arguments, "seed", 0))
    print(json.dumps(figures, indent=2) if arguments.json else as_table(figures))
    writer = Writer(path.parent if path.is_file() else path)
    known = [row for row in figures if row["value"] is not None]
    for row in known:
        writer.add_scalar("evaluate/" + row["figure"].replace(" ", "_"), row["value"], step)
    curve = [row["value"] or math.nan for row in figures if row["figure"].startswith("masked to")]
    writer.add_image("evaluate/bits_by_mask_ratio", bar_chart(curve), step, dataformats="HW")
    writer.add_text("evaluate", as_code(printable(os.fsencode(dataset.path)), as_table(figures)), step)
    writer.close()
    print(f"({path}, step {step:,}, {dataset.path}, {len(dataset.bytes):,} bytes)", file=sys.stderr)
    return 0


def profile_command(argv):
    parser = OneLineParser("main.py profile", "Where a training step's time goes.")
    add_config_flags(parser)
    config = CONFIG(**vars(parser.parse_args(argv)))
    with explained_errors(config):
        return profile(config)


COMMANDS = {"generate": generate_command, "evaluate": evaluate_command, "profile": profile_command}


def main(argv=None):
    """Run the command line `argv` (default: sys.argv). Returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  the shell's >&- closes it
    if hasattr(sys.stdout, "reconfigure"):  # not so in a notebook
        sys.stdout.reconfigure(errors="replace")  # a console that is not UTF-8 shows what it can
    command, rest = (COMMANDS[argv[0]], argv[1:]) if argv and argv[0] in COMMANDS else (train_command, argv)
    try:
        return command(rest)
    except (InputError, TrainingError, OSError) as error:
        reason = str(error).strip().rpartition("\n")[2].rpartition("InputError: ")[2]  # a worker's has its traceback
        print("error:", *reason.splitlines(), file=sys.stderr)  # one line, whatever was typed
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:  # before or after the training loop, which catches the signal itself
        return 130


if __name__ == "__main__":
    sys.exit(main())
