"""Two diagrams drawn from the code: who imports whom, and what flows through a step of masked-token prediction.

Each is an SVG whose boxes have `data-node` and whose arrows have `data-edge`; a test compares these with the code.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import torch

import sslkernels as sk

PACKAGE = Path(sk.__file__).parent
LINE, PAD, GAP_X, GAP_Y, CHARACTER = 17, 10, 28, 62, 7.0


class Node(NamedTuple):
    """A box: its first line is bold. level: from the top."""

    name: str
    lines: tuple[str, ...]
    level: int
    color: str = "#e8f0fe"


class Edge(NamedTuple):
    source: str
    target: str


class Graph(NamedTuple):
    title: str
    nodes: list[Node]
    edges: list[Edge]


def house() -> str:
    return svg(house_graph())


def step() -> str:
    return svg(step_graph())


FAMILIES = ("vocabulary", "contrastive", "latent")
FACES = ("integrations", "nn", "distributions")


def house_graph() -> Graph:
    """The folders of the package and their imports (imports inside functions too)."""
    rooms = {
        room: sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) == room)
        for room in (*FACES, *FAMILIES, "random", "core")
    }
    found = {
        (room, other) for room, files in rooms.items() for path in files for other in imports_of(path) if other in rooms
    }
    edges = reduced([Edge(a, b) for a, b in sorted(found) if a != b])
    nodes = []
    for room, files in rooms.items():
        level = 0 if room in FACES else 1 if room in FAMILIES else 2 if room == "random" else 3
        names = [path.stem for path in files if path.parent.name == room and path.stem[0] != "_"]
        lines = [room if room not in ("nn", "distributions") else f"{room}.py", *wrapped(names)]
        folders = [path.relative_to(PACKAGE).parts[1] for path in files if len(path.relative_to(PACKAGE).parts) > 2]
        lines += [f"{folder}/: {folders.count(folder)} files" for folder in sorted(set(folders))]
        nodes.append(Node(room, tuple(lines), level, "#fde8d7" if room in FACES else "#e8f0fe"))
    title = "Rooms and what they import; imports that follow from other arrows are left out"
    return Graph(title, nodes, edges)


def room_of(path: Path) -> str:
    first, *rest = path.relative_to(PACKAGE).parts
    return first if rest else first.removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Rooms that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{each.name}" for each in node.names]
        elif isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("sslkernels.")}
    return found


def wrapped(names: Sequence[str], width: int = 34) -> list[str]:
    lines = [""]
    for name in names:
        joined = f"{lines[-1]}, {name}" if lines[-1] else name
        if len(joined) > width:
            lines.append(name)
        else:
            lines[-1] = joined
    return [line for line in lines if line]


SHAPES = {"B": 8, "T": 128, "D": 64, "V": 30522}


def step_graph() -> Graph:
    """The operators of this package in a traced step; what torch adds between them, views and a mean, is left out."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def of_step(ids: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        masked = sk.mask_tokens(ids, mask_id=103, vocab_size=SHAPES["V"], seed=0)
        loss = sk.linear_cross_entropy(hidden, weight, masked.labels, linear_bias=bias)
        return (masked.input_ids, loss, *torch.autograd.grad(loss, (hidden, weight, bias)))

    b, t, d, v = SHAPES.values()
    leaves = {"hidden": (b, t, d), "weight": (v, d), "bias": (v,)}
    ids = torch.zeros(b, t, dtype=torch.int64)
    tensors = [torch.zeros(shape, requires_grad=True) for shape in leaves.values()]
    graph = make_fx(of_step, tracing_mode="fake")(ids, *tensors).graph
    graph.eliminate_dead_code()
    return contracted(graph, ("ids", *leaves), ("masked ids", "loss", *(f"gradient of {name}" for name in leaves)))


def contracted(graph: torch.fx.Graph, inputs: Iterable[str], outputs: Iterable[str]) -> Graph:
    """The graph of inputs, our operators and outputs: paths through other nodes become arrows."""
    names, shapes, sources = {}, {}, {}
    nodes, edges, levels = [], [], {}
    inputs, outputs = iter(inputs), list(outputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = next(inputs)
            shapes[names[node]] = shape_of(node)
            levels[names[node]] = 0
            nodes.append(Node(names[node], (names[node], shapes[names[node]]), 0, "#eeeeee"))
            sources[node] = {names[node]}
        elif node.op == "output":
            for name, each in zip(outputs, node.args[0], strict=True):
                level = 1 + max(levels[source] for source in sources[each])
                levels[name] = level
                nodes.append(Node(name, (name, shape_of(each)), level, "#e2f3e4"))
                edges += [Edge(source, name) for source in sorted(sources[each])]
        elif str(node.target).startswith("sslkernels."):
            name = node.name
            operator = str(node.target).split(".")[1]
            arriving = [(source, each) for each in node.all_input_nodes for source in sorted(sources[each])]
            levels[name] = 1 + max(levels[source] for source, _ in arriving)
            nodes.append(Node(name, (operator, *held(node)), levels[name]))
            edges += [Edge(source, name) for source in dict.fromkeys(source for source, _ in arriving)]
            sources[node] = {name}
        else:
            sources[node] = set().union(*(sources[each] for each in node.all_input_nodes), set())
    edges = reduced(edges)
    # An input stands right above the first operator that reads it.
    above = {edge.source: levels[edge.target] - 1 for edge in reversed(edges) if levels[edge.source] == 0}
    nodes = [node._replace(level=above.get(node.name, node.level)) for node in nodes]
    title = "One step of masked-token prediction: operators and what they return; no tensor of tokens x V"
    return Graph(title, nodes, edges)


def shape_of(node: torch.fx.Node) -> str:
    value = node.meta["val"]
    return " x ".join(f"{size:,}" for size in value.shape) or "scalar"


def held(node: torch.fx.Node) -> list[str]:
    """Shapes that an operator returns, each once."""
    value = node.meta["val"]
    found = [value] if isinstance(value, torch.Tensor) else [each for each in value if isinstance(each, torch.Tensor)]
    sizes = sorted((tuple(each.shape) for each in found if each.numel()), key=lambda s: -torch.Size(s).numel())
    return [f"returns {' x '.join(f'{n:,}' for n in size) or 'a scalar'}" for size in dict.fromkeys(sizes)]


def reduced(edges: Sequence[Edge]) -> list[Edge]:
    """Without the edges between ends that a longer path joins."""

    def reaches(source: str, target: str, but: Edge) -> bool:
        following = [each.target for each in edges if each.source == source and each != but]
        return any(each == target or reaches(each, target, but) for each in following)

    return [edge for edge in edges if not reaches(edge.source, edge.target, edge)]


def svg(graph: Graph) -> str:
    """Levels from the top to the bottom, boxes side by side, arrows from lower edge to upper edge."""
    chains, place, width, height = laid_out(graph)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#555"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
        f'<text x="{width / 2:.0f}" y="24" text-anchor="middle" fill="#333">{escape(graph.title)}</text>',
    ]
    links = [link for chain in chains.values() for link in itertools.pairwise(chain)]
    for edge, chain in chains.items():
        name = escape(f"{edge.source} -> {edge.target}")
        path = curve(chain, place, links)
        out.append(f'<path data-edge="{name}" d="{path}" fill="none" stroke="#555" marker-end="url(#arrow)"/>')
    for node in graph.nodes:
        x, y, w, h = place[node.name]
        size = f'width="{w:.0f}" height="{h:.0f}"'
        out.append(f'<g data-node="{escape(node.name)}">')
        out.append(f'<rect x="{x:.0f}" y="{y:.0f}" {size} rx="6" fill="{node.color}" stroke="#555"/>')
        for number, line in enumerate(node.lines):
            bold = ' font-weight="bold"' if number == 0 else ""
            at = f'x="{x + w / 2:.0f}" y="{y + PAD + LINE * number + 13:.0f}"'
            out.append(f'<text {at} text-anchor="middle" fill="#111"{bold}>{escape(line)}</text>')
        out.append("</g>")
    return "\n".join([*out, "</svg>"]) + "\n"


def laid_out(graph: Graph) -> tuple[dict[Edge, list[str]], dict[str, tuple[float, float, float, float]], float, float]:
    """The names that each edge passes, (x, y, width, height) of each name, and the size of the whole.

    An edge over several levels passes a narrow box without content in each level between.
    """
    levels = {node.name: node.level for node in graph.nodes}
    sizes = {n.name: (2 * PAD + CHARACTER * max(map(len, n.lines)), 2 * PAD + LINE * len(n.lines)) for n in graph.nodes}
    chains = {}
    for edge in graph.edges:
        between = range(levels[edge.source] + 1, levels[edge.target])
        passed = [f"{edge.source} -> {edge.target} {level}" for level in between]
        levels |= dict(zip(passed, between, strict=True))
        sizes |= dict.fromkeys(passed, (4.0, 0.0))
        chains[edge] = [edge.source, *passed, edge.target]
    rows = {level: [name for name in levels if levels[name] == level] for level in sorted(set(levels.values()))}
    total = {level: sum(sizes[name][0] for name in row) + GAP_X * (len(row) - 1) for level, row in rows.items()}
    width = max(*total.values(), CHARACTER * len(graph.title)) + 40
    place: dict[str, tuple[float, float, float, float]] = {}
    y = 44.0
    for level, row in rows.items():

        def above(name: str) -> float:
            """Mean position of what leads here: boxes are in the order of these."""
            parents = [chain[chain.index(name) - 1] for chain in chains.values() if name in chain[1:]]
            centers = [place[each][0] + place[each][2] / 2 for each in parents]
            return sum(centers) / len(centers) if centers else width

        x = (width - total[level]) / 2
        for name in sorted(row, key=above):
            place[name] = (x, y, *sizes[name])
            x += sizes[name][0] + GAP_X
        y += max(sizes[name][1] for name in row) + GAP_Y
    for name, (x, top, w, h) in place.items():
        if h == 0:  # an edge goes straight down past the boxes of the level
            place[name] = (x, top, w, max(sizes[each][1] for each in rows[levels[name]]))
    return chains, place, width, y - GAP_Y + 20


def curve(chain: list[str], place: dict[str, tuple[float, float, float, float]], links: list[tuple[str, str]]) -> str:
    """From box to box; what leaves or reaches one box does so side by side."""

    def port(name: str, other: str, leaves: bool) -> float:
        x, _, w, _ = place[name]
        ends = [b if leaves else a for a, b in links if (a if leaves else b) == name]
        order = sorted(ends, key=lambda each: place[each][0] + place[each][2] / 2)
        return x + w * (order.index(other) + 1) / (len(order) + 1)

    path = ""
    for source, target in itertools.pairwise(chain):
        start, end = port(source, target, True), port(target, source, False)
        _, y, _, h = place[source]
        top = max(other + height for _, other, _, height in place.values() if other == y)  # below the whole level
        bottom = place[target][1]
        half = (top + bottom) / 2
        path += f"{'L' if path else 'M'}{start:.0f} {y + h:.0f} L{start:.0f} {top:.0f} "
        path += f"C{start:.0f} {half:.0f} {end:.0f} {half:.0f} {end:.0f} {bottom:.0f} "
    return path.strip()
