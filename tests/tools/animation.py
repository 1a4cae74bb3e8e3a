"""The making of a sample as an animated picture, such as the one at the top of the README:

    python tests/tools/animation.py .github/denoising.svg [--prompt "Once "] [--response_length 240] [--checkpoint RUN]

Without a prompt it shows what `python main.py generate` writes. `tests` checks the picture, but does not run this file.
"""

import argparse
import codecs
import html
import sys
import unicodedata
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import main

SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"><style>
svg{{font:14px ui-monospace,Menlo,Consolas,monospace;color:#1f2328;fill:currentColor}}.m{{color:#8c959f}}
@media(prefers-color-scheme:dark){{svg{{color:#e6edf3}}.m{{color:#6e7681}}}}
g{{animation:12s step-end infinite}}
{style}</style>
{groups}
</svg>
"""


def denoising_svg(steps, columns=72, max_frames=64):
    """From the sequences x [N, L] after each pass of the sampler: each character in the place that it has in the end, a
    dot while one of its bytes is masked, green when it is new. The animation is CSS, which plays within an <img>, in
    light and in dark mode."""
    last = min(len(steps) - 1, max_frames)  # frame
    frames = torch.stack([steps[i * (len(steps) - 1) // max(1, last)] for i in range(last + 1)])  # [frames, N, L]
    line, groups = 0, {}  # {(first frame, frame after the last): texts}
    for row in frames.unbind(dim=1):
        column, start, decoder = 0, 0, codecs.getincrementaldecoder("utf-8")("replace")
        for i, token in enumerate(row[-1].tolist()):
            if token == main.PAD or not (final := decoder.decode(bytes([token]))):
                continue
            width = max(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in final)
            if column + width > columns or "\n" in final:
                column, line = 0, line + 1
            shown = [
                main.show_masks([main.MASK] if main.MASK in tokens else tokens)
                for tokens in row[:, start : i + 1].tolist()
            ]
            changes = [frame for frame in range(last + 1) if not frame or shown[frame] != shown[frame - 1]]
            for first, end in zip(changes, [*changes[1:], last + 1]):
                letter, place = shown[first].strip(), f'x="{8 + 8.43 * column:.0f}" y="{20 + 20 * line}"'
                text = f"<text {place}>{html.escape(letter)}</text>" if letter else ""
                groups[first, end] = groups.get((first, end), "") + text
            column, start = column + width * ("\n" not in final), i + 1
        line += 2
    style, drawn = "", []
    for number, ((first, end), texts) in enumerate(sorted(groups.items())):
        if texts:
            begin, plain, stop = (min(100, 85 * frame / max(1, last)) for frame in (first, first + 3, end))
            color = "#2da44e" if first else "currentColor"
            style += f"@keyframes k{number}{{0%{{opacity:{int(not first)}}}{begin:.1f}%{{opacity:1;fill:{color}}}"
            style += f"{min(plain, stop):.1f}%{{opacity:1;fill:currentColor}}"
            style += "}\n" if end > last else f"{stop:.1f}%,to{{opacity:0}}}}\n"
            drawn.append(f'<g class="{"" if first else "m"}" style="animation-name:k{number}">{texts}</g>')
    size = {"width": round(8.43 * columns) + 16, "height": 20 * (line - 1) + 12}
    return SVG.format(**size, style=style, groups="\n".join(drawn))


def save():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--prompt")
    parser.add_argument("--response_length", type=int)
    parser.add_argument("--checkpoint")
    main.add_config_flags(parser, [*main.SAMPLING, "seed", "device"])
    flags = vars(parser.parse_args())
    file, prompt, length, checkpoint = (flags.pop(name) for name in ("file", "prompt", "response_length", "checkpoint"))
    model, config, _ = main.load_checkpoint(checkpoint or main.newest_run(), flags.get("device", "auto"))
    config, steps = main.dataclasses.replace(config, **flags), []
    tokens, *_ = main.holes_to_masks("\n\n" if prompt is None else prompt)
    main.run_conditional_diffusion_inference(
        model,
        tokens,
        config.max_length - len(tokens) if length is None else length,
        config,
        on_step=lambda x: steps.append(x.cpu().clone()),
        until="\n\n" if prompt is None else None,
    )
    Path(file).write_text(denoising_svg(steps), encoding="utf-8")


if __name__ == "__main__":
    save()
