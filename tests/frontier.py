"""Quality against speed of every way to sample, beside LLaDA's published algorithm on the same model and prompts:

    python tests/frontier.py --checkpoint runs/NAME_TIME --response_length 512 --block_length 64

Each row is a list of flags of `python main.py generate` (and `--steps N`: N bytes per forward pass). Speeds are medians
over the samples, all rows in turn for each sample, so that all meet the same machine. `tests` does not run this file.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llada import llada_generate

import main

ROWS = """
--cache_refresh 1
--steps 1
--steps 1 --cache_refresh 8
--steps 2
--steps 4
--steps 1 --temperature 0.7
--steps 2 --temperature 0.7
--steps 3 --temperature 0.7
--remasking margin --temperature 0.7
--remasking margin --temperature 0.7 --steps 2
--remasking entropy --temperature 0.7
--remasking entropy --temperature 0.7 --steps 2
--remasking random --temperature 0.7
--remasking random --temperature 0.5
--remasking random --temperature 0.5 --steps 2
--remasking random --temperature 0.5 --steps 1 --remask_share 0.05
--remasking threshold --confidence_threshold 0.9
--remasking threshold --confidence_threshold 0.5
--remasking threshold --confidence_threshold 0.7 --temperature 0.7
--remasking threshold --confidence_threshold 0.5 --temperature 0.7
--remasking threshold --confidence_threshold 0.3 --temperature 0.7
--remasking threshold --confidence_threshold 0.5 --temperature 0.5
--remasking threshold --confidence_threshold 0.4 --temperature 0.5
--remasking threshold --confidence_threshold 0.3 --temperature 0.5
--remasking entropy_bound --entropy_bound 0.1 --temperature 0.7
--remasking entropy_bound --entropy_bound 0.3 --temperature 0.7
--remasking entropy_bound --entropy_bound 1 --temperature 0.7
--remasking entropy_bound --entropy_bound 0.5 --temperature 0.5
"""


def parse_row(row, base):
    """A row's CONFIG; --steps N stands for N bytes per forward pass, and the cache is on unless the row says otherwise."""
    words = row.split()
    overrides = {name[2:]: value for name, value in zip(words[::2], words[1::2])}
    steps = max(1, base.response_length // int(overrides.pop("steps", 1)))
    types = {field.name: field.type for field in dataclasses.fields(main.CONFIG)}
    return {"inference_steps": steps, "cache_refresh": 0} | {
        name: types[name](value) for name, value in overrides.items()
    }


def timed(function, *options):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = function(*options)
    return result, time.perf_counter() - started


def frontier():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=None)
    parser.add_argument("--train_data_file", default="train.txt")
    parser.add_argument("--validation_data_file", default="validation.txt")
    parser.add_argument("--response_length", type=int, default=512)
    parser.add_argument("--prompt_length", type=int, default=64)
    parser.add_argument("--block_length", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", default=ROWS, help="lists of flags, one per line")
    arguments = parser.parse_args()
    model, config, _ = main.load_checkpoint(arguments.checkpoint or main.newest_run(), arguments.device)
    base = {"block_length": arguments.block_length, "temperature": arguments.temperature}
    length, block = arguments.response_length, arguments.block_length or arguments.response_length
    rows = [row for row in arguments.rows.strip().splitlines() if row]
    configs = {row: dataclasses.replace(config, **(base | parse_row(row, arguments))) for row in rows}
    training_text = Path(arguments.train_data_file).read_bytes()
    text = Path(arguments.validation_data_file).read_bytes()
    spacing = len(text) // arguments.samples
    prompts = [text[i * spacing : i * spacing + arguments.prompt_length] for i in range(arguments.samples)]

    passes = [0]
    model.layers[0].register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    results = {row: {"samples": [], "seconds": [], "passes": []} for row in ["LLaDA's algorithm", *rows]}

    def note(row, sampler, *options):
        passes[0] = 0
        (sample, *_), seconds = timed(sampler, model, *options)
        results[row]["samples"].append(sample[arguments.prompt_length :])
        results[row]["seconds"].append(seconds)
        results[row]["passes"].append(passes[0])

    for seed, prompt in enumerate(prompts):
        holes = [[*prompt, *[main.MASK] * length]]
        note("LLaDA's algorithm", llada_generate, prompt, length, length, block, arguments.temperature, seed)
        for row in rows:
            note(row, main.fill_masks, holes, configs[row], seed)
    greedy = dataclasses.replace(config, block_length=block, inference_steps=length, temperature=0.0)
    reference, reference_passes = llada_generate(model, prompts[0], length, length, block)
    passes[0] = 0
    same = main.fill_masks(model, [[*prompts[0], *[main.MASK] * length]], greedy)[0] == reference
    print(f"plain mode at temperature 0: identical bytes {same}, passes {passes[0]} and {reference_passes}")

    plain = statistics.median(results["LLaDA's algorithm"]["seconds"])
    truth = [text[i * spacing + arguments.prompt_length :][:length] for i in range(arguments.samples)]
    print(f"{length} bytes, blocks of {block}, temperature {arguments.temperature}, {arguments.samples} samples")
    print("| flags | passes | bytes/s | against LLaDA | exact bits/byte | words in text | distinct-3 | longest copy |")
    print("|---|---|---|---|---|---|---|---|")
    for row in [*results, "the true continuation"]:
        samples = results[row]["samples"] if row in results else truth
        pieces = [torch.tensor(list(x), device=config.device).split(128) for x in samples]
        bits = [main.exact_left_to_right(model, piece) for x in pieces for piece in x]
        exact = torch.cat(bits).mean()
        measures = main.text_statistics(samples, training_text)
        speed = " | | "
        if row in results:
            seconds, mean_passes = statistics.median(results[row]["seconds"]), statistics.mean(results[row]["passes"])
            speed = f"{mean_passes:.0f} | {length / seconds:,.0f} | {plain / seconds:.1f} x"
        print(
            f"| `{row}` | {speed} | {exact:.2f} | {measures['known words'][0]:.2f} | {measures['distinct-3'][0]:.2f} | "
            f"{measures['longest copy'][0]} |",
            flush=True,
        )
    cache = model.latent_caches(slice(0, block))
    total = arguments.prompt_length + length
    model.hidden(torch.full((1, total), main.MASK, device=next(model.parameters()).device), None, cache)
    latents = sum(c.kept.nbytes + c.left.nbytes + c.right.nbytes for c in cache)
    keys_values = 2 * total * config.model_dim * config.num_layers * 4
    print(f"cache: {latents:,} bytes of latents and edges; keys and values would take {keys_values:,}")


if __name__ == "__main__":
    frontier()
