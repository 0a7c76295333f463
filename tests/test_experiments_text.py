"""The experiment with language models: its text, its measures, its runs, and the plots and the page of all figures."""

from __future__ import annotations

import json
import math
import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "convergence"
sys.path.append(str(FOLDER))

import gradient_norms  # noqa: E402
import images  # noqa: E402
import plots  # noqa: E402
import results_page  # noqa: E402
import runs  # noqa: E402
import text  # noqa: E402
import text_data  # noqa: E402

from phydi_kernels.demo.report import environment  # noqa: E402

# A model and a text so small that a run takes a moment.
SIZES = {"d_model": 12, "nhead": 1, "dim_feedforward": 12, "batch": 4, "epochs": 2, "evaluations_per_epoch": 2}
WORDS = ["the", "cat", "saw", "a", "dog", ".", "it", "ran", "and", "sat"]


@pytest.fixture
def corpus() -> text_data.Corpus:
    generator = torch.Generator().manual_seed(0)
    sizes = {"train": 600, "validation": 90, "test": 75}
    texts = {
        part: [WORDS[i] for i in torch.randint(len(WORDS), (size,), generator=generator)]
        for part, size in sizes.items()
    }
    return text_data.corpus("pydoc", texts, 1)


def settings_of(corpus: text_data.Corpus, **other: Any) -> dict[str, Any]:
    common = {**text.RECIPE, **text.PRESETS["cpu"], **SIZES, "digest": corpus.digest, "device": "cpu", "init": "fan"}
    return {**common, "norm": "phydi", "n": 4, "depth": 3, **other}


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ('Don\'t: see "Foo" (1).', "don ' t see foo ( 1 ) ."),
        ("What?! yes,no;maybe", "what ? ! yes , no maybe"),
        ("a<br />b\n\tc", "a b c"),
        (" @-@ <unk> ", "@-@ <unk>"),
    ],
)
def test_tokenize(written, words):
    assert text_data.tokenize(written) == words.split()


def test_divide_keeps_each_paragraph_once_whole_and_in_order():
    paragraphs = [f"p{i} " + "word " * (i % 7) for i in range(200)]
    repeated = [p for i, p in enumerate(paragraphs) for p in (p, paragraphs[i // 2].upper())]
    parts = text_data.divide(repeated)
    assert list(parts) == ["train", "validation", "test"]
    assert sum(parts.values(), []) == [word for p in paragraphs for word in p.split()]
    names = [{word for word in words if word.startswith("p")} for words in parts.values()]
    assert sum(map(len, names)) == 200 and not any(a & b for a in names for b in names if a is not b)
    assert [words[0][0] for words in parts.values()] == ["p"] * 3
    shares = [len(words) / sum(map(len, parts.values())) for words in parts.values()]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_pydoc_is_all_of_pythons_topics():
    topics = text_data.importlib.import_module("pydoc_data.topics").topics
    paragraphs = {tuple(text_data.tokenize(p)) for topic in topics.values() for p in re.split(r"\n\s*\n", topic)}
    corpus = text_data.load("pydoc", Path())
    assert sum(corpus.facts()["words"].values()) == sum(map(len, paragraphs)) > 50_000
    assert len(corpus.vocabulary) % 12 == 0 and len(corpus.vocabulary) > 2_000
    assert all(share < 0.15 for share in corpus.facts()["unknown_share"].values())


@pytest.mark.parametrize("size", [10, 11, 12, 23])
def test_vocabulary_begins_with_unknown_and_is_divisible(size):
    words = [f"w{i:02}" for i in range(size)] * 2 + ["w05", "rare", "<unk>", "<unk>", "<unk>"]
    found = text_data.vocabulary(words, 2)
    assert found[:3] == ("<unk>", "w05", "w00") and set(words) - set(found) == {"rare"}
    assert len(found) % 12 == 0 and len(found) - (size + 1) < 12 and len(set(found)) == len(found)


def test_corpus_takes_its_words_from_the_training_part():
    texts = {"train": ["a", "b", "a", "c"], "validation": ["a", "d", "d"], "test": ["<unk>", "c", "b"]}
    corpus = text_data.corpus("small", texts, 1)
    assert corpus.vocabulary[:4] == ("<unk>", "a", "b", "c")
    assert [corpus.train.tolist(), corpus.validation.tolist(), corpus.test.tolist()] == [
        [1, 2, 1, 3],
        [1, 0, 0],
        [0, 3, 2],
    ]
    assert corpus.facts()["unknown_share"] == {"train": 0, "validation": 2 / 3, "test": 1 / 3}
    assert corpus.digest != text_data.corpus("small", {**texts, "test": ["c", "b", "<unk>"]}, 1).digest


@pytest.mark.parametrize(("words", "rows", "length"), [(101, 4, 5), (102, 4, 5), (104, 7, 35), (6, 8, 3), (2, 1, 1)])
def test_windows_have_every_word_as_a_target_once(words, rows, length):
    stream = torch.arange(1, words + 1)
    columns = -(-(words - 1) // rows)
    targets = []
    for index, (x, y) in enumerate(text_data.windows(stream, rows, length)):
        assert x.shape == y.shape == (rows, min(length, columns - index * length))
        real = y != text_data.NO_TARGET
        assert torch.equal(y[real], x[real] + 1) and not x[~real].any()
        # Lines are read side by side, each from where the last window ended.
        starts = torch.arange(rows) * columns + index * length + 1
        assert torch.equal(x[real[:, 0], 0], starts[real[:, 0]])
        targets += y[real].tolist()
    assert sorted(targets) == list(range(2, words + 1))


def wikitext(folder: Path, suffix: str) -> None:
    folder.mkdir()
    for part in ("train", "valid", "test"):
        (folder / f"wiki.{part}.{suffix}").write_text(f" = Title {part} = \n\n The cat <unk> , ran .\n")


def test_raw_wikitext2_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace())
    wikitext(tmp_path / "here", "raw")
    with pytest.raises(text_data.MissingDataError, match=r"here has the \.raw files .* put wiki\.train\.tokens"):
        text_data.load("wikitext2", tmp_path / "here")


def test_wikitext2_is_read_from_a_folder(tmp_path):
    wikitext(tmp_path / "here", "tokens")
    parts = text_data.wikitext2(tmp_path / "here")
    assert parts["validation"] == "= title valid = the cat <unk> , ran .".split()
    assert parts["train"][2] == "train" and parts["test"][2] == "test"


def test_wikitext2_comes_through_datasets(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*names: str) -> dict[str, Any]:
        asked.append(names)
        return {part: {"text": ["", f" = {part} = \n", " the cat \n"]} for part in text_data.PARTS}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert text_data.wikitext2(tmp_path)["test"] == ["=", "test", "=", "the", "cat"]
    assert asked == [("Salesforce/wikitext", "wikitext-2-v1")]


@pytest.mark.parametrize("installed", [False, True])
def test_missing_wikitext2_says_in_one_line_what_to_do(tmp_path, monkeypatch, capsys, installed):
    def load_dataset(*names: str) -> None:
        raise ConnectionError("no\nnetwork")

    package = types.SimpleNamespace(load_dataset=load_dataset) if installed else None
    monkeypatch.setitem(sys.modules, "datasets", package)
    monkeypatch.setattr(sys, "argv", ["text.py", "--preset", "paper", "--data-folder", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        text.main()
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in (str(tmp_path / "wikitext-2"), "wiki.train.tokens", "pip install datasets", "--data pydoc"):
        assert part in message
    assert ("no network" in message) is installed


class Bigrams(nn.Module):
    """Logits by the last word alone: no window cuts anything off."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.table = nn.Embedding(words, words)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.table(tokens))


@pytest.mark.parametrize("words", [150, 33, 2])
def test_perplexity_is_exp_of_the_mean_loss_of_all_words(words):
    torch.manual_seed(0)
    model = Bigrams(12)
    stream = torch.randint(12, (words,))
    probabilities = model.table.weight.double().softmax(1)[stream[:-1], stream[1:]]
    mean = text.mean_loss(model, stream, 2)
    assert mean == pytest.approx(-probabilities.log().mean().item(), rel=1e-5)
    assert text.perplexity(mean) == pytest.approx(probabilities.prod().item() ** (-1 / (words - 1)), rel=1e-5)
    assert model.training
    assert text.perplexity(1e3) == math.inf


def test_loss_is_the_mean_over_targets():
    model = Bigrams(12).eval()
    inputs, targets = torch.tensor([[3, 1], [4, 0]]), torch.tensor([[1, 5], [2, text_data.NO_TARGET]])
    mean, count = text.loss(model, inputs, targets)
    logs = model.table.weight.log_softmax(1)
    assert count == 3
    torch.testing.assert_close(mean, -(logs[3, 1] + logs[1, 5] + logs[4, 2]) / 3)


def test_recipe_is_the_published_one():
    assert text.DEPTHS == (12, 16, 24, 32, 48, 64, 96) and text.NS == (2, 3, 4)
    assert text.RECIPE == {
        "threshold": 200.0,
        "bptt": 35,
        "dropout": 0.1,
        "lr": 0.01,
        "lr_decay": 0.9,
        "clip": 0.5,
        "stop_at_target": True,
    }
    assert text.PRESETS["paper"] == {
        "data": "wikitext2",
        "init": "reference",
        "d_model": 128,
        "nhead": 8,
        "dim_feedforward": 256,
        "batch": 64,
        "epochs": 50,
        "evaluations_per_epoch": 1,
    }


def test_task_follows_the_recipe(corpus):
    task = text.task(settings_of(corpus, bptt=7, n=3, norm="pre"), corpus)
    assert type(task.optimizer) is torch.optim.Adagrad and task.clip == 0.5 and task.evaluations_per_epoch == 2
    assert {id(p) for p in task.model.parameters()} == {id(p) for p in task.optimizer.param_groups[0]["params"]}
    rates = []
    for _ in range(3):
        rates += task.scheduler.get_last_lr()
        task.optimizer.step()
        task.scheduler.step()
    assert rates == pytest.approx([0.01, 0.009, 0.0081])
    shapes = [tuple(x.shape) for x, _ in task.batches(0, torch.Generator())]
    assert (
        shapes == [(4, 7)] * 21 + [(4, 3)] and sum(task.loss(b)[1] for b in task.batches(1, torch.Generator())) == 599
    )
    assert (len(task.model.encoder.layers), task.model.encoder.layers[0].norm, task.model.generator.n) == (3, "pre", 3)
    assert task.model.dropout.p == 0.1
    assert [task.reached({"validation_perplexity": value}) for value in (150.0, 200.0, 200.01)] == [True, True, False]
    found = {**task.evaluate(), **task.test()}
    for part in ("validation", "test"):
        assert found[f"{part}_perplexity"] == pytest.approx(math.exp(found[f"{part}_loss"]))
        assert found[f"{part}_loss"] == text.mean_loss(task.model, getattr(corpus, part), 7)


@pytest.mark.parametrize("init", runs.INITS)
def test_task_draws_weights_by_init(corpus, init):
    """H of linear1 has the published variance 2 / (12 (12/4 + 4)) or a dense layer's 2 / (12 + 12)."""
    task = text.task(settings_of(corpus, init=init, depth=60), corpus)
    squares = [layer.linear1.dense_weight().square().mean().item() for layer in task.model.encoder.layers]
    expected = {"reference": 2 / (12 * 7), "fan": 2 / 24}[init]
    assert sum(squares) / 60 == pytest.approx(expected, rel=0.25)


def test_a_step_of_the_paper_preset():
    """On generated words of WikiText-2's vocabulary: 28,780 with <unk>, and 8 more so that n = 3 divides it."""
    words = [f"w{i}" for i in range(28_779)]
    corpus = text_data.corpus("wikitext2", {"train": words, "validation": words[:50], "test": words[:50]}, 1)
    assert len(corpus.vocabulary) == 28_788
    run = text.grid("paper", corpus, seeds=1, depths=[12], ns=[3], norms=["phydi"])[0]
    torch.manual_seed(0)
    task = text.task(run.settings, corpus)
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    inputs, targets = task.batches(0, torch.Generator())[0]
    assert inputs.shape == (64, 35)
    assert (task.model.d_model, task.model.encoder.layers[0].linear1.out_features) == (120, 255)
    loss, count = task.loss((inputs, targets))
    assert count == 64 * 35 and loss.item() == pytest.approx(math.log(28_788), rel=0.1)
    loss.backward()
    nn.utils.clip_grad_norm_(task.model.parameters(), task.clip)
    task.optimizer.step()
    moved = {name for name, p in task.model.named_parameters() if not torch.equal(p, before[name])}
    # The branches are the identity: their weights have no gradient before alpha has moved.
    expected = {name for name in before if name.endswith("alpha") or not name.startswith("encoder")}
    assert moved == expected


def test_a_run_that_is_stopped_goes_on_as_if_it_were_not(corpus, tmp_path):
    settings = settings_of(corpus, bptt=20, threshold=1.0)

    def train(out: str, stops: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        run, steps = runs.Run("run", settings, 3), iter(range(10**6))
        for _ in range(stops):
            with pytest.raises(runs.InterruptedRunError):
                runs.train(run, tmp_path / out, build, save_share=math.inf, on_step=lambda epoch: next(steps) % 3 == 2)
        result = runs.train(run, tmp_path / out, build)
        return result, runs.read_checkpoint(run.folder(tmp_path / out) / "checkpoint.pt")["model"]

    def build(settings: Mapping[str, Any], seed: int) -> runs.Task:
        return text.task(settings, corpus)

    (once, weights), (again, same) = train("once", 0), train("stopped", 4)
    assert once["status"] == "not reached" and len(once["log"]) == 4 and once["steps"] == 16
    for result in (once, again):
        del result["seconds"], result["cpu_seconds"]
        for line in result["log"]:
            del line["seconds"]
    assert once == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert [line["learning_rate"] for line in once["log"]] == pytest.approx([0.01, 0.01, 0.009, 0.009])
    assert all(len(line["alphas"]) == 3 for line in once["log"]) and any(once["log"][0]["alphas"].values())


def test_grid_has_every_model_and_starts_with_the_deepest(corpus):
    grid = text.grid("cpu", corpus, seeds=2)
    models = [(run.settings["depth"], run.settings["n"], run.settings["norm"], run.seed) for run in grid]
    assert len(set(models)) == len({run.folder(Path()) for run in grid}) == 7 * 3 * 3 * 2
    assert [depth for depth, *_ in models] == sorted((depth for depth, *_ in models), reverse=True)
    assert all(run.settings["init"] == "fan" and run.settings["digest"] == corpus.digest for run in grid)
    json.dumps([run.settings for run in grid])
    widths = {(run.settings["d_model"], run.settings["dim_feedforward"]) for run in grid}
    assert widths == {(48, 96)}
    paper = {run.settings["n"]: run.settings for run in text.grid("paper", corpus, seeds=1)}
    assert [paper[n]["d_model"] for n in text.NS] == [128, 120, 128]
    assert [paper[n]["dim_feedforward"] for n in text.NS] == [256, 255, 256]


def test_build_refuses_another_text():
    corpus = text_data.load("pydoc", Path())
    with pytest.raises(ValueError, match="the text of pydoc has changed"):
        text.build(settings_of(corpus, digest="other"), 0, folder=Path())


def outcome(depth: int, n: int, norm: str, seed: int, status: str, epoch: float | None) -> dict[str, Any]:
    """What runs.read returns of a run."""
    alphas = {f"layers.{i}": 0.1 * i * (-1) ** seed for i in range(3)} if norm == "phydi" else {}
    lines = [{"epoch": e, "validation_perplexity": 300 - 50 * e, "alphas": alphas} for e in (0.5, 1.0)]
    return {
        "seed": seed,
        "settings": {**text.RECIPE, **text.PRESETS["cpu"], "init": "fan", "depth": depth, "n": n, "norm": norm},
        "status": status,
        "epoch": epoch,
        "steps": 94,
        "seconds": 90.0,
        "cpu_seconds": 60.0,
        "parameters": 1000,
        "test": {},
        "log": [*lines, {"diverged": True, "epoch": 1.1}] if status == "diverged" else lines,
    }


@pytest.fixture
def figures(corpus) -> dict[str, Any]:
    """A summary in which PHYDI is first at 96 layers and second at 12."""
    table = {
        (12, "post"): [("reached", 1.5), ("reached", 2.0)],
        (12, "pre"): [("reached", 1.0), ("reached", 1.0)],
        (12, "phydi"): [("reached", 1.0), ("reached", 1.25)],
        (96, "post"): [("diverged", 0.5), ("not reached", None)],
        (96, "pre"): [("reached", 2.0), ("not reached", None)],
        (96, "phydi"): [("reached", 1.25), ("reached", 1.25)],
    }
    found = [
        outcome(depth, 4, norm, seed, *one) for (depth, norm), two in table.items() for seed, one in enumerate(two)
    ]
    return text.summary("cpu", corpus, found, "python text.py")


def test_summary_keeps_capped_and_diverged_runs(figures):
    assert [(row["depth"], row["norm"], row["seed"]) for row in figures["rows"]] == [
        (depth, norm, seed) for depth in (12, 96) for norm in text.NORMS for seed in (0, 1)
    ]
    assert figures["rows"][6]["status"] == "diverged" and figures["rows"][6]["curve"] == [[0.5, 275.0], [1.0, 250.0]]
    assert figures["alphas"] == {"depth": 96, "n": 4, "seed": 0, "epochs": [0.5, 1.0], "values": [[0, 0.1, 0.2]] * 2}
    assert text.markdown(figures).splitlines()[2:] == [
        "| 4 | 12 | 1.75 ± 0.25 | **1.00 ± 0.00** | 1.12 ± 0.12 |",
        "| 4 | 96 | diverged, > 3 | 2.00, > 3 | **1.25 ± 0.00** |",
    ]
    shown = text.text(figures)
    assert "perplexity of 200" in shown and "12 processor minutes" in shown and 'init "fan"' in shown
    figures["rows"][0]["cpu_seconds"] = None
    assert "minutes" not in text.text(figures)


def test_cells_and_means_of_seeds():
    def rows(*found: tuple[str, float | None]) -> list[dict[str, Any]]:
        return [{"status": status, "epoch": epoch} for status, epoch in found]

    assert text.cell(rows(("reached", 1.5)), 3) == "1.50"
    assert text.cell(rows(("not reached", None), ("not reached", None)), 3) == "> 3"
    assert text.cell(rows(("diverged", 0.5)), 3) == "diverged"
    assert text.epochs(rows(("reached", 1.5), ("reached", 2.0))) == 1.75
    # A diverged run has the epoch at which it did.
    assert text.epochs(rows(("reached", 1.5), ("diverged", 0.5))) == math.inf


def test_main_measures_writes_and_prints(corpus, tmp_path, monkeypatch, capsys):
    def run_all(grid: list[runs.Run], out: Path, build: Callable[..., runs.Task], **options: Any) -> list[Any]:
        assert options["processes"] == 1
        return [runs.train(run, out, build) for run in grid]

    monkeypatch.setattr(runs, "run_all", run_all)
    monkeypatch.setattr(text, "load", lambda name, folder: corpus)
    monkeypatch.setitem(text.PRESETS, "cpu", {**text.PRESETS["cpu"], **SIZES})
    options = ["--depth", "2", "--n", "2", "4", "--norm", "pre", "phydi", "--seeds", "1", "--processes", "1"]
    monkeypatch.setattr(sys, "argv", ["text.py", *options, "--out", str(tmp_path), "--init", "reference"])
    text.main()
    results = json.loads((tmp_path / "text-cpu-pydoc-reference" / "summary.json").read_text())
    # Twelve words: every perplexity is below 200 at the first evaluation.
    assert [(row["n"], row["norm"], row["status"], row["epoch"]) for row in results["rows"]] == [
        (n, norm, "reached", 0.4) for n in (2, 4) for norm in ("pre", "phydi")
    ]
    assert results["settings"]["init"] == "reference" and results["command"].endswith("--init reference")
    table = "| 2 | 2 |  | **0.40** | **0.40** |"
    assert table in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--markdown"])
    text.main()
    assert table in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        ([], "convergence_text.json"),
        (["--preset", "cpu", "--init", "fan", "--n", "4", "3", "2", "--seeds", "2"], "convergence_text.json"),
        (["--depth", "12", "96"], "out/text-cpu-pydoc-fan/summary.json"),
        (["--n", "4"], "out/text-cpu-pydoc-fan/summary.json"),
        (["--norm", "phydi"], "out/text-cpu-pydoc-fan/summary.json"),
        (["--seeds", "1"], "out/text-cpu-pydoc-fan/summary.json"),
        (["--data", "wikitext2"], "out/text-cpu-wikitext2-fan/summary.json"),
        (["--init", "reference"], "out/text-cpu-pydoc-reference/summary.json"),
        (["--preset", "paper"], "out/text-paper-wikitext2-reference/summary.json"),
        (["--init", "reference", "--depth", "12", "--n", "4", "--file", "mine.json"], "mine.json"),
    ],
)
def test_figures_of_a_part_never_replace_those_of_the_whole(
    corpus, figures, arguments, file, tmp_path, monkeypatch, capsys
):
    folders = []

    def run_all(jobs: list[runs.Run], out: Path, *_: Any, **options: Any) -> None:
        folders.append(out)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text, "RESULTS", tmp_path)
    monkeypatch.setattr(text, "load", lambda name, folder: corpus)
    monkeypatch.setattr(text, "summary", lambda *_: figures)
    monkeypatch.setattr(runs, "run_all", run_all)
    monkeypatch.setattr(sys, "argv", ["text.py", "--out", "out", *arguments])
    text.main()
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.json")] == [Path(file)]
    if file.startswith("out/"):
        assert folders == [Path(file).parent]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--markdown"])
    text.main()
    assert "| 4 | 96 |" in capsys.readouterr().out


@pytest.mark.parametrize("norm", text.NORMS)
def test_gradient_norms_are_those_of_the_loss(corpus, norm):
    settings = settings_of(corpus, norm=norm, depth=5)
    torch.manual_seed(0)
    found = gradient_norms.norms(text.task(settings, corpus))
    torch.manual_seed(0)
    task = text.task(settings, corpus)
    model = task.model.eval()
    inputs, targets = task.batches(0, torch.Generator())[0]
    task.loss((inputs, targets))[0].backward()
    for layer, norm_of_layer in zip(model.encoder.layers, found["parameters"], strict=True):
        squares = sum(p.grad.square().sum().item() for p in layer.parameters())
        assert norm_of_layer == pytest.approx(squares**0.5, rel=1e-4)
    # The output of the last layer, made a leaf: what follows is the generator, after PreNorm's normalisation.
    states: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda m, i, o: states.append(o.detach())) for layer in model.encoder.layers]
    model(inputs)
    for hook in hooks:
        hook.remove()
    leaf = states[-1].requires_grad_()
    logits = model.generator(leaf if model.encoder.norm is None else model.encoder.norm(leaf))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    assert len(found["outputs"]) == 6 and found["outputs"][-1] == pytest.approx(leaf.grad.norm().item(), rel=1e-4)
    equal = max(found["outputs"]) < min(found["outputs"]) * (1 + 1e-5)
    assert equal is (norm == "phydi")


def test_gradient_norms_are_averaged_over_seeds(corpus):
    settings = settings_of(corpus)
    results = gradient_norms.measure(settings, corpus, 2)
    assert list(results) == list(text.NORMS)
    singles = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        singles.append(gradient_norms.norms(text.task({**settings, "norm": "pre"}, corpus))["outputs"])
    expected = [math.sqrt(a * b) for a, b in zip(*singles, strict=True)]
    assert results["pre"]["outputs"] == pytest.approx(expected, rel=1e-5)


def image_row(depth: int, n: int, init: str, m1: list[float | None], batch_size: int = 64) -> dict[str, Any]:
    """A row as images.py writes it; a seed without M1 has run for two epochs."""

    def result(seed: int, epoch: float | None) -> dict[str, Any]:
        line = {"train_loss": 1.0, "validation_accuracy": 0.1, "alphas": {"a": 0.1, "b": -0.2}}
        log = [{**line, "epoch": e / 4, "step": 16 * e} for e in range(1, int(4 * (epoch or 2.0)))]
        last = {"epoch": epoch or 2.0, "step": 99, "validation_accuracy": 0.9 if epoch else 0.1}
        return {
            "seed": seed,
            "log": [*log, {**line, **last, "alphas": {"a": 0.3, "b": -0.4}}],
            "parameters": 10,
            "status": "reached" if epoch else "not reached",
            "test": {"test_accuracy": 0.8},
            "seconds": 30.0,
        }

    row = {"depth": depth, "n": n, "init": init, "batch_size": batch_size, "learning_rate": 0.01}
    return images.with_figures(row, [result(seed, epoch) for seed, epoch in enumerate(m1)], None)


@pytest.fixture
def image_figures() -> dict[str, Any]:
    """PHYDI is first with 50 and 152 layers, and third with 18, where Fixup is last."""
    rows = [
        *(image_row(18, 4, init, [e, e]) for init, e in (("standard", 1.0), ("wkp", 1.25), ("phydi", 1.5))),
        image_row(18, 4, "fixup", [3.0, None]),
        *(image_row(50, 4, init, [e, e]) for init, e in (("standard", 2.0), ("wkp", 1.5), ("phydi", 1.0))),
        *(image_row(152, 4, init, [e, 6.0]) for init, e in (("standard", 6.0), ("wkp", None))),
        image_row(152, 4, "phydi", [2.25, 1.75]),
    ]
    table_2 = [image_row(18, 2, init, [1.0], 128) for init in ("standard", "wkp", "phydi")]
    return {
        "command": "python images.py",
        "environment": environment(),
        "preset": {"data": "digits", "width": 16, "evaluations_per_epoch": 4},
        "tables": {"1": rows, "2": table_2},
    }


def test_paper_figures_are_those_of_its_text():
    """Section 4.2: fewer epochs "by more than 20 in some cases"; bold in Table 1: PHYDI 7 times, in Table 2 always."""
    for table, least in (("1", (7, 9, 6)), ("2", (6, 6, 4))):
        groups = results_page.paper_figures(table)
        assert results_page.count(groups.values(), "phydi", "standard", "wkp") == least
    saved = [group["standard"].mean - group["phydi"].mean for group in results_page.paper_figures("1").values()]
    assert sum(value > 20 for value in saved) == 2
    assert [key for key in results_page.PAPER_TABLE_1 if key[1] == 3] == [(18, 3), (50, 3), (152, 3)]


def test_image_table_has_both_figures(image_figures):
    lines = results_page.image_table(image_figures, "1").splitlines()
    assert lines[0] == "| Model | n | M1 | M1, paper | M2 | M2, paper | test, % |"
    assert lines[2] == "| PHResNet18 | 4 | **1.00 ± 0.00** | **3.75 ± 0.48** | - | 1 | 80.0 ± 0.0 |"
    assert lines[5] == "| + Fixup | 4 | 3.00, > 2.00 |  | - |  | 80.0 ± 0.0 |"
    assert lines[8].startswith("| + PHYDI | 4 | **1.00 ± 0.00** | **7.00 ± 1.15** | - | - |")
    assert (
        results_page.image_table(image_figures, "2")
        .splitlines()[4]
        .startswith("| + PHYDI | 2 | 128 | 0.01 | **1.00** | **10.00 ± 1.22** | - | - |")
    )


BY_ERRORS = "by more than the standard errors"
DEEPER = "The deeper the model, the more epochs PHYDI saves: M1 of standard over PHYDI's, by depth"


def claims_of(found: list[results_page.Claim]) -> dict[str, tuple[str, ...]]:
    """The paper's figures, ours and the verdict, by claim."""
    assert all(len(claim) == 4 and claim.verdict for claim in found)
    return {claim.claim: claim[1:] for claim in found}


def test_image_claims_are_counted(image_figures):
    claims = claims_of(results_page.image_claims(image_figures))
    assert claims["PHYDI has the least M1, or shares it (Table 1)"] == (
        f"7 of 9, 6 {BY_ERRORS}",
        # With 152 layers WKP has 4 +- 2 epochs at least: not clearly more than 2.
        f"2 of 3, 1 {BY_ERRORS}",
        "mostly holds",
    )
    # One seed has no standard error.
    assert claims["PHYDI has the least M1, or shares it (Table 2)"] == (f"6 of 6, 4 {BY_ERRORS}", "1 of 1", "holds")
    assert claims[DEEPER] == ("18: 1.02, 50: 1.35, 152: 5.00", "18: 0.67, 50: 2.00, 152: 3.00", "holds")
    assert claims["PHYDI is not slower than WKP, which is not the identity"] == (
        f"8 of 9, 8 {BY_ERRORS}",
        f"2 of 3, 1 {BY_ERRORS}",
        "mostly holds",
    )
    # One that was not reached is the slowest.
    assert claims["Fixup needs more epochs than any of the others"][1:] == ("1 of 1", "holds")


def test_a_verdict_needs_groups():
    assert [results_page.verdict(k, 4) for k in (0, 2, 3, 4)] == ["does not hold"] * 2 + ["mostly holds", "holds"]
    assert results_page.verdict(0, 0) == "not measured"


def test_figures_of_seeds_that_did_not_get_there():
    figure = results_page.Figure
    assert figure.of([1.0, 2.0], [5.0, 5.0]) == (1.5, 1.5, 0.5)
    assert figure.of([1.0, None], [5.0, 4.0]) == (math.inf, 2.5, pytest.approx(1.5))
    assert figure.of([1.0, None], [5.0, math.inf]) == (math.inf, math.inf, None)
    assert figure.of([1.0], [5.0]) == (1.0, 1.0, None)


def test_ties_are_shared_and_wins_within_the_errors_are_told_apart():
    figure = results_page.Figure
    never = figure(math.inf, math.inf, None)

    def count(a: results_page.Figure, b: results_page.Figure) -> tuple[int, int, int | None]:
        return results_page.count([{"a": a, "b": b}, {"a": a}], "a", "b")

    assert count(figure(1, 1, 0.0), figure(1, 1, 0.0)) == (1, 1, 0)
    assert count(figure(1, 1, 0.3), figure(1.49, 1.49, 0.4)) == (1, 1, 0)
    assert count(figure(1, 1, 0.3), figure(1.51, 1.51, 0.4)) == (1, 1, 1)
    assert count(figure(1, 1, 0.3), figure(math.inf, 1.4, 0.4)) == (1, 1, 0)
    assert count(figure(2, 2, 0.0), figure(1, 1, 0.0)) == (0, 1, 0)
    assert count(figure(1, 1, None), figure(1.5, 1.5, None)) == (1, 1, None)
    assert count(figure(1, 1, 0.3), never) == (1, 1, 1)
    assert count(never, never) == count(never, figure(1, 1, 0.1)) == (0, 1, 0)
    assert (
        str(results_page.Count(3, 4, 2)) == f"3 of 4, 2 {BY_ERRORS}" and str(results_page.Count(3, 4, None)) == "3 of 4"
    )


def replace_row(results: dict[str, Any], depth: int, init: str, m1: list[float | None]) -> None:
    rows = results["tables"]["1"]
    index = next(i for i, row in enumerate(rows) if (row["depth"], row["init"]) == (depth, init))
    rows[index] = image_row(depth, 4, init, m1)


def test_a_depth_without_m1_is_a_bound_and_leaves_the_claim_unmeasured(image_figures):
    # A run of two epochs without M1.
    replace_row(image_figures, 152, "standard", [6.0, None])
    assert claims_of(results_page.image_claims(image_figures))[DEEPER][1:] == (
        "18: 0.67, 50: 2.00, 152: > 2.00",
        "not measured",
    )
    replace_row(image_figures, 50, "phydi", [1.0, None])
    assert claims_of(results_page.image_claims(image_figures))[DEEPER][1:] == (
        "18: 0.67, 50: > 0.00, 152: > 2.00",
        "not measured",
    )
    replace_row(image_figures, 50, "phydi", [1.0, 1.0])
    rows = image_figures["tables"]["1"]
    next(row for row in rows if (row["depth"], row["init"]) == (152, "standard"))["diverged"] = [False, True]
    assert claims_of(results_page.image_claims(image_figures))[DEEPER][1:] == (
        "18: 0.67, 50: 2.00, 152: standard diverged",
        "not measured",
    )
    image_figures["tables"]["1"] = [row for row in rows if row["depth"] < 152]
    assert claims_of(results_page.image_claims(image_figures))[DEEPER][1:] == ("18: 0.67, 50: 2.00", "not measured")


FIRST = "PHYDI is at the perplexity first, or shares it, from 32 layers on"
SMALL = "PreNorm is first, or shares it, with 12 and 16 layers"
FAILS = "PostNorm fails from some depth on: the most layers with which it gets there"
RISES = "The depth at which PostNorm fails rises with n"
FLAT = "PHYDI with the most layers needs at most a quarter more epochs than with the fewest (in brackets)"
DIVERGES = "PostNorm diverges where it fails: its loss is infinite or not a number"


def change(results: dict[str, Any], norm: str, depth: int, status: str, epoch: float | None = None) -> None:
    for row in results["rows"]:
        if (row["norm"], row["depth"]) == (norm, depth):
            row.update(status=status, epoch=epoch)


def test_text_claims_are_counted(figures):
    claims = claims_of(results_page.text_claims(figures))
    assert {claim: rest[1:] for claim, rest in claims.items()} == {
        FIRST: (f"1 of 1, 1 {BY_ERRORS}", "holds"),
        SMALL: (f"1 of 1, 0 {BY_ERRORS}", "holds"),
        FAILS: ("n = 4: 12", "holds"),
        RISES: ("n = 4: 96", "not measured"),
        FLAT: ("n = 4: 1.25 (1.12)", "holds"),
        DIVERGES: ("1 of 2 runs", "does not hold"),
    }
    assert claims[FAILS][0] == "n = 2: 32, n = 4: 64" and claims[RISES][0] == "n = 2: 48, n = 4: 96"
    change(figures, "phydi", 96, "reached", 2.5)
    change(figures, "post", 12, "not reached")
    change(figures, "post", 96, "reached", 1.0)
    claims = claims_of(results_page.text_claims(figures))
    assert claims[FIRST][1:] == (f"0 of 1, 0 {BY_ERRORS}", "does not hold")
    # PostNorm fails with few layers and gets there with 96.
    assert claims[FAILS][1:] == ("n = 4: 96", "does not hold")
    assert claims[FLAT][1:] == ("n = 4: 2.50 (1.12)", "does not hold")
    assert claims[DIVERGES][1:] == ("0 of 2 runs", "does not hold")


def test_postnorm_that_gets_there_nowhere_or_everywhere_does_not_fail_from_a_depth_on(figures):
    change(figures, "post", 12, "not reached")
    assert claims_of(results_page.text_claims(figures))[FAILS][1:] == ("n = 4: none", "does not hold")
    for depth in (12, 96):
        change(figures, "post", depth, "reached", 1.0)
    claims = claims_of(results_page.text_claims(figures))
    assert claims[FAILS][1:] == ("n = 4: 96", "does not hold") and claims[DIVERGES][1:] == (
        "0 of 0 runs",
        "not measured",
    )


def test_phydi_that_never_gets_there_is_not_as_fast_with_more_layers(figures):
    for depth in (12, 96):
        change(figures, "phydi", depth, "not reached")
    assert claims_of(results_page.text_claims(figures))[FLAT][1:] == (
        "n = 4: not reached (not reached)",
        "does not hold",
    )
    # Where none is reached, none is the least.
    for norm in ("post", "pre"):
        change(figures, norm, 96, "not reached")
    assert text.markdown(figures).splitlines()[-1] == "| 4 | 96 | > 3 | > 3 | > 3 |"


def test_claims_of_what_is_not_in_the_results_are_not_measured(figures):
    figures["rows"] = [row for row in figures["rows"] if row["depth"] == 12 and row["norm"] != "post"]
    claims = claims_of(results_page.text_claims(figures))
    assert {claim: rest[2] for claim, rest in claims.items()} == dict.fromkeys(claims, "not measured")


@pytest.mark.parametrize(
    ("by_n", "shown", "verdict"),
    [
        # Whether PostNorm gets there with 12, 48 and 96 layers.
        ({2: (1, 0, 0), 4: (1, 1, 0)}, "n = 2: 48, n = 4: 96", "holds"),
        ({2: (1, 0, 0), 4: (1, 1, 1)}, "n = 2: 48, n = 4: at none", "holds"),
        ({2: (0, 0, 0), 3: (1, 1, 1), 4: (1, 0, 0)}, "n = 2: 12, n = 3: at none, n = 4: 48", "holds"),
        ({2: (1, 0, 0), 4: (1, 0, 0)}, "n = 2: 48, n = 4: 48", "does not hold"),
        ({2: (1, 1, 1), 4: (1, 0, 0)}, "n = 2: at none, n = 4: 48", "does not hold"),
        ({2: (0, 0, 0), 4: (0, 0, 0)}, "n = 2: 12, n = 4: 12", "not measured"),
        ({2: (1, 1, 1), 4: (1, 1, 1)}, "n = 2: at none, n = 4: at none", "not measured"),
        ({3: (1, 0, 0), 4: (1, 1, 0)}, "n = 3: 48, n = 4: 96", "not measured"),
    ],
)
def test_the_depth_at_which_postnorm_fails_is_compared_between_n(corpus, by_n, shown, verdict):
    found = [
        outcome(depth, n, "post", seed, *(("reached", 1.0) if there else ("not reached", None)))
        for n, reached in by_n.items()
        for depth, there in zip((12, 48, 96), reached, strict=True)
        for seed in (0, 1)
    ]
    results = text.summary("cpu", corpus, found, "python text.py")
    assert claims_of(results_page.text_claims(results))[RISES][1:] == (shown, verdict)


@pytest.fixture
def gradients(corpus) -> dict[str, Any]:
    measured = gradient_norms.measure(settings_of(corpus), corpus, 1)
    return {"depth": 3, "n": 4, "seeds": 1, "init": "fan", "norms": measured}


@pytest.fixture
def folder(figures, image_figures, gradients, tmp_path) -> Path:
    """All results, but those of text.py --init reference."""
    for name, results in (
        ("convergence_text", figures),
        ("convergence_images", image_figures),
        ("gradient_norms", gradients),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    return tmp_path


def test_claims_have_a_column_for_each_measurement(folder, figures):
    change(figures, "phydi", 96, "not reached")
    (folder / "convergence_text_reference.json").write_text(json.dumps(figures))
    lines = results_page.parts(folder)["text-claims"].splitlines()
    assert lines[0] == "| claim | paper | this package's weights | verdict | published weights | verdict |"
    assert lines[2] == (
        f"| {FIRST} | all (Fig. 4) | 1 of 1, 1 {BY_ERRORS} | holds | 0 of 1, 0 {BY_ERRORS} | does not hold |"
    )
    assert len(lines) == 2 + len(results_page.text_claims(figures))


def test_page_has_its_parts_put_in(folder, monkeypatch, capsys):
    page = folder / "README.md"
    page.write_text(results_page.PAGE.read_text())
    monkeypatch.setattr(sys, "argv", ["results_page.py", "--write", "--folder", str(folder), "--page", str(page)])
    results_page.main()
    written = page.read_text()
    for name in results_page.PARTS:
        shown = re.search(rf"<!-- {results_page.COMMAND} {name} -->\n(.*?)<!-- end -->", written, re.DOTALL)
        assert shown is not None, name
        if name not in ("figure-4-reference", "text-claims"):
            monkeypatch.setattr(sys, "argv", ["results_page.py", name, "--folder", str(folder)])
            results_page.main()
            assert shown[1] == capsys.readouterr().out and shown[1].startswith("|" if "-4" not in name else "Epochs")
    monkeypatch.setattr(sys, "argv", ["results_page.py", "figure-4-reference", "--folder", str(folder)])
    with pytest.raises(SystemExit):
        results_page.main()
    assert "has no convergence_text_reference.json with the part figure-4-reference" in capsys.readouterr().err


def test_committed_page_is_that_of_the_committed_results():
    page = results_page.PAGE.read_text(encoding="utf-8")
    made = results_page.parts(text.RESULTS)
    assert made.keys() == results_page.PARTS.keys()
    for name, part in made.items():
        assert f"<!-- {results_page.COMMAND} {name} -->\n{part}\n<!-- end -->" in page, name
    plotted = re.findall(r"!\[[^\]]*\]\((.*?)\)", page)
    assert {Path(file).stem for file in plotted} == plots.figures(text.RESULTS).keys()
    for file in plotted:
        assert (text.RESULTS / file).read_bytes().startswith(b"\x89PNG"), file


def test_plots_show_the_results(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plots.py", "--folder", str(folder)])
    plots.main()
    names = {"convergence_text", "convergence_images", "convergence_alphas", "gradient_norms"}
    assert {path.stem for path in folder.glob("*.png")} == names
    assert capsys.readouterr().out.count("Written: ") == 4
    made = plots.figures(folder)
    panel = made["convergence_text"].axes[0]
    marks = {
        (round(y, 2), line.get_marker(), line.get_color())
        for line in panel.lines
        for y in line.get_ydata()
        if line.get_marker() not in ("None", "_") and y > 3
    }
    # Of 96 layers: PostNorm diverged once and missed once, PreNorm missed once.
    blue, green = plots.NORM_STYLES["post"]["color"], plots.NORM_STYLES["pre"]["color"]
    assert marks == {(3.18, "x", blue), (3.18, "s", blue), (3.36, "^", green)}
    curves = [line.get_ydata() for line in panel.lines if line.get_linestyle() != "None" and len(line.get_ydata()) == 2]
    assert [[round(float(y), 3) for y in curve] for curve in curves if not math.isnan(curve[1])] == [[1.125, 1.25]]
    assert panel.get_title() == "n = 4"
    language_model, resnet = (axes for axes in made["convergence_alphas"].axes if axes.get_title())
    assert "96 layers" in language_model.get_title() and "PHResNet152" in resnet.get_title()
    assert [line.get_ydata()[[0, -1]].tolist() for line in resnet.lines] == [[0, 0.3], [0, 0.4]]
    assert [axes.get_title() for axes in made["convergence_images"].axes] == [
        f"PHResNet{depth}, n = 4" for depth in (18, 50, 152)
    ]
    gradients = made["gradient_norms"].axes[0]
    assert [len(line.get_ydata()) for line in gradients.lines] == [4, 4, 4] and gradients.get_yscale() == "log"


def test_a_run_that_has_ended_goes_on_in_the_mean_with_its_last_accuracy():
    curves = [
        {"epoch": [0.5, 1.0], "validation_accuracy": [0.4, 0.9]},
        {"epoch": [0.5, 1.0, 1.5], "validation_accuracy": [0.2, 0.5, 0.7]},
        {"epoch": [], "validation_accuracy": []},
    ]
    panel = plots.Figure().subplots()
    plots._accuracy_curve(panel, {"init": "phydi", "curves": curves})
    mean = next(line for line in panel.lines if line.get_linewidth() > 2)
    assert mean.get_xdata().tolist() == [0.5, 1.0, 1.5]
    assert mean.get_ydata().tolist() == pytest.approx([0.3, 0.7, 0.8])


def test_no_panel_cuts_the_curves_of_another_off(image_figures):
    """Those of a row share their axis, and the longest run is not in the first panel."""
    image_figures["tables"]["1"].append(image_row(152, 5, "standard", [20.0, 20.0]))
    for panel in plots.images_figure(image_figures).axes:
        left, right = panel.get_xlim()
        curves = [line for line in panel.lines if line.get_linestyle() != "None" and line.get_color() != plots.GREY]
        assert all(left <= line.get_xdata().min() and line.get_xdata().max() < right for line in curves), (
            panel.get_title()
        )


def test_plots_need_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plots.py", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit):
        plots.main()
    assert "has no results" in capsys.readouterr().err
