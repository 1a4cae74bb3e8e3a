"""Other trainers' recipes at the size of `main.py` on a CPU, for the README's curves. In a folder with both texts:

    python tests/tools/baselines.py nanogpt          GPT-2's network, AdamW, cosine decay (github.com/karpathy/nanoGPT)
    python tests/tools/baselines.py nanodlm          masked diffusion with that network, independent masks, weight 1/t
                                               (github.com/SoumilBhandari/nanoDLM, without self-conditioning)
    python tests/tools/baselines.py tiny_diffusion   RMSNorm, RoPE, QK-norm, squared ReLU, mean over all masks,
                                               constant rate (github.com/nathan-barry/tiny-diffusion, version 2)

Written anew after what these projects publish. Theirs: network, objective, optimizer, schedule, and an alphabet of the
training text's characters. Ours: 4 blocks 128 wide, 8 x 256 bytes a step, no dropout, torch.compile, bf16 where
`main.py` takes it, the learning rate (by default 3e-3 for all, tuned for nanoGPT alone; theirs, 3e-4 to 1e-3, are for
ten times the size), the end by the clock, which starts after compilation, the last weights rather than the best, and
the evaluation: that of `main.py`, on the same chunks. As in its twin, an autoregressive network has nothing in view at
the first byte of a chunk, which is coded by its frequency here. TensorBoard's logs go to runs/NAME_sSEED.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import main

WIDTH, BLOCKS, HEADS, LENGTH, ROWS = 128, 4, 4, 256, 8


class RMSNorm(nn.Module):
    """Without weights."""

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:])


class Block(nn.Module):
    def __init__(self, is_causal, is_plain):
        super().__init__()
        self.is_causal, self.is_plain = is_causal, is_plain
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, bias=False) if is_plain else RMSNorm() for _ in range(2))
        self.qkv, self.up = (nn.Linear(WIDTH, factor * WIDTH, bias=False) for factor in (3, 4))
        self.out, self.down = (nn.Linear(factor * WIDTH, WIDTH, bias=False) for factor in (1, 4))

    def forward(self, x, rope):
        rows, length, _ = x.shape
        parts = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        q, k, v = (part.view(rows, length, HEADS, -1).transpose(1, 2) for part in parts)
        if not self.is_plain:
            q, k = (RMSNorm()(main.apply_rope(part, rope)) for part in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        hidden = self.up(self.norms[1](x))
        return x + self.down(F.gelu(hidden) if self.is_plain else hidden.relu().square())


class Network(nn.Module):
    def __init__(self, num_characters, is_causal, is_plain):
        super().__init__()
        self.embedding = nn.Embedding(num_characters + 1, WIDTH)  # the last one is the mask
        self.head = nn.Linear(WIDTH, num_characters + 1, bias=False)
        self.positions = nn.Embedding(LENGTH, WIDTH) if is_plain else None
        self.blocks = nn.ModuleList(Block(is_causal, is_plain) for _ in range(BLOCKS))
        self.first, self.last = (nn.Identity(), nn.LayerNorm(WIDTH, bias=False)) if is_plain else (RMSNorm(), RMSNorm())
        if is_plain:
            self.embedding.weight = self.head.weight
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                is_last = is_plain and name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * BLOCKS) if is_last else 0.02)
        self.register_buffer("rope", main.rope_table(LENGTH, WIDTH // HEADS, 10000.0), persistent=False)

    def forward(self, characters):
        x = self.embedding(characters)
        x = self.first(x if self.positions is None else x + self.positions.weight[: x.shape[1]])
        for block in self.blocks:
            x = block(x, self.rope[: x.shape[1]])
        return self.head(self.last(x))


class OnBytes(nn.Module):
    """The network as `main.estimate_nelbo` expects it: bytes or MASK in, logits of 256 bytes out."""

    def __init__(self, network, number_of, frequencies):
        super().__init__()
        self.network, self.number_of, self.first = network, number_of, frequencies.log()
        self.is_causal = network.blocks[0].is_causal
        self.block_length = int(self.is_causal)  # by which main.py masks: every byte, given those before, or all over

    def forward(self, tokens, **_):
        logits = self.network(self.number_of[tokens])[..., : len(self.first)].log_softmax(dim=-1)
        if self.is_causal:
            logits = torch.cat([self.first.expand(len(tokens), 1, -1), logits[:, :-1]], dim=1)
        of_bytes = torch.full((*tokens.shape, main.NUM_BYTES), -30.0)
        of_bytes[..., (self.number_of[: main.NUM_BYTES] < len(self.first)).nonzero().flatten()] = logits
        return of_bytes


def train(kind, learning_rate, minutes, seed):
    run_dir = Path(f"runs/{kind}_s{seed}")
    if run_dir.exists():
        sys.exit(f"error: {run_dir} exists; move it away")
    torch.manual_seed(seed)
    files = {"val": "validation.txt", "train": "train.txt"}
    texts = {tag: main.ByteLevelTextDataset(file, LENGTH) for tag, file in files.items()}
    text = torch.tensor(texts["train"].bytes, dtype=torch.int64)
    counts = text.bincount(minlength=main.NUM_TOKENS)
    is_known, num_characters = counts > 0, int((counts > 0).sum())
    number_of = torch.where(is_known, is_known.cumsum(0) - 1, num_characters)  # MASK and unknown bytes: the last
    text = number_of[text]
    is_causal, is_plain = kind == "nanogpt", kind != "tiny_diffusion"
    network = Network(num_characters, is_causal, is_plain)
    model = OnBytes(network, number_of, counts[is_known] / counts.sum())
    if is_plain:
        groups = [{"params": [w for w in network.parameters() if (w.ndim == 2) == decays]} for decays in (True, False)]
        groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.1, 0.0
        optimizer = torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.99 if is_causal else 0.95))
    else:
        optimizer = torch.optim.AdamW(network.parameters(), learning_rate)

    has_bf16 = main.CONFIG(device="cpu").amp_dtype == "bf16"

    @torch.compile
    def loss_of(seen, targets, weights):
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16):
            logits = network(seen) if is_causal else network(seen)[..., :num_characters]
        cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return (cross_entropy * weights.flatten()).sum()

    def batch():
        rows = text[torch.randint(len(text) - LENGTH, (ROWS, 1)) + torch.arange(LENGTH + 1)]
        if is_causal:
            return rows[:, :-1], rows[:, 1:], torch.full((ROWS, LENGTH), 1 / (ROWS * LENGTH))
        rows, t = rows[:, :-1], torch.rand(ROWS, 1).clamp(min=1e-3)
        is_masked = torch.rand(ROWS, LENGTH) < t
        weights = is_masked / t / (ROWS * LENGTH) if is_plain else is_masked / is_masked.sum()
        return rows.masked_fill(is_masked, num_characters), rows, weights

    loss_of(*batch()).backward()  # compiles; the gradients are discarded
    log, started, step, progress = SummaryWriter(run_dir), time.monotonic(), 0, 0.0
    while progress < 1:
        if is_plain:
            rate = learning_rate * min(1, (step + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
        optimizer.zero_grad()
        loss_of(*batch()).backward()
        if is_plain:
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step, progress = step + 1, (time.monotonic() - started) / 60 / minutes
        if step % 500 == 0 or progress >= 1:
            for tag, dataset in texts.items():
                log.add_scalar(f"{tag}/bits_per_byte", main.estimate_nelbo(model, dataset, 32768)[0], step)
    log.close()
    on_training_text, _ = main.estimate_nelbo(model, texts["train"], 2**20)
    number, error = main.estimate_nelbo(model, texts["val"])
    size = sum(weight.numel() for weight in network.parameters())
    print(f"{kind}: {number:.3f} ± {error:.3f} bits per byte, on training text {on_training_text:.3f}", end=", ")
    print(f"{size:,} parameters, {step:,} steps in {minutes:g} minutes at a learning rate of {learning_rate:g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["nanogpt", "nanodlm", "tiny_diffusion"])
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    try:
        train(**vars(parser.parse_args()))
    except main.InputError as error:
        sys.exit(f"error: {error}")
