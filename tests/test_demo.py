import argparse
import json
import sys

import pytest
import torch
from torch import nn

from phydi_kernels import demo, models
from phydi_kernels.demo import discriminant, layer_times, report, training

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(given)


def point(epoch: float, accuracy: float) -> dict[str, float]:
    return {"epoch": epoch, "train_loss": 1.0, "test_accuracy": accuracy}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One demo of a few seconds: its status, output folder, JSON and what it printed."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(layer_times.time_layers, "__defaults__", (0.0,))
    folder = tmp_path_factory.mktemp("demo") / "not" / "there"
    printed = []
    monkeypatch.setattr("builtins.print", lambda *values, **options: printed.append(" ".join(map(str, values))))
    try:
        status = demo.run(arguments("--depth", "18", "--epochs", "2", "--seed", "3", "--output", str(folder)))
    finally:
        monkeypatch.undo()
    return status, folder, json.loads((folder / "demo.json").read_text()), "\n".join(printed)


def test_runs_cover_every_n_and_initialisation(finished):
    status, _, results, _ = finished
    assert status == 0
    assert [(run["n"], run["init"]) for run in results["runs"]] == [
        (n, init) for n in (2, 4) for init in ("standard", "wkp", "phydi")
    ]


def test_history_and_m1_agree(finished):
    for run in finished[2]["runs"]:
        history = run["history"]
        assert len(history) == 2 * 4
        epochs = [p["epoch"] for p in history]
        assert epochs == sorted(set(epochs)) and epochs[-1] == 2.0 and 1.0 in epochs
        assert all(0.0 <= p["test_accuracy"] <= 1.0 and p["train_loss"] > 0.0 for p in history)
        reached = [p["epoch"] for p in history if p["test_accuracy"] >= 0.8]
        assert run["m1_epochs"] == (reached[0] if reached else None)
        assert run["final_test_accuracy"] == history[-1]["test_accuracy"]
        assert run["images_per_second"] > 0


def test_training_learns(finished):
    accuracies = {(run["n"], run["init"]): run["final_test_accuracy"] for run in finished[2]["runs"]}
    # Chance is 0.1; a model that does not train stays below 0.3.
    assert min(accuracies.values()) > 0.6, accuracies


def test_parameters_are_those_of_the_models(finished):
    results = finished[2]
    dense = models.phresnet18(1, in_channels=1, width=demo.WIDTH)
    assert results["dense_parameters"] == sum(p.numel() for p in dense.parameters())
    for run in results["runs"]:
        model = models.phresnet18(run["n"], in_channels=1, init=run["init"], width=demo.WIDTH)
        assert run["parameters"] == sum(p.numel() for p in model.parameters())
        assert run["parameters_over_dense"] == pytest.approx(1 / run["n"], abs=0.05)


def test_layer_times_and_ratios(finished):
    rows = finished[2]["layer_times"]
    assert [row["batch"] for row in rows] == [1, 64, 2048]
    for row in rows:
        times = row["median_seconds"]
        assert list(row["over_linear"]) == ["ours", "inference", "dense_h"]
        for name, ratio in row["over_linear"].items():
            assert ratio == pytest.approx(times[name] / times["linear"])
        assert row["rank"] == 7
        assert max(row["max_relative_error"].values()) < 1e-4


def test_json_states_what_was_run(finished):
    results = finished[2]
    assert results["arguments"] == {"depth": 18, "epochs": 2, "seed": 3, "threads": 1}
    assert results["recipe"]["epochs"] == 2
    assert results["data"]["train_images"] == 1437 and results["data"]["test_images"] == 360
    assert results["environment"]["torch"] == torch.__version__
    assert results["environment"]["cpu"]["model"] and results["environment"]["cpu"]["threads"] == 1
    assert "path" not in results["environment"]["library"]


@pytest.mark.parametrize("name", ("convergence.png", "discriminant.png"))
def test_plots_are_written(finished, name):
    picture = (finished[1] / name).read_bytes()
    assert picture.startswith(PNG_SIGNATURE)
    width, height = (int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))
    assert width >= 1000 and height >= 500
    assert len(picture) > 20_000


def test_plot_has_a_curve_for_every_run(finished):
    results = finished[2]
    panels = report.convergence_figure(results).axes
    assert [panel.get_title()[:5] for panel in panels] == ["n = 2", "n = 4"]
    for n, panel in zip((2, 4), panels, strict=True):
        curves = {line.get_label(): line for line in panel.get_lines()}
        for run in (run for run in results["runs"] if run["n"] == n):
            curve = curves.pop(f"{report.STYLES[run['init']]['label']} (M1 = {report.format_m1(run['m1_epochs'])})")
            assert list(curve.get_xdata()) == [p["epoch"] for p in run["history"]]
            assert list(curve.get_ydata()) == [p["test_accuracy"] for p in run["history"]]
        (target,) = curves.values()
        assert list(target.get_ydata()) == [0.8, 0.8]
        assert len(panel.get_legend().get_texts()) == 3
    styles = [(s["color"], s["linestyle"], s["marker"]) for s in report.STYLES.values()]
    assert all(len(set(column)) == len(styles) for column in zip(*styles, strict=True))


def test_tables_show_the_figures_of_the_json(finished):
    results, printed = finished[2], finished[3]
    for run in results["runs"]:
        row = next(line for line in printed.splitlines() if f"{run['parameters']:,}" in line)
        assert report.format_m1(run["m1_epochs"]) in row and f"{run['final_test_accuracy']:.1%}" in row
    for row in results["layer_times"]:
        assert "  ".join(["for inference, R = 7", "H built at every call"]) in printed
        shown = next(line for line in printed.splitlines() if line.split()[:1] == [str(row["batch"])])
        assert shown.split()[3:] == [f"{ratio:.2f}" for ratio in row["over_linear"].values()]
    assert "convergence.png" in printed and "discriminant.png" in printed and "demo.json" in printed


@pytest.fixture(scope="module")
def experiment():
    """GDA's experiment as the demo above ran it."""
    return discriminant.run(3)


def test_experiment_in_the_json_is_that_of_the_seed(finished, experiment):
    expected = {key: value for key, value in experiment.summary.items() if key != "fit_seconds"}
    recorded = dict(finished[2]["discriminant"])
    assert recorded.pop("fit_seconds") > 0
    assert recorded == expected
    assert expected != discriminant.run(4).summary


def test_gda_separates_what_lda_cannot(experiment):
    error = experiment.summary["error"]
    # Half of all points are of the largest class; to name it always is wrong for the other half.
    assert 0.45 < error["lda"] <= 0.55
    assert error["gda"] < 0.02
    assert experiment.summary["train_points"] == 600
    assert experiment.summary["held_out_points"] == len(experiment.points) == 1200


def test_experiment_is_equations_3_to_23(experiment):
    """Eigenvalues, tau and extracted features, from the scatter matrices and a generalised eigenproblem."""
    summary = experiment.summary
    X, labels = discriminant.draw_points(torch.Generator().manual_seed(3))
    counts = labels.bincount().double()

    def rbf(points):
        return torch.exp(-summary["gamma"] * (points[:, None] - X).square().sum(2))

    K = rbf(X)
    D_w = counts[labels].diag() - (labels[:, None] == labels).double()
    Omega = nn.functional.one_hot(labels).double() / counts - 1 / len(X)
    S_w, S_b = K @ D_w @ K, K @ Omega @ counts.diag() @ Omega.T @ K
    assert summary["tau"] == pytest.approx(torch.linalg.eigvalsh(S_w)[-1].item() / 1e8, rel=1e-3)
    factor = torch.linalg.cholesky(S_w + summary["tau"] * torch.eye(len(X)))
    reduced = torch.linalg.solve_triangular(
        factor, torch.linalg.solve_triangular(factor, S_b, upper=False).T, upper=False
    )
    eigenvalues, vectors = torch.linalg.eigh(reduced)
    assert summary["eigenvalues"] == pytest.approx(eigenvalues[[-1, -2]].tolist(), rel=1e-6)
    A = torch.linalg.solve_triangular(factor.T, vectors[:, [-1, -2]], upper=True)
    expected = rbf(experiment.points) @ A
    signs = (expected * experiment.extracted).sum(0).sign()
    torch.testing.assert_close(experiment.extracted, expected * signs, rtol=1e-4, atol=1e-6)


def test_points_lie_around_their_class_radius():
    points, labels = discriminant.draw_points(torch.Generator().manual_seed(0), copies=20)
    assert labels.bincount().tolist() == [2000, 4000, 6000]
    for label, radius in enumerate((0, 1, 2)):
        distances = points[labels == label].norm(dim=1)
        mean_square = radius**2 + discriminant.DEVIATION**2
        assert distances.square().mean().item() == pytest.approx(mean_square, rel=0.05)
        assert points[labels == label].mean(0).norm() < 0.1 * max(radius, discriminant.DEVIATION)
        assert (distances - radius).abs().max() < 5 * discriminant.DEVIATION


def test_discriminant_plot_shows_every_point(experiment):
    figure = report.discriminant_figure(experiment)
    for panel, expected in zip(figure.axes, (experiment.points, experiment.extracted), strict=True):
        classes = {shown.get_label(): torch.as_tensor(shown.get_offsets().data) for shown in panel.collections}
        for label, style in enumerate(report.CLASS_STYLES):
            assert torch.equal(classes.pop(style["label"]), expected[experiment.labels == label])
        assert not classes and panel.get_xlabel() and panel.get_ylabel()
    (legend,) = figure.legends
    assert [entry.get_text() for entry in legend.get_texts()] == [style["label"] for style in report.CLASS_STYLES]
    for name, panel in zip(("lda", "gda"), figure.axes, strict=True):
        assert f"{experiment.summary['error'][name]:.1%}" in panel.get_title()
    for number, eigenvalue in enumerate(experiment.summary["eigenvalues"]):
        label = (figure.axes[1].get_xlabel(), figure.axes[1].get_ylabel())[number]
        assert f"{eigenvalue:.3g}" in label and f"_{number + 1}$" in label
    assert all(len({style[key] for style in report.CLASS_STYLES}) == 3 for key in ("color", "marker"))


def test_discriminant_table_shows_the_figures(finished):
    summary, printed = finished[2]["discriminant"], finished[3]
    for line, name in (("(Fig. 1), LDA", "lda"), ("(Fig. 2)", "gda")):
        (row,) = (row for row in printed.splitlines() if line in row)
        assert row.endswith(f"{summary['error'][name]:.1%}")
    for value in (*(f"{e:.4g}" for e in summary["eigenvalues"]), f"tau = {summary['tau']:.2g} (Eq. 23)"):
        assert value in printed


def test_threads_are_restored():
    before = torch.get_num_threads()
    with demo._threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], None),
        ([point(0.5, 0.79), point(1.0, 0.799)], None),
        ([point(0.5, 0.3), point(1.0, 0.8), point(1.5, 0.9)], 1.0),
        # The first time counts, also where the accuracy falls again.
        ([point(0.25, 0.81), point(0.5, 0.7), point(0.75, 0.9)], 0.25),
    ],
)
def test_epochs_to_accuracy(history, expected):
    assert training.epochs_to_accuracy(history) == expected


def test_epochs_to_another_accuracy():
    history = [point(1.0, 0.85), point(2.0, 0.95)]
    assert training.epochs_to_accuracy(history, accuracy=0.9) == 2.0


def test_split_is_stratified_and_fixed_by_the_seed():
    first, again, other = training.load_digits(0), training.load_digits(0), training.load_digits(1)
    assert torch.equal(first.test_images, again.test_images)
    assert not torch.equal(first.test_images, other.test_images)
    assert first.train_images.shape == (1437, 1, 8, 8) and first.test_images.shape == (360, 1, 8, 8)
    assert first.test_labels.bincount().min() >= 34
    assert first.train_images.mean().abs() < 1e-5 and (first.train_images.std() - 1).abs() < 1e-3
    test_rows = {tuple(image.flatten().tolist()) for image in first.test_images}
    assert not any(tuple(image.flatten().tolist()) in test_rows for image in first.train_images)


def test_training_repeats_with_the_seed():
    data = training.load_digits(0)
    recipe = training.Recipe(epochs=1)

    def history(drawn: int) -> list[dict[str, float]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
        torch.rand(drawn)
        return training.train(model, data, recipe, seed=0, description="")["history"]

    assert history(drawn=0) == history(drawn=1)


def test_accuracy_uses_statistics_of_the_training_images():
    """Fresh running averages (mean 0, variance 1) are not those of the data, and would be used if not replaced."""
    data = training.load_digits(0)
    norm = nn.BatchNorm2d(1)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(64, 10))
    shifted = training.Digits(data.train_images + 5, data.train_labels, data.test_images, data.test_labels)
    training.evaluate(model, shifted)
    assert norm.running_mean.item() == pytest.approx(shifted.train_images[: training.BATCH_NORM_IMAGES].mean().item())
    assert model.training and norm.momentum == 0.1


def test_finished_runs_survive_an_interruption(tmp_path, monkeypatch):
    train = training.train

    def interrupted(model, *args):
        if interrupted.calls == 2:
            raise KeyboardInterrupt
        interrupted.calls += 1
        return train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), *args)

    interrupted.calls = 0
    monkeypatch.setattr(training, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run(arguments("--depth", "18", "--epochs", "1", "--output", str(tmp_path)))
    results = json.loads((tmp_path / "demo.json").read_text())
    assert [run["init"] for run in results["runs"]] == ["standard", "wkp"]


def test_wrong_layer_is_not_timed(monkeypatch):
    forward = layer_times.PHMLinear.forward
    monkeypatch.setattr(layer_times.PHMLinear, "forward", lambda layer, x: forward(layer, x) * 1.001)
    with pytest.raises(RuntimeError, match="ours layer at batch 1: relative error"):
        layer_times.time_layers(seconds_per_shape=0.0)


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        (["sklearn"], "scikit-learn"),
        (["matplotlib"], "matplotlib"),
        (["sklearn", "matplotlib"], "scikit-learn and matplotlib"),
    ],
)
def test_missing_extra(modules, named, monkeypatch, capsys, tmp_path):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    assert demo.run(arguments("--output", str(tmp_path / "results"))) == 1
    assert capsys.readouterr().err == f"phydi-kernels demo needs {named}: pip install {named.replace(' and', '')}\n"
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("given", [("--epochs", "0"), ("--threads", "-1"), ("--epochs", "2.5"), ("--depth", "20")])
def test_bad_arguments(given, capsys):
    with pytest.raises(SystemExit):
        arguments(*given)
    message = capsys.readouterr().err
    assert given[0] in message and f"{given[1]}" in message


def test_log_files_are_not_flooded(capsys):
    """stderr is no terminal here: a bar shows its start and its end."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    training.train(model, training.load_digits(0), training.Recipe(epochs=60), seed=0, description="a run")
    shown = capsys.readouterr().err
    assert 1 <= shown.count("a run") <= 3
    last = shown.split("\r")[-1]
    assert "loss=" in last and "accuracy=" in last and "img/s" in last
