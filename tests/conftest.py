"""What the tests share: a tiny CONFIG, tiny models and a way to run `python main.py` as a user does."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and cron ignore signals, which children inherit
signal.signal(getattr(signal, "SIGHUP", signal.SIGTERM), signal.SIG_DFL)

TINY = {
    "model_dim": 32,
    "num_layers": 2,
    "num_heads": 2,
    "kv_latent_dim": 16,
    "ffn_dim": 48,
    "max_length": 16,
    "batch_size": 8,
    "device": "cpu",
    "amp_dtype": "fp32",
    "compile": False,
    "block_length": 0,
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TINY_FLAGS = [f"--{name}={str(value).lower()}" for name, value in TINY.items() if name != "block_length"]


def random_model(config, seed=0):
    """A model whose weights are all random, output projections included, so that nothing cancels by being zero."""
    torch.manual_seed(seed)
    model = main.MaskPredictor(config).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


class KnownJoint(torch.nn.Module):
    """Stands for a perfect model of three bytes that are 0 or 1 with a known joint distribution: exact conditionals."""

    block_length, fills_holes = 0, True

    def __init__(self):
        super().__init__()
        self.joint = torch.tensor([0.20, 0.05, 0.02, 0.13, 0.08, 0.22, 0.25, 0.05]).view(2, 2, 2)
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.output = torch.nn.Identity()

    def extend_rope(self, length):
        pass

    def forward(self, tokens, **_):  # of one block: there is no clean past
        return self.output(self.hidden(tokens))

    def hidden(self, tokens):
        logits = torch.full((*tokens.shape, 256), -100.0)
        for row, sequence in enumerate(tokens.tolist()):
            index = tuple(slice(None) if token == main.MASK else slice(token, token + 1) for token in sequence)
            for i, token in enumerate(sequence):
                if token == main.MASK:
                    others = [j for j in range(3) if j != i]
                    logits[row, i, :2] = self.joint[index].sum(dim=others).log()
        return logits


def fill(model, prompts, config, seed=None, on_step=None):
    """What run_conditional_diffusion_inference makes of a list of prompts with holes, as bytes instead of text."""
    seen = []

    def note(x):
        seen[:] = [x]
        if on_step:
            on_step(x)

    main.run_conditional_diffusion_inference(model, prompts, 0, config, seed=seed, on_step=note)
    return [bytes(token for token in row if token != main.PAD) for row in seen[-1].tolist()]


def count_passes(model, text, config):
    """The number of positions that each pass of the sampler computes."""
    sizes = []
    handle = model.layers[0].register_forward_pre_hook(lambda _, arguments: sizes.append(arguments[0].shape[1]))
    fill(model, [text], config)
    handle.remove()
    return sizes


@pytest.fixture
def config():
    return main.CONFIG(**TINY)


@pytest.fixture
def model(config):
    return random_model(config)


@pytest.fixture
def text_folder(tmp_path):
    """A folder with a small train.txt and validation.txt."""
    (tmp_path / "train.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 40)
    (tmp_path / "validation.txt").write_bytes(b"a lazy dog and a quick fox met at the brown door. " * 8)
    return tmp_path


def run_main(folder, *arguments, **environment):
    """`python main.py ARGUMENTS` in `folder`, to its end, on the CPU; returns the finished process with its output as
    text."""
    environment = {"CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
        check=False,
    )


def train_tiny(folder, *arguments):
    """A tiny finished training run in `folder`, in this process, which saves three seconds; returns (its run folder,
    its console output)."""
    before, here, console = set((folder / "runs").glob("*")), os.getcwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(console):
            code = main.main([*TINY_FLAGS, "--num_samples=1", *arguments])
    finally:
        os.chdir(here)
    assert code == 0, console.getvalue()
    (run_dir,) = set((folder / "runs").glob("*")) - before
    return run_dir, console.getvalue()


def read_events(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def read_scalars(run_dir):
    """TensorBoard's scalars of a run: {tag: {step: value}}; each step of the training once, in order."""
    events = read_events(run_dir)
    scalars = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    for tag, values in scalars.items():
        assert [e.step for e in events.Scalars(tag)] == sorted(values), tag
    return scalars
