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
from typing import Any, NamedTuple

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import images
import report
import runs
import text
from plots import DATA_NAMES

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
# Section 4.3, of Fig. 4: the layers with which PostNorm fails, by n, the most with which it works, and PHYDI's epochs
# with 96 layers.
PAPER_POSTNORM_FAILS = {2: 48, 4: 96}
PAPER_POSTNORM_WORKS = {2: 32, 4: 64}
PAPER_PHYDI_EPOCHS = 2


class Figure(NamedTuple):
    """Epochs that a model needs, over seeds: the mean, infinite where a seed did not get there, and its standard error.

    ``least`` is the mean where such a seed counts with the epochs that it had, and as infinite where it diverged. The
    error is that of ``least``; None of a single seed.
    """

    mean: float
    least: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float | None], ends: Sequence[float]) -> Figure:
        """From the seeds' epochs, None where there is none, and where the seeds' runs ended."""
        least = [end if value is None else value for value, end in zip(values, ends, strict=True)]
        if math.inf in least:
            return cls(math.inf, math.inf, None)
        mean, error = runs.mean_and_error(least)
        return cls(math.inf if None in values else mean, mean, error)

    def clearly_less(self, other: Figure) -> bool | None:
        """Whether it is less by more than both errors together; None where one has no error."""
        if math.inf in (self.mean, other.least):
            return self.mean < other.least
        if self.error is None or other.error is None:
            return None
        return other.least - self.mean > math.hypot(self.error, other.error)


Group = Mapping[str, Figure]
Groups = Mapping[tuple[int, int], Group]


class Claim(NamedTuple):
    """A claim of the paper, its figures, ours and what follows from ours."""

    claim: str
    paper: str
    here: str
    verdict: str


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
    seeds = max(len(row["seeds"]) for table in results["tables"].values() for row in table)
    return (
        f"{DATA_NAMES[preset['data']]}, width {preset['width']}, {seeds} seeds; `{results['command']}` on "
        f"{images.machine_and_time(results)}"
    )


def text_table(results: Mapping[str, Any]) -> str:
    """Fig. 4 as a table, and the command."""
    return f"{text.text(results)}\n\n`{results['command']}`"


def image_figures(results: Mapping[str, Any], table: str) -> Groups:
    """M1 of each depth and n by initialisation."""
    found: dict[tuple[int, int], dict[str, Figure]] = {}
    for row in results["tables"].get(table, ()):
        ends = [math.inf if gone else end for end, gone in zip(row["epochs"], row["diverged"], strict=True)]
        found.setdefault((row["depth"], row["n"]), {})[row["init"]] = Figure.of(row["m1"], ends)
    return found


def paper_figures(table: str) -> Groups:
    return {
        key: {init: Figure(mean, mean, error) for init, (mean, error, _) in group.items()}
        for key, group in PAPER[table].items()
    }


def text_figures(results: Mapping[str, Any]) -> Groups:
    """Epochs to the perplexity, of each n and depth by normalisation."""
    cap = results["settings"]["epochs"]
    return {
        key: {
            norm: Figure.of(
                [text.reached_after(row) for row in rows],
                [math.inf if row["status"] == "diverged" else cap for row in rows],
            )
            for norm, rows in group.items()
        }
        for key, group in text.groups(results).items()
    }


class Count(NamedTuple):
    """In ``k`` of ``m`` groups a method is the first, in ``clear`` of them by more than the errors, where known."""

    k: int
    m: int
    clear: int | None

    def __str__(self) -> str:
        shown = f"{self.k} of {self.m}"
        return shown if self.clear is None else f"{shown}, {self.clear} by more than the standard errors"


def count(groups: Iterable[Group], ours: str, *others: str) -> Count:
    """Of the groups that have all of them, those in which ``ours`` is reached, and by none of ``others`` earlier."""
    some = [group for group in groups if {ours, *others} <= group.keys()]
    k = sum(group[ours].mean <= min(group[other].mean for other in others) and _reached(group, ours) for group in some)
    clearly = [[group[ours].clearly_less(group[other]) for other in others] for group in some]
    unknown = any(None in group for group in clearly)
    return Count(k, len(some), None if unknown or not some else sum(map(all, clearly)))


def _reached(group: Group, method: str) -> bool:
    return group[method].mean < math.inf


def verdict(k: int, m: int) -> str:
    if m == 0:
        return "not measured"
    return "holds" if k == m else "mostly holds" if 2 * k > m else "does not hold"


def counted(claim: str, ours: Count, paper: Count | str) -> Claim:
    return Claim(claim, str(paper), str(ours), verdict(ours.k, ours.m))


def image_claims(results: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for table in results["tables"]:
        ours, paper = (
            count(groups.values(), "phydi", "standard", "wkp")
            for groups in (image_figures(results, table), paper_figures(table))
        )
        claims.append(counted(f"PHYDI has the least M1, or shares it (Table {table})", ours, paper))
    groups, published = image_figures(results, "1"), paper_figures("1")
    gains, of_paper = gain_by_depth(groups), gain_by_depth(published)
    known = gains.keys() == of_paper.keys() and all(exact for _, exact in gains.values())
    means = [mean for mean, _ in gains.values()]
    rising = sum(a < b for a, b in zip(means, means[1:], strict=False))
    claims.append(
        Claim(
            "The deeper the model, the more epochs PHYDI saves: M1 of standard over PHYDI's, by depth",
            _by_depth(of_paper),
            _by_depth(gains),
            verdict(rising, len(gains) - 1) if known else "not measured",
        )
    )
    claims.append(
        counted(
            "PHYDI is not slower than WKP, which is not the identity",
            *(count(some.values(), "phydi", "wkp") for some in (groups, published)),
        )
    )
    fixup = [group for group in groups.values() if group.keys() == images.METHODS.keys()]
    k = sum(all(group["fixup"].mean > group[init].mean for init in ("standard", "wkp", "phydi")) for group in fixup)
    return [
        *claims,
        counted("Fixup needs more epochs than any of the others", Count(k, len(fixup), None), "no figures"),
    ]


def gain_by_depth(groups: Groups) -> dict[int, tuple[float, bool]]:
    """Geometric mean over n of M1 of the standard model over PHYDI's, and whether all of these were reached.

    Otherwise it is a lower bound: a standard model counts with the epochs that it had, PHYDI as infinite.
    """
    found: dict[int, list[tuple[float, bool]]] = {}
    for (depth, _), group in groups.items():
        if {"standard", "phydi"} <= group.keys():
            exact = _reached(group, "standard") and _reached(group, "phydi")
            gain = group["standard"].least / group["phydi"].mean if _reached(group, "phydi") else 0.0
            found.setdefault(depth, []).append((gain, exact))
    return {
        depth: (math.prod(gain for gain, _ in some) ** (1 / len(some)), all(exact for _, exact in some))
        for depth, some in sorted(found.items())
    }


def _by_depth(gains: Mapping[int, tuple[float, bool]]) -> str:
    return ", ".join(
        f"{depth}: " + ("standard diverged" if gain == math.inf else f"{'' if exact else '> '}{gain:.2f}")
        for depth, (gain, exact) in gains.items()
    )


def text_claims(results: Mapping[str, Any]) -> list[Claim]:
    groups = text_figures(results)
    deep = [group for (_, depth), group in groups.items() if depth >= 32]
    shallow = [group for (_, depth), group in groups.items() if depth <= 16]
    claims = [
        counted(
            "PHYDI is at the perplexity first, or shares it, from 32 layers on",
            count(deep, "phydi", "post", "pre"),
            "all (Fig. 4)",
        ),
        counted(
            "PreNorm is first, or shares it, with 12 and 16 layers",
            count(shallow, "pre", "post", "phydi"),
            "all (Fig. 4)",
        ),
    ]
    depths = {n: sorted(depth for other, depth in groups if other == n) for n in sorted({n for n, _ in groups})}
    reached = {
        n: [depth for depth in some if "post" in groups[n, depth] and _reached(groups[n, depth], "post")]
        for n, some in depths.items()
    }
    missed = {
        n: [depth for depth in some if "post" in groups[n, depth] and depth not in reached[n]]
        for n, some in depths.items()
    }
    tried = [n for n in depths if reached[n] or missed[n]]
    claims.append(
        Claim(
            "PostNorm fails from some depth on: the most layers with which it gets there",
            _by_n(PAPER_POSTNORM_WORKS),
            _by_n({n: max(reached[n], default="none") for n in tried}),
            verdict(
                sum(bool(reached[n] and missed[n]) and min(missed[n]) > max(reached[n]) for n in tried), len(tried)
            ),
        )
    )
    fails = {n: min(missed[n], default=math.inf) for n in tried}
    claims.append(
        Claim(
            "The depth at which PostNorm fails rises with n",
            _by_n(PAPER_POSTNORM_FAILS),
            _by_n({n: "at none" if depth == math.inf else depth for n, depth in fails.items()}),
            _rises(fails, {n: bool(reached[n]) for n in tried}),
        )
    )
    ends = {
        n: [groups[n, depth]["phydi"].mean for depth in (some[0], some[-1])]
        for n, some in depths.items()
        if len(some) > 1 and all("phydi" in groups[n, depth] for depth in (some[0], some[-1]))
    }
    claims.append(
        Claim(
            "PHYDI with the most layers needs at most a quarter more epochs than with the fewest (in brackets)",
            f"{PAPER_PHYDI_EPOCHS} epochs with 96",
            _by_n({n: f"{_epochs(most)} ({_epochs(fewest)})" for n, (fewest, most) in ends.items()}),
            verdict(sum(most < math.inf and most <= 1.25 * fewest for fewest, most in ends.values()), len(ends)),
        )
    )
    failed = [row["status"] for row in results["rows"] if row["norm"] == "post" and row["status"] != "reached"]
    diverged = failed.count("diverged")
    claims.append(
        Claim(
            "PostNorm diverges where it fails: its loss is infinite or not a number",
            "“diverges”",
            f"{diverged} of {len(failed)} runs",
            verdict(diverged, len(failed)),
        )
    )
    return claims


def _rises(fails: Mapping[int, float], works: Mapping[int, bool]) -> str:
    """Compares n = 2 and 4, as the paper does; not where both fail at all depths, or at none."""
    if not {2, 4} <= fails.keys():
        return "not measured"
    bounds = [fails[n] == math.inf for n in (2, 4)], [not works[n] for n in (2, 4)]
    if any(map(all, bounds)):
        return "not measured"
    return "holds" if fails[2] < fails[4] else "does not hold"


def _by_n(values: Mapping[int, Any]) -> str:
    return ", ".join(f"n = {n}: {value}" for n, value in values.items())


def _epochs(value: float) -> str:
    return f"{value:.2f}" if value < math.inf else "not reached"


def claims_table(claims: Mapping[str, Sequence[Claim]]) -> str:
    """Of one or more measurements of the same claims, each with the name of its column."""
    heads = [head for name in claims for head in (name, "verdict")]
    lines = [["claim", "paper", *heads], ["---"] * (2 + len(heads))]
    for same in zip(*claims.values(), strict=True):
        lines.append([same[0].claim, same[0].paper, *(part for claim in same for part in claim[2:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gradients(results: Mapping[str, Any]) -> str:
    """What the gradient norms show, in figures."""
    lines = ["| | output of layer 0 | of the last layer | largest over smallest |", "|---|--:|--:|--:|"]
    for norm, name in text.NORMS.items():
        norms = results["norms"][norm]["outputs"]
        lines.append(f"| {name} | {norms[0]:.2g} | {norms[-1]:.2g} | {max(norms) / min(norms):.3g} |")
    return "\n".join(lines)


# Files and generator of each part.
IMAGES, TEXT, TEXT_REFERENCE = "convergence_images.json", text.SUMMARY, "convergence_text_reference.json"
PARTS: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "table-1": ((IMAGES,), lambda results: image_table(results, "1")),
    "table-2": ((IMAGES,), lambda results: image_table(results, "2")),
    "image-claims": ((IMAGES,), lambda results: claims_table({"here": image_claims(results)})),
    "figure-4": ((TEXT,), text_table),
    "figure-4-reference": ((TEXT_REFERENCE,), text_table),
    "text-claims": (
        (TEXT, TEXT_REFERENCE),
        lambda ours, published: claims_table(
            {"this package's weights": text_claims(ours), "published weights": text_claims(published)}
        ),
    ),
    "gradients": (("gradient_norms.json",), gradients),
}


def parts(folder: Path) -> dict[str, str]:
    """The generated parts whose figures are in ``folder``."""
    made = {}
    for name, (files, make) in PARTS.items():
        if all((folder / file).exists() for file in files):
            results = [json.loads((folder / file).read_text(encoding="utf-8")) for file in files]
            if not name.startswith("table-") or name.removeprefix("table-") in results[0]["tables"]:
                made[name] = make(*results)
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
            parser.exit(1, f"{args.folder} has no {' and '.join(PARTS[name][0])} with the part {name}\n")
        if args.write:
            report.write_into(args.page, f"{COMMAND} {name}", made[name])
        else:
            print(made[name] if args.part else f"{name}\n\n{made[name]}\n")


if __name__ == "__main__":
    main()
