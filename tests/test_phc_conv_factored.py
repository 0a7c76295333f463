"""phc_conv1d, 2d and 3d_factored: every compiled plan, blocks of images, layouts, threads, the plans' choices."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import DTYPES, assert_close, assert_exact, dtype_id, evaluate, normal, ternary
from op_cases import CASES, conv
from op_checks import STRUCTURES, FactoredChecks, absolute, decomposed, double
from op_checks import draw as draw_problem

from phydi_kernels import functional, plans, reference
from phydi_kernels.kernels import phc_conv
from phydi_kernels.kernels.phc_conv_factored import side_by_side
from phydi_kernels.plans import Plan

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
PLANS = (Plan.RANK, Plan.DIRECT, Plan.MIX, Plan.PANEL, Plan.POINTWISE)

# dimensions: (spatial size, kernel, (R, n, P, Q, p, q), stride, padding, dilation)
PROBLEMS = {
    "1d": ((19,), (3,), (3, 2, 3, 2, 5, 3), (2,), (1,), (2,)),
    "1d_pointwise": ((11,), (1,), (3, 2, 3, 2, 5, 3), (2,), (0,), (1,)),
    "1d_long": ((2999,), (5,), (5, 2, 2, 3, 18, 20), (1,), (2,), (1,)),
    "2d": ((7, 19), (3, 2), (4, 3, 2, 5, 18, 17), (1, 2), (1, 0), (2, 1)),
    "2d_pointwise": ((9, 8), (1, 1), (9, 4, 9, 1, 3, 33), (1, 1), (0, 0), (1, 1)),
    "2d_pointwise_strided": ((7, 8), (1, 1), (5, 3, 2, 3, 18, 17), (3, 2), (0, 0), (1, 2)),
    "2d_pointwise_padded": ((5, 6), (1, 1), (5, 3, 2, 3, 5, 7), (1, 1), (1, 2), (1, 1)),
    "2d_pixel": ((1, 1), (1, 1), (3, 2, 2, 3, 5, 7), (1, 1), (0, 0), (1, 1)),
    "2d_pixel_of_six": ((3, 2), (1, 1), (3, 2, 2, 3, 5, 7), (3, 2), (0, 0), (1, 1)),
    "2d_bands": ((40, 37), (3, 3), (5, 3, 2, 3, 33, 20), (1, 1), (1, 1), (1, 1)),
    "2d_border": ((3, 5), (2, 3), (3, 2, 2, 2, 17, 16), (3, 4), (7, 9), (2, 3)),
    "2d_wide_blocks": ((5, 30), (3, 1), (3, 2, 2, 2, 3, 128), (2, 1), (1, 0), (1, 1)),
    "3d_pointwise": ((3, 5, 2), (1, 1, 1), (3, 2, 2, 2, 4, 3), (1, 2, 1), (0, 0, 0), (1, 1, 1)),
    "3d": ((4, 5, 3), (2, 3, 1), (3, 2, 2, 2, 4, 3), (1, 2, 1), (1, 0, 0), (1, 1, 1)),
}


class TestPHCConv1dFactored(FactoredChecks):
    case = CASES["phc_conv1d_factored"]
    dense_case = CASES["phc_conv1d"]

    def decomposable(self, n, P, Q):
        return conv((2,), (23,), (3,), n, P, Q, 7, 5, padding=1)


class TestPHCConv2dFactored(FactoredChecks):
    case = CASES["phc_conv2d_factored"]
    dense_case = CASES["phc_conv2d"]

    def decomposable(self, n, P, Q):
        return conv((2,), (6, 7), (3, 3), n, P, Q, 7, 5, stride=2, padding=1)


class TestPHCConv3dFactored(FactoredChecks):
    case = CASES["phc_conv3d_factored"]
    dense_case = CASES["phc_conv3d"]

    def decomposable(self, n, P, Q):
        return conv((2,), (4, 3, 5), (2, 1, 3), n, P, Q, 5, 3)


def channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=FORMATS[t.dim()]) if t.dim() in FORMATS else t.contiguous()


def sliced(t: torch.Tensor) -> torch.Tensor:
    """Neither contiguous nor channels_last, between NaN."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=t.dtype)
    wide[..., 2:-1] = t
    return wide[..., 2:-1]


LAYOUTS = {f.__name__: f for f in (torch.Tensor.contiguous, channels_last, sliced)}


def draw(problem, images, dtype, values, with_U, alphas):
    """The tensors and options of a call, and the gradient of its result."""
    spatial, kernel, (R, n, P, Q, p, q), *geometry = problem
    size = functional.output_size(spatial, kernel, *map(list, geometry))
    shapes = {
        "x": (images, Q * q, *spatial),
        "V": (R, P),
        "W": (R, Q),
        "F": (n if with_U else R, p, q, *kernel),
        "bias": (P * p,),
        "residual": (images, P * p, *size),
        "alpha": (alphas or P * p,),
    }
    if with_U:
        shapes["U"] = (R, n)
    tensors = {name: values(shape, seed).to(dtype) for seed, (name, shape) in enumerate(shapes.items())}
    options = dict(zip(("stride", "padding", "dilation"), geometry, strict=True))
    options["activation"] = "none" if alphas == 1 else "relu"
    if alphas == 1:
        tensors["alpha"].fill_(-2)  # one drawn at random may be 0 and hide everything
    return tensors, options, values((images, P * p, *size), 99).to(dtype)


def call(problem, function):
    d = len(problem[0])

    def op(x, V, W, F, bias, residual, alpha, U=None, **options):
        return function(d)(x, U, V, W, F, bias, residual=residual, alpha=alpha, **options)

    return op


def compiled(d):
    return getattr(functional, f"phc_conv{d}d_factored")


def specified(d):
    def op(x, U, V, W, F, bias, stride, padding, dilation, **epilogue):
        return reference.phc_conv_factored(x, U, V, W, F, bias, list(stride), list(padding), list(dilation), **epilogue)

    return op


def force(monkeypatch, plan):
    """The plan in every operator that knows it for the sizes at hand."""

    def known(*sizes):
        *_, row, pointwise, _ = sizes
        needed = {Plan.DIRECT: row, Plan.POINTWISE: pointwise}
        return needed.get(plan, True) is not None

    monkeypatch.setattr(plans, "phc_conv_factored", lambda *sizes: plan if known(*sizes) else Plan.RANK)
    of_all = plan in (Plan.RANK, Plan.POINTWISE)  # RANK of a pointwise convolution as well, which no plan chooses
    monkeypatch.setattr(
        plans, "phc_conv_factored_grad", lambda *sizes: plan if of_all and known(*sizes) else Plan.PANEL
    )


def serves(plan, problem):
    spatial, kernel, _, _, padding, _ = problem
    if plan is Plan.POINTWISE:
        return set(kernel) == {1} and set(padding) == {0}
    return plan is not Plan.DIRECT or len(spatial) < 3


PLANS_OF_PROBLEMS = [
    pytest.param(problem, plan, id=f"{name}-{plan.name}")
    for name, problem in PROBLEMS.items()
    for plan in PLANS
    if serves(plan, problem)
]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("problem", "plan"), PLANS_OF_PROBLEMS)
def test_every_plan(problem, dtype, plan, monkeypatch):
    """Every plan serves every shape, also where the cost model would not choose it.

    But direct has no third dimension, and pointwise one position.
    """
    force(monkeypatch, plan)
    differentiable = ["x", "V", "W", "F", "bias", "residual"]
    for layout, with_U, alphas in itertools.product(LAYOUTS.values(), (False, True), (1, None)):
        tensors, options, grad = draw(problem, 2, dtype, ternary, with_U, alphas)
        wanted = differentiable + ["U"] * with_U
        tensors = {name: layout(t) if t.dim() > 2 else t for name, t in tensors.items()}
        if with_U and layout is channels_last:
            tensors["F"] = side_by_side(tensors["F"])
        wide = {name: t.double() for name, t in tensors.items()}
        # The input's gradient alone is an operator of its own.
        for needed in (wanted, ["x"]):
            actual = evaluate(call(problem, compiled), tensors, options, needed, layout(grad))
            expected = evaluate(call(problem, specified), wide, options, needed, grad.double())
            assert_exact(actual, expected, dtype)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("images", (0, 1, 5))
@pytest.mark.parametrize("block_bytes", (1, 100_000))
@pytest.mark.parametrize(("name", "plan"), (("2d", Plan.RANK), ("2d_pointwise", Plan.POINTWISE)))
def test_blocks_of_images(name, plan, images, block_bytes, layout, monkeypatch):
    """Images one at a time, in unequal blocks and all at once give the same, gradients included; so do no images."""
    force(monkeypatch, plan)
    problem = PROBLEMS[name]
    tensors, options, grad = draw(problem, images, torch.float32, ternary, True, 1)
    tensors["x"] = layout(tensors["x"])
    wanted = ["x", "U", "V", "W", "F"]
    expected = evaluate(call(problem, specified), {k: t.double() for k, t in tensors.items()}, options, wanted, grad)
    monkeypatch.setattr(phc_conv, "_BLOCK_BYTES", block_bytes)
    assert_exact(evaluate(call(problem, compiled), tensors, options, wanted, grad), expected, torch.float32)


@pytest.mark.parametrize("count", (1, 2, 7, 50))
@pytest.mark.parametrize("image_bytes", (1, 1 << 20, 3 << 20, 40 << 20))
def test_images_of_a_block_fit_the_budget(count, image_bytes):
    blocks = list(phc_conv.images(count, image_bytes))
    assert [i for block in blocks for i in range(count)[block]] == list(range(count))
    assert all((block.stop - block.start) * image_bytes <= max(8 << 20, image_bytes) for block in blocks)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("plan", (Plan.RANK, Plan.DIRECT), ids=lambda plan: plan.name)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_plans_of_few_products_are_accurate(dtype, layout, plan, monkeypatch):
    """Against float64, as close as sums of this many products can be."""
    monkeypatch.setattr(plans, "phc_conv_factored", lambda *sizes: plan)
    monkeypatch.setattr(plans, "phc_conv_factored_grad", lambda *sizes: Plan.RANK)
    problem = ((11, 12), (3, 3), (7, 4, 4, 4, 32, 32), (1, 1), (1, 1), (1, 1))
    tensors, options, grad = draw(problem, 3, dtype, normal, True, 1)
    wanted = ["x", "U", "V", "W", "F"]
    wide = {name: t.double() for name, t in tensors.items()}
    expected = evaluate(call(problem, specified), wide, options, wanted, grad.double())
    size = evaluate(
        call(problem, specified), {name: t.abs() for name, t in wide.items()}, options, wanted, grad.double().abs()
    )
    tensors["x"] = layout(tensors["x"])
    actual = evaluate(call(problem, compiled), tensors, options, wanted, layout(grad))
    # Products summed: taps and features for the output, pixels of all images for the weights, R terms on top.
    terms = {"output": 32 * 9, "x": 32 * 9}
    for name, value in actual.items():
        products = 7 * 4 * terms.get(name, 3 * 11 * 12)
        assert_close(value, expected[name], size[name], products, name)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_threads_change_nothing(layout, threads, monkeypatch):
    """Sums over images are split by shape, not by threads."""
    force(monkeypatch, Plan.RANK)
    problem = PROBLEMS["2d"]
    tensors, _, grad = draw(problem, 4, torch.float64, normal, True, 1)
    image = phc_conv.as_image(layout(tensors["x"]).contiguous(), True)
    parts = [normal((4, image.shape[2], 17), seed) for seed in range(4)]
    results = []
    for count in (1, 2, 3):
        threads(count)
        dots = torch.ops.phydi_cpu.block_dots(image, parts, 5, True)
        results.append((dots, torch.ops.phydi_cpu.pre_add(image, tensors["W"], True)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("images", (0, 1, 3))
def test_direct_plan_on_threads(images, layout, threads, monkeypatch):
    """Threads share the bands of all images; none changes a result."""
    force(monkeypatch, Plan.DIRECT)
    problem = PROBLEMS["2d_bands"]
    tensors, options, _ = draw(problem, images, torch.float32, normal, True, 1)
    tensors["x"] = layout(tensors["x"])
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(call(problem, compiled)(**tensors, **options))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("change", "match"),
    (
        ({"out": (6, 5)}, "larger than the window"),
        ({"stride": (1, 3), "out": (5, 2)}, "too wide"),
        ({"kernel": (0, 3)}, "positive"),
        ({"in": (5, 6)}, "other sizes"),
    ),
)
def test_direct_kernel_refuses_what_does_not_fit(change, match):
    """A direct call of the kernel must not read or write out of bounds."""
    window = {"in": (5, 5), "out": (5, 5), "kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    sizes = [size for pair in (window | change).values() for size in pair]
    out = (window | change)["out"]
    y, x = torch.zeros(1, 4, out[0] * out[1]), torch.zeros(1, 4, 25)
    W, V, F_hat = torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2, 2, 3, 3)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.phydi_cpu.phc_conv_factored_(y, x, W, V, F_hat, None, None, None, None, False, True, sizes)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("U", "n", "match"),
    (
        (torch.ones(2, 4), 4, "R terms"),
        (torch.ones(3, 5), 5, "2, 3, 4 or 8 terms"),
        (torch.ones(3, 4), 3, "size"),
        (None, 4, "size"),
    ),
)
def test_direct_kernel_refuses_other_terms(U, n, match):
    y, x, F = torch.zeros(1, 4, 25), torch.zeros(1, 4, 25), torch.ones(n, 9, 2, 2)
    W, V = torch.ones(3, 2), torch.ones(3, 2)
    with pytest.raises(RuntimeError, match=match):
        window = [5, 5, 5, 5, 3, 3, 1, 1, 1, 1, 1, 1]
        torch.ops.phydi_cpu.phc_conv_factored_(y, x, W, V, F, U, None, None, None, False, True, window)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_wide_algebra_beside_bfloat16(plan, monkeypatch):
    """U, V and W in float32 are not rounded to bfloat16: an algebra of 1 + 2^-12 is seen in the result."""
    force(monkeypatch, plan)
    x = torch.full((1, 2, 4, 4), 2.0**6, dtype=torch.bfloat16)
    V, W = torch.tensor([[1 + 2.0**-12, -1.0]]), torch.tensor([[1.0, -1.0]])
    F = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16)
    x[:, 1] = 0
    residual = torch.tensor([-(2.0**6), 2.0**6], dtype=torch.bfloat16).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    y = functional.phc_conv2d_factored(x, None, V, W, F, residual=residual)
    if plan in (Plan.RANK, Plan.DIRECT):
        assert y[0, 0].eq(2.0**-6).all()
    assert y.dtype is torch.bfloat16
    assert y[0, 1].eq(0).all()


FEW_PRODUCTS = (Plan.RANK, Plan.DIRECT)


@pytest.mark.parametrize(("channels", "size"), ((64, 32), (128, 16), (256, 16), (256, 8), (512, 8), (512, 4)))
@pytest.mark.parametrize("bfloat16", (False, True))
def test_wide_layers_take_the_fast_algorithm(channels, size, bfloat16):
    pixels, p = 32 * size * size, channels // 4
    assert plans.phc_conv_factored(pixels, pixels, 4, 4, 4, p, p, 9, 7, bfloat16, (1, size)) in FEW_PRODUCTS
    if channels > 64:
        assert plans.phc_conv_factored(pixels, pixels, 4, 4, 4, p, p, 9, 7, bfloat16) is Plan.RANK


@pytest.mark.parametrize("channels", (512, 1024, 2048))
def test_wide_pointwise_layers_multiply_pixels_as_they_lie(channels):
    """A channels_last image of enough channels; planes are copied, which pays only for more."""
    p, q, pixels = channels // 4, channels // 16, 2048
    assert plans.phc_conv_factored(pixels, pixels, 4, 4, 4, p, q, 1, 7, False, (1, 8), (True, 0)) is Plan.POINTWISE
    assert plans.phc_conv_factored(pixels, pixels, 4, 4, 4, p, q, 1, 7, False, (1, 8), None) is not Plan.POINTWISE


def test_torch_copies_planes_as_well():
    """The direct kernel, which does not, serves planes where a channels_last image goes to torch."""
    p, q, pixels = 16, 64, 32768
    for copied, plan in ((0, Plan.PANEL), (pixels * 4 * (p + q), Plan.DIRECT)):
        sizes = (pixels, pixels, 4, 4, 4, p, q, 1, 7, False, (1, 32), (True, copied))
        assert plans.phc_conv_factored(*sizes) is plan


def test_wide_weights_of_few_pixels_have_gradients_of_few_products():
    """The gradient of H costs its entries, whatever the number of pixels."""
    for pixels, p, q in ((512, 512, 128), (8192, 128, 32), (8192, 16, 64)):
        for copied, plan in ((0, Plan.POINTWISE), (100 * pixels * 4 * (p + q), Plan.PANEL)):
            sizes = (pixels, pixels, 4, 4, 4, p, q, 1, 7, False, None, (True, copied))
            assert plans.phc_conv_factored_grad(*sizes) is plan
    for pixels, p, plan in ((512, 128, Plan.RANK), (8192, 32, Plan.PANEL)):
        assert plans.phc_conv_factored_grad(pixels, pixels, 4, 4, 4, p, p, 9, 7, False, (1, 8)) is plan


@pytest.mark.parametrize("bfloat16", (False, True))
def test_narrow_layers_and_full_rank_do_not(bfloat16):
    """Additions outweigh what few channels save; n^2 terms save nothing."""
    for p, R, taps in ((4, 7, 9), (16, 7, 1), (64, 16, 9), (128, 16, 9)):
        pixels = 32 * 16 * 16
        assert plans.phc_conv_factored(pixels, pixels, 4, 4, 4, p, p, taps, R, bfloat16, (1, 16)) not in FEW_PRODUCTS
        assert plans.phc_conv_factored_grad(pixels, pixels, 4, 4, 4, p, p, taps, R, bfloat16) is not Plan.RANK


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("plan", FEW_PRODUCTS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_rounding_in_bfloat16(structure, plan, monkeypatch):
    """An error bound for every entry, u = 2^-8 the unit roundoff of bfloat16, * the convolution:

        |y - H * x| <= u |H * x| + (1 + u) (B + gamma M),
        B_k = sum_r |V[r,k]| (u |F-hat_r * x-hat_r| + (1 + u) (2u + u^2) (|F-hat_r| * |x-hat_r|)),

    and M the same sum of the absolute values of all five arguments. F-hat and x-hat are rounded once: a product of two
    entries is off by at most 2u + u^2 of itself, and y-hat_r = F-hat_r * x-hat_r by e <= (2u + u^2) (|F-hat_r| *
    |x-hat_r|); rounded in turn, as the rank plan does, by e + u (|y-hat_r| + e). V weights these, the float32 sums add
    gamma M with gamma = 2 (n + Q + q taps + R) 2^-24, and the rounding of the result turns an error e into at most
    u |H * x| + (1 + u) e.
    """
    force(monkeypatch, plan)
    u = 2.0**-8
    A, found = decomposed(structure)
    n, P, Q = A.shape
    problem = conv((3,), (7, 6), (3, 3), n, P, Q, 18, 5, padding=1)
    tensors = draw_problem(problem, normal, torch.bfloat16, omit=("A", "bias", "residual", "alpha"))
    # Decompositions may have entries of 1, which round nothing.
    tensors |= {name: t.float() * scale for (name, t), scale in zip(found.items(), (1.3, 0.7, 1.1), strict=True)}
    case = CASES["phc_conv2d_factored"]
    y = case.op(**tensors, **problem.options)
    exact = double(tensors)
    expected, magnitude = (case.dense(**t, **problem.options) for t in (exact, absolute(tensors)))
    x_hat = torch.einsum("rl,bl...->rb...", exact["W"], exact["x"].unflatten(1, (Q, -1)))
    F_hat = torch.einsum("ri,i...->r...", exact["U"], exact["F"])
    of_terms = []
    for x, F in zip(x_hat, F_hat, strict=True):
        y_hat, products = (torch.nn.functional.conv2d(*pair, padding=1) for pair in ((x, F), (x.abs(), F.abs())))
        of_terms.append(u * y_hat.abs() + (1 + u) * (2 * u + u * u) * products)
    B = torch.einsum("rk,rb...->bk...", exact["V"].abs(), torch.stack(of_terms)).flatten(1, 2)
    gamma = 2 * (n + Q + 9 * 5 + len(F_hat)) * 2.0**-24
    bound = u * expected.abs() + (1 + u) * (B + gamma * magnitude)
    assert ((y.double() - expected).abs() - bound).max() <= 0
