"""Gradients of deep models before the first step, for the three normalisations of Fig. 4.

``python benchmarks/convergence/gradient_norms.py`` differentiates the loss of the language models of ``text.py --preset
cpu``, 96 layers deep, on their first batch, without dropout, and writes benchmarks/results/gradient_norms.json:

* ``outputs``: for j = 0 (embedding) to the last layer, the norm of dL/dx_j, x_j the output of layer j.
* ``parameters``: for each layer, the norm of the gradient of all its parameters.

Each is the geometric mean over seeds. In a PHYDI model dL/dx_j is the same for all j, as every layer is the identity,
and of a layer's parameters alpha alone has a gradient. The published initialisation (``--init reference``) makes all
branches so small that no normalisation shows in them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import runs
import text
import text_data
import torch
from runs import Task
from torch import Tensor

from phydi_kernels.demo.report import environment


def norms(task: Task) -> dict[str, list[float]]:
    """``outputs`` and ``parameters`` of a model of :func:`text.task`, for its first batch."""
    task.model.eval()
    outputs: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> None:
        x = inputs[0] if output is None else output
        x.retain_grad()
        outputs.append(x)

    layers = task.model.encoder.layers
    hooks = [layers[0].register_forward_pre_hook(keep), *(layer.register_forward_hook(keep) for layer in layers)]
    try:
        loss, _ = task.loss(task.batches(0, torch.Generator())[0])
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return {
        "outputs": [x.grad.norm().item() for x in outputs],
        "parameters": [torch.cat([p.grad.flatten() for p in layer.parameters()]).norm().item() for layer in layers],
    }


def measure(settings: Mapping[str, Any], corpus: text_data.Corpus, seeds: int) -> dict[str, dict[str, list[float]]]:
    """Both figures of each normalisation, the geometric mean over seeds."""
    results = {}
    for norm in text.NORMS:
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            found.append(norms(text.task({**settings, "norm": norm}, corpus)))
        results[norm] = {
            key: torch.tensor([one[key] for one in found]).double().log().mean(0).exp().tolist() for key in found[0]
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=runs.positive, default=96, help="encoder layers (default: 96)")
    parser.add_argument("--n", type=int, choices=text.NS, default=4, help="dimension of the algebra (default: 4)")
    parser.add_argument("--init", choices=runs.INITS, default="fan", help="initial weights (default: fan)")
    parser.add_argument("--seeds", type=runs.positive, default=8, help="models to average over (default: 8)")
    parser.add_argument("--file", type=Path, default=text.RESULTS / "gradient_norms.json")
    args = parser.parse_args()
    corpus = text_data.load("pydoc", Path())
    sizes = {"n": args.n, "depth": args.depth, "init": args.init}
    settings = {**text.RECIPE, **text.PRESETS["cpu"], **sizes, "device": "cpu"}
    results = {
        "environment": environment(),
        **sizes,
        "seeds": args.seeds,
        "norms": measure(settings, corpus, args.seeds),
    }
    runs.write_figures(args.file, results)
    print(f"Written: {args.file}")


if __name__ == "__main__":
    main()
