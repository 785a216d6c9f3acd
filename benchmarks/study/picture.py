"""The picture of the study: what each method has above cross-entropy, a dot a task. Text, so that a test can compare."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape

from tasks import Task

WIDTH, LEFT, RIGHT, TOP, ROW = 720, 150, 20, 48, 30
GREY = "#808080"  # reads on white and on black
COLOURS = {0: "#3b82c4", 20: "#3a9e5f", 40: "#e0862e"}  # by the percentage of wrong labels
SHAPES = {
    "mlp": '<rect x="-4" y="-4" width="8" height="8"/>',
    "cnn": '<circle r="4.5"/>',
    "resnet": '<path d="M0-5.5 5 4H-5Z"/>',
}
NAMES = {"mlp": "MLP", "cnn": "CNN", "resnet": "residual network"}
Gains = dict[str, list[tuple[Task, float, float]]]  # of each method: mean and standard error on each task


def shape(net: str, colour: str, x: float, y: float, title: str = "") -> str:
    said = f"<title>{escape(title)}</title>" if title else ""
    return f'<g transform="translate({x:.1f} {y:.1f})" fill="{colour}" fill-opacity=".85">{said}{SHAPES[net]}</g>'


def text(x: float, y: float, words: str, anchor: str = "start", fill: str = GREY) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, more: str = f'stroke="{GREY}" stroke-opacity=".4"') -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {more}/>'


def legend(tasks: Sequence[Task]) -> list[str]:
    noises, nets = (
        sorted({task.noise for task in tasks}),
        [net for net in SHAPES if net in {task.net for task in tasks}],
    )
    entries = [(f"{n}% wrong labels" if n else "clean", "cnn", COLOURS[n]) for n in noises]
    entries += [(NAMES[net], net, GREY) for net in nets]
    drawn, x = [], float(LEFT)
    for words, net, colour in entries:
        drawn += [shape(net, colour, x + 5, 14), text(x + 14, 18, words)]
        x += 30 + 6.2 * len(words)
    return drawn


def picture(gains: Gains) -> str:
    """The best mean on top."""
    means = {name: [mean for _, mean, _ in of] for name, of in gains.items()}
    order = sorted(gains, key=lambda name: -statistics.fmean(means[name]))
    ends = [mean + side * of for marks in gains.values() for _, mean, of in marks for side in (-1, 1)]
    low, high = math.floor(min(*ends, -1.0)), math.ceil(max(*ends, 1.0))
    bottom = TOP + ROW * len(order)

    def at(gain: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (gain - low) / (high - low)

    drawn = legend([task for task, *_ in gains[order[0]]])
    for tick in range(low, high + 1, max(1, (high - low) // 8)):
        words = f"{tick:+d}" if tick else "0"
        drawn += [line(at(tick), TOP - 12, at(tick), bottom), text(at(tick), bottom + 16, words, "middle")]
    drawn.append(line(at(0), TOP - 12, at(0), bottom, f'stroke="{GREY}" stroke-width="1.5"'))
    drawn.append(text((LEFT + WIDTH - RIGHT) / 2, bottom + 34, "points of test accuracy above cross-entropy", "middle"))
    for row, name in enumerate(order):
        y = TOP + ROW * (row + 0.5)
        drawn.append(text(LEFT - 12, y + 4, name, "end"))
        for i, (task, mean, of) in enumerate(gains[name]):
            above = y + (i - (len(gains[name]) - 1) / 2) * 2.5
            drawn.append(line(at(mean - of), above, at(mean + of), above, f'stroke="{COLOURS[task.noise]}"'))
            drawn.append(
                shape(task.net, COLOURS[task.noise], at(mean), above, f"{name}, {task.name}: {mean:+.2f} ± {of:.2f}")
            )
    size = f'viewBox="0 0 {WIDTH} {bottom + 44}" width="{WIDTH}"'
    style = 'font-family="DejaVu Sans, sans-serif" font-size="12"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *drawn, "</svg>\n"])
