"""Draws docs/layouts.png, the attention patterns of the README: `python docs/layouts.py`."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot

from sfkernels import BlockLayout

LAYOUTS = {
    "teacher forcing": BlockLayout.causal(9, 3, 1560, teacher_forcing=True),
    "diffusion forcing": BlockLayout.causal(9, 3, 1560),
    "self forcing, window 7, sink 1": BlockLayout.causal(12, 3, 1560, window=7, sink=1),
    "last chunk blind to the first": BlockLayout.causal(9, 3, 1560, hide_first=True),
}

figure, axes = pyplot.subplots(1, len(LAYOUTS), figsize=(11, 3), layout="constrained")
for ax, (title, layout) in zip(axes, LAYOUTS.items(), strict=True):
    layout.plot(ax, title)
figure.savefig(Path(__file__).parent / "layouts.png", dpi=110)
