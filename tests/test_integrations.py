"""Adapter layers of peft and adapters on the kernels: their numbers, without their Kronecker matrices."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phydi_kernels import functional
from phydi_kernels.integrations import IntegrationReport, apply_phydi_kernels


class Layers(nn.Module):
    """One layer of each kind that LoKr adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(96, 64)
        self.conv = nn.Conv2d(16, 24, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.pointwise = nn.Conv2d(24, 24, 1)
        self.series = nn.Conv1d(24, 12, 3, padding="same")

    def forward(self, x: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        convolved = self.conv(images)
        return self.linear(x), convolved, self.pointwise(convolved), self.series(convolved.flatten(-2))


NAMES = ["linear", "conv", "pointwise", "series"]
# By r, against the larger block: a whole w2; one of two factors, multiplied or used one after the other.
LOKR = {
    "whole": {"r": 64},
    "factors": {"r": 2},
    "large factors": {"r": 5},
    "both factors": {"r": 2, "decompose_both": True},
    "core": {"r": 2, "use_effective_conv2d": True},
    "large core": {"r": 5, "use_effective_conv2d": True},
    "eight blocks": {"r": 3, "decompose_factor": 8},
    "rank dropout": {"r": 64, "rank_dropout": 0.5},
    "scaled dropouts": {"r": 2, "rank_dropout": 0.4, "rank_dropout_scale": True, "module_dropout": 0.3},
}


def lokr(model: nn.Module, names: list[str] = NAMES, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The model with a LoKr adapter: as peft computes it, and on the kernels."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoKrConfig(target_modules=names, init_weights=False, **options)
    theirs = peft.get_peft_model(model.double(), config)
    return theirs, apply_phydi_kernels(copy.deepcopy(theirs), verbose=False)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(2, 3, 96, **draw), torch.randn(2, 16, 7, 6, **draw)


def run(model: nn.Module, *args: Tensor, seed: int = 2) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The results, and the gradients of a sum of their squares."""
    model.zero_grad()
    args = tuple(a.clone().requires_grad_() for a in args)
    torch.manual_seed(seed)
    results = model(*args)
    results = list(results) if isinstance(results, tuple) else [results]
    sum(y.square().sum() for y in results).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [y.detach() for y in results], gradients | {f"input {i}": a.grad for i, a in enumerate(args)}


def assert_same(ours: nn.Module, theirs: nn.Module, *args: Tensor) -> None:
    (actual, gradients), (expected, of_theirs) = run(ours, *args), run(theirs, *args)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-13 * b.abs().max()
    assert gradients.keys() == of_theirs.keys()
    for name, b in of_theirs.items():
        assert (gradients[name] - b).abs().max() <= 1e-12 * b.abs().max(), name


@pytest.fixture
def no_kron(monkeypatch):
    """torch.kron, and what adapters has for it, fail."""

    def fail(*args: Any) -> Tensor:
        raise AssertionError("a Kronecker matrix is formed")

    def forbid() -> None:
        monkeypatch.setattr(torch, "kron", fail)
        modeling = pytest.importorskip("adapters.methods.modeling")
        monkeypatch.setattr(modeling, "kronecker_product", fail)

    return forbid


@pytest.mark.parametrize("training", (False, True), ids=("evaluation", "training"))
@pytest.mark.parametrize("options", LOKR.values(), ids=LOKR)
def test_lokr_gives_the_numbers_of_peft(options, training):
    """In training mode with the same random numbers drawn."""
    theirs, ours = lokr(Layers(), **options)
    for seed in range(3 if training else 1):
        torch.manual_seed(seed)
        assert_same(ours.train(training), theirs.train(training), *inputs())


@pytest.mark.parametrize("options", LOKR.values(), ids=LOKR)
def test_lokr_forms_no_kronecker_matrix(options, no_kron):
    # A convolution of one dimension with a whole w2 is peft's own.
    names = NAMES if options["r"] == 2 else NAMES[:3]
    _, ours = lokr(Layers(), names, **options)
    no_kron()
    run(ours.train(), *inputs())


@pytest.fixture
def filters(monkeypatch):
    """The shapes of F of all calls of the linear operator and of convolutions of two dimensions."""
    shapes = []

    def recorded(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, A: Tensor, F: Tensor, *args: Any) -> Tensor:
            shapes.append(tuple(F.shape))
            return original(x, A, F, *args)

        return call

    for name in ("phm_linear", "phc_conv2d"):
        monkeypatch.setattr(functional, name, recorded(getattr(functional, name)))
    return shapes


@pytest.mark.parametrize(
    ("options", "expected"),
    (
        (LOKR["whole"], [(1, 6, 4, 3, 2), (1, 8, 12), (1, 6, 6, 1, 1)]),
        (LOKR["factors"], [(1, 6, 2, 1, 1), (1, 8, 2), (1, 6, 6, 1, 1)]),
        (LOKR["large factors"], [(1, 6, 4, 3, 2), (1, 8, 12), (1, 6, 6, 1, 1)]),
        (LOKR["core"], [(1, 6, 2, 1, 1), (1, 8, 2), (1, 6, 6, 1, 1)]),
    ),
    ids=("whole", "factors", "large factors", "core"),
)
def test_lokr_multiplies_by_factors_that_are_small(options, expected, filters):
    """Of the convolution, the linear layer and the pointwise convolution, whose calls come in this order."""
    _, ours = lokr(Layers(), NAMES[:3], **options)
    ours(*inputs())
    assert filters == expected


def test_lokr_of_a_layer_in_bfloat16_stays_in_float32():
    """peft keeps adapters in float32 beside 16-bit layers, and casts the input."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoKrConfig(target_modules=["0"], init_weights=False, r=2)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(96, 64)).bfloat16(), config)
    ours = apply_phydi_kernels(copy.deepcopy(theirs), verbose=False)
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    actual, expected = ours(x), theirs(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    # Both round the same sum once, up to float32's own rounding.
    torch.testing.assert_close(actual, expected, atol=0, rtol=2**-7)


def test_lokr_of_single_images():
    theirs, ours = lokr(Layers(), r=2)
    x, images = inputs()
    assert_same(ours, theirs, x[0, 0], images[0])


def test_lokr_in_channels_last():
    theirs, ours = lokr(nn.Sequential(nn.Conv2d(16, 24, 3)), ["0"], r=2)
    images = inputs()[1].contiguous(memory_format=torch.channels_last)
    assert_same(ours, theirs, images)


def test_lokr_in_bfloat16_is_nearer_to_the_exact_result():
    """peft rounds every entry of the Kronecker matrix and of its scaled one."""
    exact, _ = lokr(nn.Sequential(nn.Linear(256, 256, bias=False)), ["0"], r=64)
    with torch.no_grad():
        exact.get_submodule("base_model.model.0.base_layer").weight.zero_()
        theirs = copy.deepcopy(exact).bfloat16()
        rounded = copy.deepcopy(theirs).double()
        ours = apply_phydi_kernels(copy.deepcopy(theirs), verbose=False)
        x = torch.randn(64, 256, dtype=torch.bfloat16)
        expected = rounded(x.double())
        errors = [(model(x).double() - expected).norm() / expected.norm() for model in (ours, theirs)]
    assert errors[0] < errors[1] < 0.02


def test_lokr_under_autocast():
    theirs, ours = lokr(Layers(), r=2)
    theirs, ours = theirs.float(), ours.float()
    args = [t.float() for t in inputs()]
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(ours(*args), theirs(*args), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, atol=0.05 * b.abs().max().item(), rtol=0)


def test_lokr_compiles():
    theirs, ours = lokr(nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32)), ["0", "2"], r=2)
    ours.eval().compile(backend="aot_eager", fullgraph=True)
    assert_same(ours, theirs.eval(), inputs()[0])


def test_lokr_with_several_adapters_switched_disabled_and_merged():
    peft = pytest.importorskip("peft")
    theirs, ours = lokr(Layers(), r=2)
    for model in (theirs, ours):
        torch.manual_seed(3)
        model.add_adapter("other", peft.LoKrConfig(target_modules=NAMES[:2], init_weights=False, r=3))
    assert_same(ours, theirs, *inputs())
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "other"])
    assert_same(ours, theirs, *inputs())
    base = [y.detach() for y in ours.get_base_model()(*inputs())]
    with torch.no_grad(), ours.disable_adapter(), theirs.disable_adapter():
        plain = theirs(*inputs())
        assert all(torch.equal(a, b) for a, b in zip(ours(*inputs()), plain, strict=True))
    assert not torch.equal(base[0], plain[0])
    merged = ours.merge_and_unload()(*inputs())
    for a, b in zip(merged, base, strict=True):
        assert (a - b).abs().max() <= 1e-13 * b.abs().max()


def test_lokr_is_saved_and_loaded_as_peft_does(tmp_path):
    peft = pytest.importorskip("peft")
    base = Layers().double()
    theirs, ours = lokr(copy.deepcopy(base), r=2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.save_pretrained(tmp_path)
    loaded = apply_phydi_kernels(peft.PeftModel.from_pretrained(base, tmp_path), verbose=False)
    # Without names of layers of a pretrained model peft saves adapters in float32 at least.
    expected = theirs(*inputs())
    assert all(torch.allclose(a, b) for a, b in zip(loaded(*inputs()), expected, strict=True))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    whole = torch.load(buffer, weights_only=False)
    assert_same(whole, theirs, *inputs())


def test_lokr_report(capsys):
    peft = pytest.importorskip("peft")
    lokr_layers = pytest.importorskip("peft.tuners.lokr.layer")

    class Own(lokr_layers.Linear):
        pass

    model = nn.Sequential(nn.Linear(16, 16), nn.Conv2d(16, 16, 3, groups=4), nn.Conv1d(16, 16, 3), nn.Linear(16, 8))
    model = peft.get_peft_model(model, peft.LoKrConfig(target_modules=["0", "1", "2", "3"], r=64))
    model.base_model.model[3].__class__ = Own
    assert apply_phydi_kernels(model) is model
    report = model.integration_report
    assert isinstance(report, IntegrationReport)
    assert [(layer.kind, bool(layer.left)) for layer in report.layers] == [
        ("peft LoKr Linear", False),
        ("peft LoKr Conv2d", True),
        ("peft LoKr Conv1d", True),
        ("peft LoKr Linear", True),
    ]
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    assert printed.splitlines()[:2] == ["layers  on the kernels  of", "     2               1  peft LoKr Linear"]
    assert "base_model.model.1 is left as it is: its convolution has 4 groups" in printed
    assert "base_model.model.2 is left as it is: 'default' has a whole w2" in printed
    assert "base_model.model.3 is left as it is: Own is a subclass" in printed
    assert type(model.base_model.model[3]) is Own
    apply_phydi_kernels(model, verbose=False)
    assert model.integration_report == report and not capsys.readouterr().out


def test_lokr_layers_that_are_left_compute_as_before():
    """A later adapter of a layer may fit where its first did not."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(2), nn.Conv1d(8, 8, 3))
    theirs, ours = lokr(model, ["0", "2"], r=64)
    assert all(layer.left for layer in ours.integration_report.layers)
    images = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    assert_same(ours, theirs, images)
    for adapted in (theirs, ours):
        torch.manual_seed(3)
        adapted.add_adapter("other", peft.LoKrConfig(target_modules=["2"], init_weights=False, r=1))
        adapted.set_adapter("other")
    apply_phydi_kernels(ours, verbose=False)
    assert [bool(layer.left) for layer in ours.integration_report.layers] == [True, False]
    assert_same(ours, theirs, images)
    for adapted in (theirs, ours):
        adapted.base_model.set_adapter(["default", "other"])
    assert_same(ours, theirs, images)


COMPACTER = {
    "compacter": {},
    "own rules": {"shared_phm_rule": False},
    "rules of two factors": {"factorized_phm_rule": True},
    "own rules of two factors": {"factorized_phm_rule": True, "shared_phm_rule": False, "phm_dim": 2},
    "shared weights": {"shared_W_phm": True},
    "whole weights": {"factorized_phm_W": False},
    "large factors": {"phm_rank": 6},
    "no bias": {"phm_bias": False},
}


def compacter(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A language model of two layers with Compacter: as adapters computes it, and on the kernels."""
    adapters = pytest.importorskip("adapters")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    model = transformers.BertModel(transformers.BertConfig(**size, vocab_size=20, max_position_embeddings=8))
    adapters.init(model)
    model.add_adapter("task", adapters.CompacterConfig(reduction_factor=4, **options))
    model.train_adapter("task")
    model.set_active_adapters("task")
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    theirs = model.double().eval()
    return theirs, apply_phydi_kernels(copy.deepcopy(theirs), verbose=False)


def run_on_words(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    words = torch.arange(14).view(2, 7)
    y = model(words, attention_mask=torch.ones_like(words)).last_hidden_state
    (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), gradients


@pytest.mark.parametrize("options", COMPACTER.values(), ids=COMPACTER)
def test_compacter_gives_the_numbers_of_adapters(options, no_kron):
    theirs, ours = compacter(**options)
    assert len(ours.integration_report.layers) == 8
    expected, of_theirs = run_on_words(theirs)
    no_kron()
    actual, gradients = run_on_words(ours)
    assert (actual - expected).abs().max() <= 1e-13 * expected.abs().max()
    assert gradients.keys() == of_theirs.keys() and len(gradients) > 8
    for name, b in of_theirs.items():
        assert (gradients[name] - b).abs().max() <= 1e-12 * b.abs().max(), name
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize(("rank", "whole"), ((1, [(4, 24, 6)] * 4), (2, [(4, 6, 24), (4, 24, 6)] * 4)), ids=str)
def test_compacter_multiplies_by_factors_that_are_small(rank, whole, filters):
    """96 to 24 features and back: with one column the factors are small on the way down, with two they are not."""
    _, ours = compacter(phm_rank=rank)
    run_on_words(ours)
    assert filters == whole


def test_compacter_with_a_forward_of_its_own_is_left():
    theirs, ours = compacter()
    first, *_ = (name for name, m in theirs.named_modules() if type(m).__name__ == "PHMLayer")
    for model in (theirs, ours):
        layer = model.get_submodule(first)
        layer.forward = functools.partial(type(layer).forward, layer)
    assert not any(layer.left for layer in apply_phydi_kernels(ours, verbose=False).integration_report.layers)
    model = apply_phydi_kernels(theirs, verbose=False)
    left = {layer.name: layer.left for layer in model.integration_report.layers if layer.left}
    assert left == {first: "its forward was replaced in the instance"}


def test_models_without_adapters_are_unchanged(capsys):
    model = nn.Sequential(nn.Linear(3, 3))
    assert apply_phydi_kernels(model) is model and model.integration_report.layers == ()
    assert "no LoKr layer of peft and no PHMLayer of adapters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "options", "message"),
    (
        ((nn.Linear,), {}, "model must be a torch.nn.Module, not type"),
        ((nn.Linear(1, 1),), {"verbose": 1}, "verbose=1 must be True or False"),
    ),
)
def test_wrong_arguments(args, options, message):
    with pytest.raises(TypeError, match=message):
        apply_phydi_kernels(*args, **options)
