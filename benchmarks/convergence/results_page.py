"""The page benchmarks/results/README.md: our figures beside the paper's, and which of its claims hold here.

``python benchmarks/convergence/results_page.py`` prints its generated parts; ``--write`` puts them into the page,
between the marks that name them. They come from the figures of images.py, text.py and gradient_norms.py in
benchmarks/results; parts whose file is missing are left as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import images
import report
import text
from plots import DATA_NAMES

from phydi_kernels.demo.report import machine_line

PAGE = text.RESULTS / "README.md"
COMMAND = "python benchmarks/convergence/results_page.py"
# Mean and standard error of M1, and M2, by depth, n and initialisation.
PAPER_TABLE_1: dict[tuple[int, int], dict[str, tuple[float, float, int | None]]] = {
    (18, 2): {"standard": (6.00, 0.58, 2), "wkp": (5.75, 0.25, 2), "phydi": (6.00, 0.00, None)},
    (50, 2): {"standard": (10.67, 1.20, 3), "wkp": (10.67, 0.67, 2), "phydi": (7.00, 0.58, None)},
    (152, 2): {"standard": (32.67, 2.03, 4), "wkp": (29.80, 3.68, 4), "phydi": (6.33, 1.33, None)},
    (18, 3): {"standard": (6.33, 0.33, 2), "wkp": (6.00, 0.00, 1), "phydi": (5.00, 0.58, None)},
    (50, 3): {"standard": (8.67, 1.20, 2), "wkp": (9.0, 0.58, 2), "phydi": (6.33, 0.67, None)},
    (152, 3): {"standard": (26.67, 1.76, 4), "wkp": (20.00, 2.12, 4), "phydi": (4.67, 0.33, None)},
    (18, 4): {"standard": (3.75, 0.48, 1), "wkp": (5.67, 0.67, 2), "phydi": (4.50, 0.50, None)},
    (50, 4): {"standard": (8.33, 0.88, 2), "wkp": (9.33, 0.88, 2), "phydi": (7.00, 1.15, None)},
    (152, 4): {"standard": (22.67, 3.71, 3), "wkp": (20.60, 1.60, 3), "phydi": (5.33, 0.33, None)},
}
PAPER_TABLE_2: dict[tuple[int, int], dict[str, tuple[float, float, int | None]]] = {
    (18, 2): {"standard": (21.86, 3.14, 3), "wkp": (17.17, 3.35, 3), "phydi": (10.00, 1.22, None)},
    (50, 2): {"standard": (24.33, 2.19, 3), "wkp": (12.67, 1.67, 2), "phydi": (8.67, 0.88, None)},
    (18, 3): {"standard": (20.50, 5.08, 3), "wkp": (12.83, 1.68, 3), "phydi": (8.00, 0.58, None)},
    (50, 3): {"standard": (11.25, 2.56, 2), "wkp": (12.80, 3.89, 2), "phydi": (10.75, 2.25, None)},
    (18, 4): {"standard": (21.40, 3.22, 3), "wkp": (20.67, 2.78, 2), "phydi": (8.80, 1.24, None)},
    (50, 4): {"standard": (22.33, 8.67, 2), "wkp": (11.00, 0.58, 2), "phydi": (10.00, 1.00, None)},
}
PAPER = {"1": PAPER_TABLE_1, "2": PAPER_TABLE_2}
# Section 4.3, of Fig. 4: the most layers at which PostNorm is said to work, by n, and PHYDI's epochs with 96 layers.
PAPER_POSTNORM_DEPTH = {2: 32, 4: 64}
PAPER_PHYDI_EPOCHS = 2

Means = Mapping[tuple[int, int], Mapping[str, float]]


def image_table(results: Mapping[str, Any], table: str) -> str:
    """A table of the paper with our figures and the published ones side by side."""
    rows = results["tables"][table]
    header, *cells = images.table_cells(table, rows)
    m1 = header.index("M1")
    lines = [[*header[:m1], "M1", "M1, paper", "M2", "M2, paper", *header[m1 + 2 :]]]
    for row, line in zip(rows, cells, strict=True):
        paper_m1, paper_m2 = _published(PAPER[table][row["depth"], row["n"]], row["init"])
        lines.append([*line[: m1 + 1], paper_m1, line[m1 + 1], paper_m2, *line[m1 + 2 :]])
    align = ["---", *["--:"] * (len(lines[0]) - 1)]
    return "\n".join(
        [*(f"| {' | '.join(line)} |" for line in (lines[0], align, *lines[1:])), "", _images_line(results)]
    )


def _published(group: Mapping[str, tuple[float, float, int | None]], init: str) -> tuple[str, str]:
    if init not in group:
        return "", ""
    mean, error, m2 = group[init]
    shown = f"{mean:.2f} ± {error:.2f}"
    least = min(one[0] for one in group.values())
    return f"**{shown}**" if mean == least else shown, "-" if m2 is None else str(m2)


def _images_line(results: Mapping[str, Any]) -> str:
    preset = results["preset"]
    rows = [row for table in results["tables"].values() for row in table]
    minutes = sum(sum(row["seconds"]) for row in rows) / 60
    return (
        f"{DATA_NAMES[preset['data']]}, width {preset['width']}, {max(len(row['seeds']) for row in rows)} seeds; "
        f"`{results['command']}`: {minutes:.0f} core-minutes of training on {machine_line(results['environment'])}"
    )


def text_table(results: Mapping[str, Any]) -> str:
    """Fig. 4 as a table, and the command."""
    return f"{text.text(results)}\n\n`{results['command']}`"


def means(results: Mapping[str, Any], table: str) -> Means:
    """M1 of each depth and n by initialisation, infinite where a seed did not reach it."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for row in results["tables"].get(table, ()):
        values = [math.inf if value is None else value for value in row["m1"]]
        found.setdefault((row["depth"], row["n"]), {})[row["init"]] = sum(values) / len(values)
    return found


def paper_means(table: str) -> Means:
    return {key: {init: one[0] for init, one in group.items()} for key, group in PAPER[table].items()}


def count(groups: Iterable[Mapping[str, float]], ours: str, *others: str) -> tuple[int, int]:
    """In how many groups ``ours`` is reached, and by none of ``others`` earlier; of those that have all of them."""
    some = [group for group in groups if {ours, *others} <= group.keys()]
    return sum(group[ours] <= min(group[other] for other in others) and group[ours] < math.inf for group in some), len(
        some
    )


def verdict(k: int, m: int) -> str:
    return "holds" if k == m else "mostly holds" if 2 * k > m else "does not hold"


def image_claims(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Claim, the paper's figures, ours, verdict."""
    claims = []
    for table in results["tables"]:
        ours, paper = means(results, table), paper_means(table)
        k, m = count(ours.values(), "phydi", "standard", "wkp")
        of_paper = _share(*count(paper.values(), "phydi", "standard", "wkp"))
        claim = f"PHYDI has the least M1, or shares it (Table {table})"
        claims.append((claim, of_paper, _share(k, m), verdict(k, m)))
    ours, paper = means(results, "1"), paper_means("1")
    gains, published = gain_by_depth(ours), gain_by_depth(paper)
    rising = sum(a < b for a, b in zip(gains.values(), list(gains.values())[1:], strict=False))
    claims.append(
        (
            "The deeper the model, the more epochs PHYDI saves: M1 of standard over PHYDI's, by depth",
            _by_depth(published),
            _by_depth(gains),
            verdict(rising, len(gains) - 1) if len(gains) > 1 else "not measured",
        )
    )
    k, m = count(ours.values(), "phydi", "wkp")
    of_paper = _share(*count(paper.values(), "phydi", "wkp"))
    claims.append(("PHYDI is not slower than WKP, which is not the identity", of_paper, _share(k, m), verdict(k, m)))
    fixup = [group for group in ours.values() if "fixup" in group]
    if fixup:
        k = sum(group["fixup"] > max(group["standard"], group["wkp"], group["phydi"]) for group in fixup)
        claim = "Fixup needs more epochs than any of the others"
        claims.append((claim, "no figures", _share(k, len(fixup)), verdict(k, len(fixup))))
    return claims


def gain_by_depth(groups: Means) -> dict[int, float]:
    """Geometric mean over n of M1 of the standard model over PHYDI's, of pairs that were both reached."""
    logs: dict[int, list[float]] = {}
    for (depth, _), group in groups.items():
        standard, phydi = group.get("standard", math.inf), group.get("phydi", math.inf)
        if standard < math.inf and phydi < math.inf:
            logs.setdefault(depth, []).append(math.log(standard / phydi))
    return {depth: math.exp(sum(values) / len(values)) for depth, values in sorted(logs.items())}


def _by_depth(gains: Mapping[int, float]) -> str:
    return ", ".join(f"{depth}: {gain:.2f}" for depth, gain in gains.items())


def _share(k: int, m: int) -> str:
    return f"{k} of {m}"


def text_claims(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Claim, the paper's figures, ours, verdict."""
    found = {
        key: {norm: text.epochs(rows) for norm, rows in group.items()} for key, group in text.groups(results).items()
    }
    deep = [group for (_, depth), group in found.items() if depth >= 32]
    shallow = [group for (_, depth), group in found.items() if depth <= 16]
    k, m = count(deep, "phydi", "post", "pre")
    claims = [
        (
            "PHYDI is at the perplexity first, or shares it, from 32 layers on",
            "all (Fig. 4)",
            _share(k, m),
            verdict(k, m),
        )
    ]
    k, m = count(shallow, "pre", "post", "phydi")
    claims.append(("PreNorm is first with 12 and 16 layers", "all (Fig. 4)", _share(k, m), verdict(k, m)))
    ns = sorted({n for n, _ in found})
    reached = {
        n: [depth for (other, depth), group in found.items() if other == n and group["post"] < math.inf] for n in ns
    }
    missed = {
        n: [depth for (other, depth), group in found.items() if other == n and group["post"] == math.inf] for n in ns
    }
    k = sum(bool(missed[n]) and min(missed[n]) > max(reached[n], default=0) for n in ns)
    claims.append(
        (
            "PostNorm fails from some depth on: the most layers with which it gets there",
            ", ".join(f"n = {n}: {depth}" for n, depth in PAPER_POSTNORM_DEPTH.items()),
            ", ".join(f"n = {n}: {max(reached[n], default='none')}" for n in ns),
            verdict(k, len(ns)),
        )
    )
    depth = max(depth for _, depth in found)
    values = [group["phydi"] for (_, d), group in found.items() if d == depth]
    first = [group["phydi"] for (_, d), group in found.items() if d == min(d for _, d in found)]
    k = sum(a <= 1.25 * b for a, b in zip(values, first, strict=True))
    claims.append(
        (
            f"PHYDI with {depth} layers needs no more epochs than with few (at most a quarter more)",
            f"{PAPER_PHYDI_EPOCHS} epochs with 96",
            ", ".join(_epochs(value) for value in values) + f" (n = {', '.join(map(str, ns))})",
            verdict(k, len(values)),
        )
    )
    diverged = sum(row["status"] == "diverged" for row in results["rows"])
    claims.append(("PostNorm's loss diverges", "yes", f"{diverged} runs with a loss that is not finite", ""))
    return claims


def _epochs(value: float) -> str:
    return f"{value:.2f}" if value < math.inf else "not reached"


def claims_table(claims: Sequence[tuple[str, str, str, str]]) -> str:
    lines = ["| claim | paper | here | verdict |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(claim)} |" for claim in claims)])


def gradients(results: Mapping[str, Any]) -> str:
    """What the gradient norms show, in figures."""
    lines = ["| | output of layer 0 | of the last layer | largest over smallest |", "|---|--:|--:|--:|"]
    for norm, name in text.NORMS.items():
        norms = results["norms"][norm]["outputs"]
        lines.append(f"| {name} | {norms[0]:.2g} | {norms[-1]:.2g} | {max(norms) / min(norms):.3g} |")
    return "\n".join(lines)


# File and generator of each part.
PARTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "table-1": ("convergence_images.json", lambda results: image_table(results, "1")),
    "table-2": ("convergence_images.json", lambda results: image_table(results, "2")),
    "image-claims": ("convergence_images.json", lambda results: claims_table(image_claims(results))),
    "figure-4": ("convergence_text.json", text_table),
    "text-claims": ("convergence_text.json", lambda results: claims_table(text_claims(results))),
    "figure-4-reference": ("convergence_text_reference.json", text_table),
    "text-claims-reference": ("convergence_text_reference.json", lambda results: claims_table(text_claims(results))),
    "gradients": ("gradient_norms.json", gradients),
}


def parts(folder: Path) -> dict[str, str]:
    """The generated parts whose figures are in ``folder``."""
    made = {}
    for name, (file, make) in PARTS.items():
        if (folder / file).exists():
            results = json.loads((folder / file).read_text(encoding="utf-8"))
            if not name.startswith("table-") or name.removeprefix("table-") in results["tables"]:
                made[name] = make(results)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS, help="print this one only")
    parser.add_argument("--write", action="store_true", help="put the parts into the page")
    parser.add_argument(
        "--folder", type=Path, default=text.RESULTS, help="of the figures (default: benchmarks/results)"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="default: benchmarks/results/README.md")
    args = parser.parse_args()
    made = parts(args.folder)
    for name in [args.part] if args.part else made:
        if name not in made:
            parser.exit(1, f"{args.folder} has no {PARTS[name][0]} with the part {name}\n")
        if args.write:
            report.write_into(args.page, f"{COMMAND} {name}", made[name])
        else:
            print(made[name] if args.part else f"{name}\n\n{made[name]}\n")


if __name__ == "__main__":
    main()
