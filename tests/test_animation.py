"""The animated picture of a sample's making, tests/tools/animation.py."""

import dataclasses
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
from animation import denoising_svg

import main


def test_the_saved_picture_shows_in_each_frame_what_the_sampler_had_then(model, config):
    config = dataclasses.replace(config, block_length=4, temperature=5.0)
    steps = []
    keep = lambda x: steps.append(x.clamp(min=32, max=126).where(x != main.MASK, x))  # one letter for each byte
    main.run_conditional_diffusion_inference(model, ["<b>x", "to &"], 12, config, on_step=keep)
    picture = denoising_svg(steps)
    groups = ElementTree.fromstring(picture).findall("{http://www.w3.org/2000/svg}g")
    last = len(steps) - 1
    for frame in range(last + 1):
        moment, shown = 85 * frame / last + 0.05, {}
        for group in groups:
            name = group.get("style").removeprefix("animation-name:")
            rule = re.search(rf"@keyframes {name}\{{(.*)\}}", picture)[1]
            opacity = 1
            for percents, value in re.findall(r"([\d.%,to]+)\{opacity:(\d)", rule):
                opacity = int(value) if float(percents.split("%")[0]) <= moment + 0.05 else opacity
            for text in group if opacity else []:
                place = int(text.get("y")) // 40, int(text.get("x"))
                assert place not in shown
                shown[place] = text.text
        for number, row in enumerate(steps[frame].tolist()):
            letters = [letter for (line, _), letter in sorted(shown.items()) if line == number]
            assert "".join(letters) == main.show_masks(row).replace(" ", "")


def test_a_long_picture_stays_small(model, config):
    steps = []
    main.run_conditional_diffusion_inference(
        model, ["To be"] * 2, 300, config, on_step=lambda x: steps.append(x.clone())
    )
    assert len(denoising_svg(steps).encode()) < 200_000
