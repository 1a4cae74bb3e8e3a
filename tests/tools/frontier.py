"""Quality against speed of the ways to sample, beside LLaDA's published algorithm on the same model and prompts:

    python tests/tools/frontier.py --checkpoint runs/NAME_TIME --response_length 512

Each row is a list of flags of `python main.py generate`; `--bytes_per_pass N` stands for so many `inference_steps`.
Speeds are medians over the batches, all rows in turn for each batch, so that all meet the same machine. `--judge RUN`
adds the bits per byte that another model, such as an autoregressive twin, gives the samples. `tests` does not run this
file.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])
from llada import llada_generate

import main

LLADA = "LLaDA's algorithm, blocks of 16"
ROWS = """

--remasking random
--top_p 1
--bytes_per_pass 2
--bytes_per_pass 4
"""


def parse_row(row, response_length):
    words = row.split()
    overrides = {name[2:]: value for name, value in zip(words[::2], words[1::2])}
    steps = max(1, response_length // int(overrides.pop("bytes_per_pass", 1)))
    types = {field.name: field.type for field in dataclasses.fields(main.CONFIG)}
    return {"inference_steps": steps} | {name: types[name](value) for name, value in overrides.items()}


def exact_bits(model, samples, max_length=128):
    """Bits per byte of the samples, in pieces of max_length bytes."""
    device, bits = next(model.parameters()).device, []
    for piece in range(0, len(samples[0]), max_length):
        rows = torch.tensor([list(sample[piece : piece + max_length]) for sample in samples], device=device)
        bits.append(main.exact_likelihood(model, rows))
    return torch.cat(bits, dim=1).mean().item()


def ours(model, prompts, length, config, seed):
    last = []
    main.run_conditional_diffusion_inference(
        model, prompts, length, config, seed=seed, on_step=lambda x: last.__setitem__(slice(None), [x])
    )
    return [bytes(token for token in row if token != main.PAD) for row in last[0].tolist()]


def plain_llada(model, prompts, length, config, seed):
    return [llada_generate(model, prompt, length, length, 16, 1.0, seed)[0] for prompt in prompts]


def frontier():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=None)
    parser.add_argument("--judge", default=None)
    parser.add_argument("--train_data_file", default="train.txt")
    parser.add_argument("--validation_data_file", default="validation.txt")
    parser.add_argument("--response_length", type=int, default=512)
    parser.add_argument("--prompt_length", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument(
        "--batch_size", type=int, default=1, help="samples per batch; LLaDA's row: 16 of them, one by one"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", default=ROWS, help="lists of flags, one per line")
    arguments = parser.parse_args()
    model, config, _ = main.load_checkpoint(arguments.checkpoint or main.newest_run(), arguments.device)
    judge = main.load_checkpoint(arguments.judge, arguments.device)[0] if arguments.judge else None
    length, skip = arguments.response_length, arguments.prompt_length
    rows = arguments.rows.removeprefix("\n").removesuffix("\n").split("\n")
    configs = {row: dataclasses.replace(config, **parse_row(row, length)) for row in rows}
    training_text, text = (
        Path(name).read_bytes() for name in (arguments.train_data_file, arguments.validation_data_file)
    )
    starts = [i * (len(text) - skip - length) // arguments.samples for i in range(arguments.samples)]
    prompts, truth = [text[i : i + skip] for i in starts], [text[i + skip : i + skip + length] for i in starts]

    passes = [0]
    model.layers[0].register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    results = {row: ([], [], []) for row in [LLADA] * (model.block_length == 0) + rows}

    for first in range(0, arguments.samples, arguments.batch_size):
        batch = prompts[first : first + arguments.batch_size]
        for row, columns in results.items():
            sample, given = (plain_llada, batch[:16]) if row == LLADA else (ours, batch)
            passes[0], started = 0, time.perf_counter()
            samples = sample(model, given, length, configs.get(row, config), first)
            seconds = (time.perf_counter() - started) / len(given)
            number = passes[0] / (len(given) if row == LLADA else 1)
            for column, values in zip(columns, ([s[skip:] for s in samples], [seconds], [number]), strict=True):
                column.extend(values)
    print(f"{length} bytes in blocks of {config.block_length}, after {skip}, on {config.device}; ", end="")
    print(f"{arguments.samples} samples in batches of {arguments.batch_size}")
    titles = "passes | bytes/s | against the first | exact | by the judge | known words | entropy"
    print(f"| flags | {titles} |\n|---{'|---' * 7}|")
    reference = statistics.median(next(iter(results.values()))[1])
    for row, (samples, seconds, counts) in (results | {"the true continuation": (truth, [], [])}).items():
        s = main.text_statistics(samples, training_text)
        speed = "| | "
        if seconds:
            median = statistics.median(seconds)
            speed = f"{statistics.mean(counts):.0f} | {length / median:,.0f} | {reference / median:.1f}"
        judged = f"{exact_bits(judge, samples):.2f}" if judge else ""
        print(
            f"| `{row or 'the defaults'}` | {speed} | {exact_bits(model, samples):.2f} | {judged} | "
            f"{s['known words']:.2f} | {s['byte entropy']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    frontier()
