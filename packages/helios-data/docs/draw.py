"""Draws the pictures of how-it-works.md: `python packages/helios-data/docs/draw.py`.

What they show is computed by helios-data itself, so that they stay true.
"""

from collections.abc import Iterable
from pathlib import Path

from helios.data import Permutation, Tail
from helios.data._sharding import Sharding

CELL = 34  # pixels
ROW = 46
MARGIN = 14
LABEL = 206
RANKS = ["#7fb3d5", "#f5b971", "#8fcf9b"]
PLAIN, DARK, FAINT = "#e5e7eb", "#4b5563", "#f3f4f6"
Shape = str


def cell(column: float, row: float, text: object, fill: str = PLAIN, dashed: bool = False) -> Shape:
    """Return a box with a short text."""
    x, y = MARGIN + LABEL + column * CELL, MARGIN + row * ROW
    stroke = ' stroke-dasharray="3 3"' if dashed else ""
    color = "#ffffff" if fill == DARK else "#111827"
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{CELL - 4}" height="{CELL - 4}" rx="4" fill="{fill}" '
        f'stroke="#6b7280"{stroke}/>'
        f'<text x="{x + (CELL - 4) / 2:g}" y="{y + 20:g}" text-anchor="middle" fill="{color}">{text}</text>'
    )


def label(row: float, text: str) -> Shape:
    """Return a text at the left."""
    return f'<text x="{MARGIN}" y="{MARGIN + row * ROW + 20:g}" fill="#111827">{text}</text>'


def note(column: float, row: float, text: str) -> Shape:
    """Return a text anywhere."""
    x, y = MARGIN + LABEL + column * CELL, MARGIN + row * ROW + 20
    return f'<text x="{x:g}" y="{y:g}" fill="#4b5563">{text}</text>'


def marker(column: float, row: float, text: str) -> Shape:
    """Return a line between two columns, with a text below: a cursor."""
    x, y = MARGIN + LABEL + column * CELL - 2, MARGIN + row * ROW
    return (
        f'<line x1="{x:g}" y1="{y - 6:g}" x2="{x:g}" y2="{y + CELL + 6:g}" stroke="#b91c1c" stroke-width="2.5"/>'
        f'<text x="{x:g}" y="{y + CELL + 20:g}" text-anchor="middle" fill="#b91c1c">{text}</text>'
    )


def picture(num_columns: float, num_rows: float, shapes: Iterable[Shape]) -> str:
    """Return an SVG document."""
    width, height = 2 * MARGIN + LABEL + num_columns * CELL, 2 * MARGIN + num_rows * ROW
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" font-size="13">'
    )
    background = f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>'
    return "\n".join([head, background, *shapes, "</svg>", ""])


def order() -> str:
    """Two epochs, and a seek."""
    num_samples = 16
    shapes = [label(0, "position"), *(cell(p, 0, p, FAINT) for p in range(num_samples))]
    for row, epoch in ((1, 0), (2, 1)):
        indices = Permutation(num_samples, seed=0, epoch=epoch).indices(0, num_samples).tolist()
        shapes.append(label(row, f"epoch {epoch}: index of the sample"))
        shapes += [cell(p, row, i, RANKS[0]) for p, i in enumerate(indices)]
    window = Permutation(num_samples, 0, 1).indices(10, 13).tolist()
    shapes.append(label(3, ".indices(10, 13) of epoch 1"))
    shapes += [cell(10 + p, 3, i, RANKS[1]) for p, i in enumerate(window)]
    return picture(num_samples, 4, shapes)


def cursor() -> str:
    """What workers fetched ahead does not count."""
    batch_size, received, fetched, num_samples = 2, 3, 5, 16
    fills = [RANKS[2]] * received * batch_size + [RANKS[1]] * (fetched - received) * batch_size
    fills += [FAINT] * (num_samples - len(fills))
    shapes = [label(0, "positions of the epoch")]
    shapes += [cell(p, 0, p, fill) for p, fill in enumerate(fills)]
    shapes.append(marker(received * batch_size, 0, f"consumed = {received * batch_size}"))
    shapes += [cell(0, 1.7, "", RANKS[2]), note(1.1, 1.7, "received by your loop")]
    shapes += [cell(6, 1.7, "", RANKS[1]), note(7.1, 1.7, "fetched ahead by workers: not counted")]
    return picture(num_samples, 2.5, shapes)


def tail() -> str:
    """The last step of 10 samples on 3 ranks with batches of 2."""
    num_samples, batch_size, world = 10, 2, 3
    shapes = [label(0, "10 samples, 3 ranks, batch 2")]
    start = batch_size * world
    for rank in range(world):
        step = Sharding(num_samples, batch_size, rank, world).step_at(0)
        assert step is not None, "the first step is a full one"
        shapes += [cell(p, 0, p, RANKS[rank]) for p in step.positions().tolist()]
    shapes += [cell(p, 0, p, FAINT) for p in range(start, num_samples)]
    shapes.append(note(num_samples + 0.3, 0, "rank 0 blue, 1 orange, 2 green"))
    for row, kind in enumerate(Tail, 1):
        shapes.append(label(row, f'tail="{kind.value}": the last step'))
        column = start
        for rank in range(world):
            step = Sharding(num_samples, batch_size, rank, world, kind).step_at(start)
            for position in [] if step is None else step.positions().tolist():
                is_padding = position >= num_samples
                shapes.append(cell(column, row, position % num_samples, RANKS[rank], dashed=is_padding))
                column += 1
    shapes.append(note(num_samples + 2.3, 1, "0 and 1 again"))
    shapes.append(note(num_samples + 0.3, 2, "9 is left out"))
    shapes.append(note(num_samples + 0.3, 3, "rank 0 has one more"))
    return picture(num_samples + 8, 4, shapes)


def elastic() -> str:
    """Two steps on two ranks, then three ranks with other batch sizes."""
    num_samples, position = 18, 0
    shapes = [label(0, "2 ranks, batch 3, then killed"), label(1, "3 ranks, batches 2, 2 and 1")]
    runs: list[tuple[list[int], int]] = [([3, 3], 1), ([2, 2, 1], 10)]
    cursors = []
    for row, (sizes, num_steps) in enumerate(runs):
        for _ in range(num_steps):
            steps = [
                Sharding(num_samples, sizes, rank, len(sizes), Tail.EXACT).step_at(position)
                for rank in range(len(sizes))
            ]
            for rank, step in enumerate(steps):
                for each in [] if step is None else step.positions().tolist():
                    shapes.append(cell(each, row, each, RANKS[rank]))
            position = position if steps[0] is None else steps[0].next_cursor
        cursors.append(position)
    shapes.append(marker(cursors[0], 0, ""))
    shapes.append(marker(cursors[0], 1, f"the state: consumed = {cursors[0]}"))
    return picture(num_samples, 2.7, shapes)


def randomness() -> str:
    """The same draws, whoever fetches."""
    positions = range(8)
    shapes = [label(0, "position"), *(cell(2 * p, 0, p, FAINT) for p in positions)]
    shapes.append(label(1, "generators re-keyed by"))
    shapes += [note(2 * p - 0.25, 1, f"(s,e,{p})") for p in positions]
    shapes.append(label(2, "0 workers (m: main process)"))
    shapes += [cell(2 * p, 2, "m", PLAIN) for p in positions]
    shapes.append(label(3, "2 workers, batches of 2"))
    shapes += [cell(2 * p, 3, f"w{p // 2 % 2}", RANKS[p // 2 % 2]) for p in positions]
    shapes.append(label(4, "resumed at 3, 1 worker"))
    shapes += [cell(2 * p, 4, "w0", RANKS[0]) for p in positions if p >= 3]
    shapes.append(note(0, 5, "In each column the augmented sample is the same, bit for bit."))
    return picture(16, 6, shapes)


PICTURES = {
    "order": order,
    "cursor": cursor,
    "tail": tail,
    "elastic": elastic,
    "randomness": randomness,
}

if __name__ == "__main__":
    folder = Path(__file__).parent / "pictures"
    folder.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw())
