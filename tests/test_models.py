"""PHResNet: parameter counts, blocks, the four initialisations, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from phydi_kernels import algebra
from phydi_kernels.models import PHResNet, phresnet18, phresnet34, phresnet50, phresnet101, phresnet152
from phydi_kernels.models.phresnet import ResidualBlock, stage_widths
from phydi_kernels.nn import PHConv2d

MAKERS = {18: phresnet18, 34: phresnet34, 50: phresnet50, 101: phresnet101, 152: phresnet152}
INITS = ("standard", "wkp", "phydi", "fixup")


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# The published counts hold one alpha a block (8, 16, 50) and, but for n = 1, convolution biases that are never used.
@pytest.mark.parametrize(
    ("depth", "n", "published", "unused_biases"),
    [
        (18, 1, 11_173_970, 0),
        (50, 1, 23_520_858, 0),
        (152, 1, 58_156_668, 0),
        (18, 2, 5_599_602, 4_800),
        (50, 2, 11_824_514, 26_560),
        (152, 2, 29_241_556, 75_712),
        (18, 3, 3_640_602, 4_680),
        (50, 3, 7_587_857, 25_692),
        (152, 3, 17_847_285, 71_772),
        (18, 4, 2_810_770, 4_800),
        (50, 4, 5_965_530, 26_560),
        (152, 4, 14_753_916, 75_712),
    ],
)
def test_parameter_counts(depth, n, published, unused_biases):
    blocks = {18: 8, 50: 16, 152: 50}[depth]
    assert count(MAKERS[depth](n, init="phydi", device="meta")) == published - unused_biases
    assert count(MAKERS[depth](n, device="meta")) == published - unused_biases - blocks


def test_weighted_kronecker_products_add_n_parameters_a_convolution():
    assert count(phresnet18(4, init="wkp", device="meta")) == 2_805_962 + 20 * 4


@pytest.mark.parametrize(("algebra_rank", "R"), [(4, 4), ("generic", 7)])
def test_terms_replace_the_algebra_of_every_convolution(algebra_rank, R):
    model = phresnet18(4, algebra_rank=algebra_rank, device="meta")
    convs = [m for m in model.modules() if isinstance(m, PHConv2d)]
    assert [conv.algebra_rank for conv in convs] == [R] * 20
    assert count(model) == count(phresnet18(4, device="meta")) + 20 * (3 * R * 4 - 4**3)


def test_real_counts_of_the_other_depths():
    # torchvision's counts with a 3x3 stem (1,728 weights for 9,408) and 10 classes for 1,000.
    assert count(phresnet34(1, device="meta")) == 21_797_672 - (9_408 - 1_728) - 990 * 513
    assert count(phresnet101(1, device="meta")) == 44_549_160 - (9_408 - 1_728) - 990 * 2_049


@pytest.mark.parametrize(
    ("n", "width", "expected"),
    [
        (1, 64, (64, 128, 256, 512)),
        (2, 64, (64, 128, 256, 512)),
        (4, 64, (64, 128, 256, 512)),
        (3, 64, (60, 120, 240, 516)),
        (3, 63, (63, 126, 252, 504)),
        (5, 64, (60, 120, 240, 515)),
        (3, 4, (3, 9, 15, 33)),
        (7, 2, (7, 7, 7, 14)),
    ],
)
def test_stage_widths(n, width, expected):
    assert stage_widths(n, width) == expected


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(("depth", "algebra_rank"), [*((depth, None) for depth in MAKERS), (18, 3), (50, 3)])
def test_forward_and_backward_are_finite(depth, algebra_rank, init):
    torch.manual_seed(0)
    model = MAKERS[depth](2, init=init, width=4, algebra_rank=algebra_rank)
    logits = model(torch.randn(2, 3, 8, 8))
    assert logits.shape == (2, 10)
    nn.functional.cross_entropy(logits, torch.tensor([1, 2])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("n", "in_channels", "zeros"), [(1, None, 0), (2, None, 1), (3, None, 0), (4, None, 1), (4, 1, 3)]
)
def test_zero_channels_are_put_in_front(n, in_channels, zeros):
    model = phresnet18(n, num_classes=7, in_channels=in_channels, width=4)
    seen = []
    model.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(2, in_channels or 3, 8, 8)
    assert model(x).shape == (2, 7)
    assert torch.equal(seen[0], torch.cat([torch.zeros(2, zeros, 8, 8), x], 1))


def test_real_network_holds_no_hypercomplex_layer():
    model = phresnet50(1, width=4)
    assert not any(isinstance(m, PHConv2d) for m in model.modules())
    assert all(isinstance(m, PHConv2d) for name, m in phresnet50(2, width=4).named_modules() if "conv" in name[-5:])


@pytest.mark.parametrize("size", [8, 11])
def test_strides(size):
    model = phresnet18(2, width=4)
    x = model.stem(torch.randn(2, 4, size, size))
    sizes = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
        sizes.append(x.shape[1:])
    expected = [size, -(-size // 2), -(-size // 4), -(-size // 8)]
    assert sizes == [(4 * 2**i, s, s) for i, s in enumerate(expected)]


def test_logits_are_the_head_of_the_spatial_average():
    torch.manual_seed(0)
    model = phresnet18(3, width=6).eval()
    x = torch.randn(2, 3, 16, 16)
    features = torch.relu(model.stem.bn1(model.stem.conv1(x)))
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        features = layer(features)
    expected = nn.functional.linear(features.flatten(2).sum(2) / 4, model.linear.weight, model.linear.bias)
    torch.testing.assert_close(model(x), expected)


def manual_branch(branch: nn.Sequential, x: torch.Tensor, convs: int) -> torch.Tensor:
    for i in range(1, convs + 1):
        x = branch.get_submodule(f"bn{i}")(branch.get_submodule(f"conv{i}")(x))
        if i < convs:
            x = torch.relu(x)
    return x


@pytest.mark.parametrize(("make", "convs"), [(phresnet18, 2), (phresnet50, 3)])
def test_blocks_follow_their_formulas(make, convs):
    torch.manual_seed(0)
    standard, phydi = make(2, width=4).eval(), make(2, init="phydi", width=4).eval()
    for index, model in ((0, standard), (1, standard), (0, phydi), (1, phydi)):
        block = model.layer2[index]
        x = torch.randn(3, block.branch.conv1.in_channels, 6, 6)
        branch = manual_branch(block.branch, x, convs)
        shortcut = block.shortcut.bn1(block.shortcut.conv1(x)) if index == 0 else x
        if model is phydi:
            nn.init.constant_(block.alpha, 0.7)
            expected = shortcut + 0.7 * torch.relu(branch)
            assert (expected < 0).any()
        else:
            expected = torch.relu(shortcut + branch)
        torch.testing.assert_close(block(x), expected)


def test_hooks_on_the_stem_see_its_values():
    model, seen = phresnet18(4, width=8).eval(), []
    handle = model.stem.register_forward_hook(lambda _, __, y: seen.append(y))
    model(torch.randn(1, 3, 8, 8))
    handle.remove()
    assert seen[0].min() < 0
    model.stem.register_full_backward_hook(lambda *_: seen.append(None))
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    assert len(seen) == 2


@pytest.mark.parametrize("init", ["standard", "phydi"])
def test_hooks_on_a_branch_see_its_values(init):
    """A block keeps its branch's result as it is, and full backward hooks forbid changing it."""
    torch.manual_seed(0)
    block = phresnet18(2, init=init, width=4).eval().layer2[0]
    if init == "phydi":
        nn.init.constant_(block.alpha, 0.75)
    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    results: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    block.branch.register_forward_hook(lambda module, args, y: results.append(y))
    block.branch.register_full_backward_hook(lambda module, d_x, d_y: gradients.append(d_y[0]))
    y = block(x)
    expected = manual_branch(block.branch, x, 2).detach()
    assert (expected < 0).any()
    torch.testing.assert_close(results[0].detach(), expected)
    d_y = torch.randn_like(y)
    y.backward(d_y)
    factor = block.shortcut(x) + expected > 0 if init == "standard" else 0.75 * (expected > 0)
    assert torch.equal(gradients[0], d_y * factor)


@pytest.mark.parametrize("make", [phresnet18, phresnet50])
def test_phydi_blocks_are_their_shortcuts_at_the_start(make):
    model = make(4, init="phydi", width=8)
    blocks = [m for m in model.modules() if isinstance(m, ResidualBlock)]
    for block in blocks:
        assert block.alpha.tolist() == [0.0]
        x = torch.randn(2, block.branch.conv1.in_channels, 4, 4)
        assert torch.equal(block(x), block.shortcut(x))
    assert sum(isinstance(block.shortcut, nn.Identity) for block in blocks) == {8: 5, 16: 12}[len(blocks)]


@pytest.mark.parametrize("init", INITS)
def test_models_of_one_algebra_compute_the_same(init):
    """A model with A in each convolution, and one with U, V and W of the same A."""
    torch.manual_seed(0)
    factored = phresnet18(4, init=init, width=4, algebra_rank=5, dtype=torch.float64).eval()
    with torch.no_grad():
        for p in factored.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    dense = phresnet18(4, init=init, width=4, dtype=torch.float64).eval()
    state = {k: v for k, v in factored.state_dict().items() if k.rpartition(".")[2] not in ("U", "V", "W")}
    for name, conv in factored.named_modules():
        if isinstance(conv, PHConv2d):
            state[f"{name}.A"] = torch.einsum("ri,rk,rl->ikl", conv.U, conv.V, conv.W)
    dense.load_state_dict(state)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(factored(x), dense(x))


@pytest.mark.parametrize("algebra_rank", [None, 7])
def test_wkp_weighs_the_terms_of_every_convolution(algebra_rank):
    model = phresnet18(4, init="wkp", width=4, algebra_rank=algebra_rank)
    convs = [m for m in model.modules() if isinstance(m, PHConv2d)]
    assert len(convs) == 20
    assert all(conv.kron_weights.tolist() == [1.0] * 4 for conv in convs)


@pytest.mark.parametrize(("n", "algebra_rank"), [(1, None), (4, None), (4, 7)])
@pytest.mark.parametrize(("make", "power"), [(phresnet18, -0.5), (phresnet50, -0.25)])
def test_fixup(make, power, n, algebra_rank):
    torch.manual_seed(0)
    model = make(n, init="fixup", width=32, algebra_rank=algebra_rank)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert torch.equal(model(torch.randn(2, 3, 8, 8)), torch.zeros(2, 10))
    blocks = [m for m in model.modules() if isinstance(m, ResidualBlock)]

    def relative(convs):
        """Mean square of the weights over He's 2 / fan_in."""
        weights = [conv.weight if n == 1 else conv.dense_weight() for conv in convs]
        return sum(w.square().mean() * w[0].numel() / 2 for w in weights).item() / len(weights)

    first = [b.branch.conv1 for b in blocks]
    last = [b.branch.conv2 if make is phresnet18 else b.branch.conv3 for b in blocks]
    assert relative(first) == pytest.approx(len(blocks) ** (2 * power), rel=0.1)
    if make is phresnet50:
        assert relative([b.branch.conv2 for b in blocks]) == pytest.approx(len(blocks) ** (2 * power), rel=0.1)
    assert relative(last) == 0
    shortcuts = [b.shortcut.conv1 for b in blocks if not isinstance(b.shortcut, nn.Identity)]
    assert relative(shortcuts) == pytest.approx(1, rel=0.1)
    for b in blocks:
        assert b.branch.scale.weight.tolist() == [1.0]
        assert b.branch.bias1a.bias.tolist() == b.branch.bias2b.bias.tolist() == [0.0]


def test_fixup_learns():
    torch.manual_seed(0)
    model = phresnet18(2, init="fixup", width=4)
    x, target = torch.randn(8, 3, 8, 8), torch.arange(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_weight_init():
    torch.manual_seed(0)
    quaternion = phresnet18(4, width=16, weight_init=algebra.quaternions())
    convs = [m for m in quaternion.modules() if isinstance(m, PHConv2d)]
    assert all(torch.equal(conv.A, algebra.quaternions().float()) for conv in convs)
    factored = phresnet18(4, width=16, weight_init=algebra.quaternions(), algebra_rank=8)
    for conv in (m for m in factored.modules() if isinstance(m, PHConv2d)):
        torch.testing.assert_close(conv.structure(), algebra.quaternions().float())
    reference, fan = (phresnet18(4, width=16, weight_init=init).layer4[1].branch.conv2 for init in ("reference", "fan"))
    variances = [conv.dense_weight().var().item() for conv in (reference, fan)]
    assert variances[1] / variances[0] == pytest.approx(32 + 4, rel=0.5)


@pytest.mark.parametrize(("weight_init", "variance"), [("fan", 2), ("reference", 1 / 3)])
def test_weight_init_of_the_real_network(weight_init, variance):
    weight = phresnet18(1, weight_init=weight_init).layer1[0].branch.conv1.weight
    assert weight.var().item() == pytest.approx(variance / (64 * 9), rel=0.05)


@pytest.mark.parametrize("algebra_rank", [None, 7])
@pytest.mark.parametrize("init", INITS)
def test_state_dict_holds_plain_names_and_survives_copies(init, algebra_rank):
    torch.manual_seed(0)
    options = {"init": init, "width": 4, "algebra_rank": algebra_rank}
    model = phresnet18(4, **options).eval()
    plain = {"A"} if algebra_rank is None else {"U", "V", "W"}
    plain |= {"F", "kron_weights", "alpha", "weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert {key.rpartition(".")[2] for key in model.state_dict()} <= plain
    x = torch.randn(2, 3, 8, 8)
    y = model(x)
    fresh = phresnet18(4, **options).eval()
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(other(x), y)


def test_dtype():
    model = phresnet18(2, init="fixup", width=4, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("algebra_rank", [None, 7])
@pytest.mark.parametrize("init", INITS)
def test_traces_as_one_graph(init, algebra_rank):
    model = phresnet18(4, init=init, width=4, algebra_rank=algebra_rank).eval()
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: phresnet18(4, init="xavier"),
            ValueError,
            r"init='xavier' is not one of 'standard', 'wkp', 'phydi', 'fix",
        ),
        (lambda: phresnet18(4, weight_init="he"), ValueError, r"weight_init='he' is not one of \"fan\", \"reference\""),
        (lambda: phresnet18(1, init="wkp"), ValueError, r'init="wkp" .* needs n > 1, not n=1'),
        (
            lambda: phresnet18(1, weight_init=torch.ones(1, 1, 1)),
            ValueError,
            r"weight_init is a structure tensor; with n=1",
        ),
        (
            lambda: phresnet18(4, algebra_rank=17),
            ValueError,
            r'algebra_rank=17 must be None, "generic" or an integer from 1 to n\*n = 16',
        ),
        (lambda: phresnet18(4, algebra_rank="7"), ValueError, r"algebra_rank='7' must be None"),
        (lambda: phresnet18(4, algebra_rank=7.0), TypeError, r"algebra_rank=7.0 must be None, .*, not float"),
        (lambda: phresnet18(1, algebra_rank="generic"), ValueError, r"algebra_rank='generic' .* with n=1 there is no"),
        (
            lambda: phresnet18(4, weight_init=algebra.quaternions(), algebra_rank=7),
            algebra.DecompositionError,
            r"no algorithm of rank 7",
        ),
        (lambda: phresnet18(0), ValueError, r"n=0 must be an integer >= 1"),
        (lambda: phresnet18(2.0), TypeError, r"n=2.0 must be an integer >= 1, not float"),
        (lambda: phresnet18(2, num_classes=0), ValueError, r"num_classes=0 must be an integer >= 1"),
        (lambda: phresnet18(2, in_channels=0), ValueError, r"in_channels=0 must be an integer >= 1"),
        (lambda: phresnet18(2, width=0), ValueError, r"width=0 must be an integer >= 1"),
        (lambda: PHResNet((2, 2), False, 2), ValueError, r"blocks=\(2, 2\) has 2 entries; it must have 4"),
        (lambda: PHResNet((2, 0, 2, 2), False, 2), ValueError, r"blocks=0 must be an integer >= 1"),
    ],
)
def test_constructor_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_input_of_another_shape():
    model = phresnet18(4, width=4, device="meta")
    for shape in ((2, 4, 8, 8), (3, 8, 8)):
        with pytest.raises(ValueError, match=r"x has shape .*; it must be \(batch, 3, height, width\)"):
            model(torch.empty(shape))
