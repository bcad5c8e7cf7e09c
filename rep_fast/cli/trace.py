"""`rep-fast trace`: which key- and value-nodes carry a fact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from rep_fast.cli.opening import Stopwatch, backend_names, open_model
from rep_fast.cli.options import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PromptOption,
    SubjectOption,
    TargetOption,
)
from rep_fast.cli.screen import Screen, opened

if TYPE_CHECKING:
    from rep_fast.paths import NodeScores, PathSelection

_SHOWN_NODES = 4


def trace(
    model: ModelOption,
    prompt: PromptOption,
    subject: SubjectOption,
    target: TargetOption,
    score: Annotated[str, typer.Option("--score", help="zabs, sum, abs_sum, l2 or gxw.")] = "zabs",
    top: Annotated[int, typer.Option("--top", help="Best nodes of each list, and number of best paths.")] = 15,
    k_node: Annotated[str, typer.Option("--k-node", help="Columns of up, gate or up+gate.")] = "up",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Trace the parameter paths a fact runs through: scores of all nodes, from one forward and one backward pass."""
    with opened(as_json=as_json, debug=debug) as screen:
        from rep_fast.facts import Fact
        from rep_fast.paths import layer_map, score_nodes, select

        watch = Stopwatch()
        fact = Fact(prompt, subject, target)
        lm = open_model(model, device=device, dtype=dtype)
        watch.lap("load")
        scores = score_nodes(lm, fact, score=score, k_node=k_node)
        watch.lap("trace")
        chosen, best = select(scores, top=top), select(scores, top=top, mode="kbest")
        watch.lap("select")
        means = layer_map(scores, chosen.positive)
        layers = _layers(scores, chosen, means.key.tolist(), means.value.tolist())
        _show(screen, fact.text, target, scores, layers, best)
        screen.answer(
            {
                "model": model,
                "fact": {"prompt": fact.prompt, "subject": fact.subject, "target": fact.target_new},
                "score": score,
                "k_node": k_node,
                "top": top,
                "nll": scores.nll[0],
                "layers": layers,
                "paths": [{"score": path.score, "key": path.key, "value": path.value} for path in best.paths],
                "negative_path": {
                    "key": [nodes[0] for nodes in chosen.negative.key],
                    "value": [nodes[0] for nodes in chosen.negative.value],
                },
                "backend": backend_names(),
                "timing": watch.as_json(),
            }
        )


def _layers(
    scores: NodeScores, chosen: PathSelection, key_means: list[float], value_means: list[float]
) -> list[dict[str, Any]]:
    """Per layer the selected nodes, best first, and their mean score."""
    return [
        {
            "layer": layer,
            "key": _ranked(scores.key[layer].tolist(), chosen.positive.key[layer]),
            "value": _ranked(scores.value[layer].tolist(), chosen.positive.value[layer]),
            "key_mean": key_means[layer],
            "value_mean": value_means[layer],
        }
        for layer in range(scores.n_layers)
    ]


def _ranked(scores: list[float], nodes: tuple[int, ...]) -> list[dict[str, Any]]:
    return [{"node": node, "score": scores[node]} for node in sorted(nodes, key=lambda node: -scores[node])]


def _show(
    screen: Screen, text: str, target: str, scores: NodeScores, layers: list[dict[str, Any]], best: PathSelection
) -> None:
    screen.show(f"{text} [bold]{target}[/bold]   (NLL {scores.nll[0]:.3f} per token on the unedited model)")
    table = Table(title=f"Best nodes by {scores.score}, {scores.k_node} columns as key nodes", title_justify="left")
    for heading in ("layer", "key nodes", "mean", "", "value nodes", "mean", ""):
        table.add_column(heading, justify="right" if heading in ("layer", "mean") else "left", no_wrap=True)
    largest = {part: max((own[f"{part}_mean"] for own in layers), default=0.0) for part in ("key", "value")}
    for own in layers:
        row = [str(own["layer"])]
        for part in ("key", "value"):
            nodes = " ".join(str(item["node"]) for item in own[part][:_SHOWN_NODES])
            row += [nodes, f"{own[f'{part}_mean']:.3g}", _bar(own[f"{part}_mean"], largest[part])]
        table.add_row(*row)
    screen.show(table)
    first = best.paths[0]
    steps = " → ".join(
        f"{layer}:k{key},v{value}" for layer, (key, value) in enumerate(zip(first.key, first.value, strict=True))
    )
    screen.show(f"best path, score {first.score:.4g}: {steps}")


def _bar(value: float, largest: float, width: int = 8) -> str:
    return "█" * round(width * value / largest) if largest > 0 else ""
