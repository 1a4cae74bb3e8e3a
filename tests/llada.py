"""LLaDA's published sampler, written plainly from its description: the reference for bytes, passes and speed."""

import torch

import main


@torch.no_grad()
def llada_generate(model, prompt, length, steps, block_length, temperature=0.0, seed=0):
    """Low-confidence remasking (arXiv 2502.09992, algorithm 5): each block gets steps / blocks steps; each step
    predicts the whole sequence and unmasks an equal part of the block's masks, the most confident predictions first.

    Returns (bytes of prompt and response, number of forward passes).
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    x = torch.tensor([[*prompt, *[main.MASK] * length]], device=generator.device)
    num_blocks = length // block_length
    steps_per_block = steps // num_blocks
    forward_passes = 0
    for block in range(num_blocks):
        start = len(prompt) + block * block_length
        masks = int((x[0, start : start + block_length] == main.MASK).sum())
        quota = [masks // steps_per_block + (1 if i < masks % steps_per_block else 0) for i in range(steps_per_block)]
        for count in quota:
            logits = model(x)[0]
            forward_passes += 1
            noisy = logits
            if temperature:
                noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64, device=x.device)
                noisy = logits.double().exp() / (-noise.log()) ** temperature
            chosen = noisy.argmax(-1)
            confidence = logits.double().softmax(-1).gather(-1, chosen[:, None])[:, 0]
            confidence[x[0] != main.MASK] = -torch.inf
            confidence[start + block_length :] = -torch.inf
            most_confident = confidence.topk(count).indices
            x[0, most_confident] = chosen[most_confident]
    return bytes(x[0].tolist()), forward_passes
