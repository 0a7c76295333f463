"""The public functions: what they refuse, and autocast."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import normal
from op_cases import CASES, FACTORED
from op_checks import ALGEBRA, draw
from torch.utils._python_dispatch import TorchDispatchMode

from phydi_kernels import functional
from phydi_kernels.kernels import cpu

OPS = pytest.mark.parametrize("name", CASES)
DENSE_OPS = pytest.mark.parametrize("name", [name for name in CASES if name not in FACTORED])
FACTORED_OPS = pytest.mark.parametrize("name", FACTORED)
HALF = torch.bfloat16
# The functions of discriminant analysis share no arguments with the layers and are tested in files of their own: what
# of theirs is called, with first and second derivatives.
DISCRIMINANT = {
    "kernel_matrix": {"kernel_matrix"},
    "gda_solve": {"gda_factor", "gda_apply", "symmetric_times", "eigh_small"},
    "discriminant_criterion": set(),
}


def _call(name: str, tensors: dict[str, torch.Tensor], **options) -> torch.Tensor:
    return CASES[name].op(**tensors, **{**CASES[name].small[0].options, **options})


def _raises(error: type[Exception], message: str):
    return pytest.raises(error, match=re.escape(message))


@pytest.fixture
def tensors(name, device) -> dict[str, torch.Tensor]:
    return draw(CASES[name].small[0], normal, torch.float32, device)


def test_every_operator_and_function_has_a_case():
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("phydi::")}
    of_layers = set().union(*(case.operators for case in CASES.values()))
    assert {name.removeprefix("phydi::") for name in defined} == of_layers.union(*DISCRIMINANT.values())
    composed = {"GDASolution", "phm_embedding"}  # a type, and a composition of torch's operators
    assert set(functional.__all__) == CASES.keys() | DISCRIMINANT.keys() | composed


@pytest.mark.parametrize("name", DISCRIMINANT)
def test_operators_of_discriminant_analysis(name):
    class Record(TorchDispatchMode):
        called: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "phydi":
                self.called.add(func._schema.name.removeprefix("phydi::"))
            return func(*args, **(kwargs or {}))

    x = normal((9, 3), 0).requires_grad_()
    labels = torch.arange(9) % 3
    calls = {
        "kernel_matrix": lambda: functional.kernel_matrix(x),
        "gda_solve": lambda: functional.gda_solve(x @ x.mT, labels, tau=1.0).eigenvalues,
        "discriminant_criterion": lambda: functional.discriminant_criterion(x, labels, 3),
    }
    with Record() as record:
        (gradient,) = torch.autograd.grad(calls[name]().square().sum(), x, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), x)
    assert record.called == DISCRIMINANT[name]


@OPS
class TestBadInput:
    @pytest.mark.parametrize("value", (1.0, [1.0], "x"), ids=("float", "list", "str"))
    def test_not_a_tensor(self, name, tensors, value):
        for argument in tensors:
            with _raises(TypeError, f"{argument} must be a torch.Tensor, not {type(value).__name__}"):
                _call(name, {**tensors, argument: value})

    def test_required_tensor_is_none(self, name, tensors):
        for argument in tensors.keys() & {"x", "A", "V", "W", "F"}:
            with _raises(TypeError, f"{argument} must be a torch.Tensor, not NoneType"):
                _call(name, {**tensors, argument: None})

    def test_mixed_dtypes(self, name, tensors):
        for argument in tensors.keys() - {"x", *ALGEBRA}:
            with _raises(TypeError, f"{argument} has dtype torch.float64 but x has torch.float32"):
                _call(name, {**tensors, argument: tensors[argument].double()})

    @pytest.mark.parametrize("dtype", (torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn))
    def test_other_dtypes(self, name, tensors, dtype):
        with _raises(TypeError, f"x has dtype {dtype}; allowed are torch.float32, torch.float64, torch.bfloat16"):
            _call(name, {key: t.to(dtype) for key, t in tensors.items()})

    def test_mixed_devices(self, name, tensors):
        for argument in tensors.keys() - {"x"}:
            with _raises(ValueError, f"{argument} is on meta but x is on {tensors['x'].device}"):
                _call(name, {**tensors, argument: tensors[argument].to("meta")})

    @pytest.mark.parametrize("activation", ("gelu", "ReLU", "", None))
    def test_activation(self, name, tensors, activation):
        with _raises(ValueError, f"activation={activation!r} is not one of 'none', 'relu'"):
            _call(name, tensors, activation=activation)

    def test_rank_of_weights(self, name, tensors):
        F = tensors["F"][0]
        with _raises(ValueError, f"F has shape {tuple(F.shape)}; it must be (n, p, q"):
            _call(name, {**tensors, "F": F})

    def test_empty_weights(self, name, tensors):
        empty = tensors["F"][:, :0]
        with _raises(ValueError, f"F {tuple(empty.shape)} must not have an empty dimension"):
            _call(name, {**tensors, "F": empty})

    @pytest.mark.parametrize("shape", ((), (1,), (1, 4)))
    def test_bias(self, name, tensors, shape):
        (features,) = tensors["bias"].shape
        with _raises(ValueError, f"bias has shape {shape}; it must be (P*p,) = ({features},)"):
            _call(name, {**tensors, "bias": tensors["bias"].new_zeros(shape)})

    def test_alpha(self, name, tensors):
        (features,) = tensors["bias"].shape
        message = f"it must hold one element, or be (P*p,) = ({features},)"
        for shape in ((0,), (features - 1, 2), (features + 1,), (1, features), (features, 1)):
            with _raises(ValueError, f"alpha has shape {shape}; {message}"):
                _call(name, {**tensors, "alpha": tensors["alpha"].new_zeros(shape)})

    def test_residual_is_not_broadcast(self, name, tensors):
        shape = tuple(tensors["residual"].shape)
        wrong = tensors["residual"][:1]
        with _raises(ValueError, f"residual has shape {tuple(wrong.shape)}; it must be the result's {shape}"):
            _call(name, {**tensors, "residual": wrong})

    def test_features(self, name, tensors):
        x = tensors["x"][:, :-1]
        features = tensors["x"].shape[1]
        with _raises(ValueError, f"x has shape {tuple(x.shape)}; ") as caught:
            _call(name, {**tensors, "x": x})
        assert f"Q*q = {features}" in str(caught.value)


@DENSE_OPS
class TestBadAlgebra:
    def test_rank(self, name, tensors):
        A = tensors["A"][0]
        with _raises(ValueError, f"A has shape {tuple(A.shape)}; it must be (n, P, Q)"):
            _call(name, {**tensors, "A": A})

    def test_number_of_terms(self, name, tensors):
        F = torch.cat([tensors["F"]] * 2)
        message = f"A {tuple(tensors['A'].shape)} and F {tuple(F.shape)} must have the same number of terms n"
        with _raises(ValueError, message):
            _call(name, {**tensors, "F": F})

    def test_empty(self, name, tensors):
        empty = tensors["A"][:, :0]
        with _raises(ValueError, f"A {tuple(empty.shape)} must not have an empty dimension"):
            _call(name, {**tensors, "A": empty})


@FACTORED_OPS
class TestBadFactors:
    @pytest.mark.parametrize("argument", ALGEBRA)
    def test_rank(self, name, tensors, argument):
        size = {"U": "n", "V": "P", "W": "Q"}[argument]
        given = tensors[argument]
        for wrong in (given[0], given.unsqueeze(0), given[:0], given[:, :0], given.new_zeros(())):
            with _raises(ValueError, f"{argument} has shape {tuple(wrong.shape)}; it must be (R, {size}), not empty"):
                _call(name, {**tensors, argument: wrong})

    @pytest.mark.parametrize("argument", ALGEBRA)
    def test_unequal_numbers_of_terms(self, name, tensors, argument):
        changed = {**tensors, argument: tensors[argument][:-1]}
        shapes = " and ".join(f"{key} {tuple(changed[key].shape)}" for key in "UVWF")
        with _raises(ValueError, f"{shapes}: U, V and W must have the same number of rows R"):
            _call(name, changed)

    def test_unequal_numbers_of_terms_without_u(self, name, tensors):
        changed = {**tensors, "U": None, "W": tensors["W"][:-1]}
        shapes = " and ".join(f"{key} {tuple(changed[key].shape)}" for key in "VWF")
        with _raises(ValueError, f"{shapes}: U, V and W must have the same number of rows R"):
            _call(name, changed)

    def test_weights_without_u(self, name, tensors):
        R, F = len(tensors["V"]), tensors["F"]
        assert len(F) != R
        with _raises(ValueError, f"F {tuple(F.shape)} must have the R = {R} terms of V and W where U is None"):
            _call(name, {**tensors, "U": None})

    def test_columns_of_u(self, name, tensors):
        U, F = tensors["U"], tensors["F"]
        for wrong in (U[:, :-1], U.repeat(1, 2)):
            message = f"U {tuple(wrong.shape)} must have a column for each of the n = {len(F)} terms of F"
            with _raises(ValueError, f"{message} {tuple(F.shape)}"):
                _call(name, {**tensors, "U": wrong})

    @pytest.mark.parametrize("argument", ALGEBRA)
    @pytest.mark.parametrize(
        ("dtype", "others"),
        (
            (torch.float32, (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.complex64)),
            (torch.float64, (torch.float32, torch.bfloat16, torch.float16)),
            (torch.bfloat16, (torch.float64, torch.float16, torch.int8)),
            (torch.float16, (torch.float64, torch.bfloat16)),
        ),
        ids=lambda value: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else "",
    )
    def test_dtype(self, name, tensors, argument, dtype, others):
        tensors = {key: t.to(dtype) for key, t in tensors.items()}
        allowed = f"{dtype} or torch.float32" if dtype.itemsize == 2 else str(dtype)
        for other in others:
            message = f"{argument} has dtype {other}; beside x of dtype {dtype} it must have {allowed}"
            with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
                _call(name, {**tensors, argument: tensors[argument].to(other)})


def test_scalar_input():
    tensors = draw(CASES["phm_linear"].small[0])
    with _raises(ValueError, "x has shape (); its last dimension must be Q*q = 3"):
        functional.phm_linear(torch.zeros((), dtype=torch.float64), tensors["A"], tensors["F"])


@pytest.mark.parametrize("d", (1, 2, 3))
class TestConvolutionGeometry:
    @staticmethod
    def _call(d: int, size: int = 5, **options) -> torch.Tensor:
        x, A, F = torch.zeros(1, 4, *[size] * d), torch.zeros(2, 2, 2), torch.zeros(2, 3, 2, *[3] * d)
        return getattr(functional, f"phc_conv{d}d")(x, A, F, **options)

    @pytest.mark.parametrize("argument", ("stride", "padding", "dilation"))
    def test_integers_in_range(self, d, argument):
        least = 0 if argument == "padding" else 1
        for value in (1.0, True, None):
            message = f"{argument}={value!r} must be an integer >= {least}, not {type(value).__name__}"
            for given in (value, [value] * d):
                with _raises(TypeError, message):
                    self._call(d, **{argument: given})
        for given in (least - 1, [least - 1] * d):
            with _raises(ValueError, f"{argument}={least - 1} must be an integer >= {least}"):
                self._call(d, **{argument: given})

    @pytest.mark.parametrize("argument", ("stride", "padding", "dilation"))
    @pytest.mark.parametrize("value", ((), (1, 1, 1, 1)))
    def test_one_integer_for_each_dimension(self, d, argument, value):
        message = f"{argument}={value!r} has {len(value)} entries; it must be one integer or {d} of them"
        with _raises(ValueError, message):
            self._call(d, **{argument: value})

    def test_padding_name(self, d):
        with _raises(ValueError, 'padding=\'full\' is not one of "valid", "same" or integers >= 0'):
            self._call(d, padding="full")

    def test_same_padding_needs_stride_one(self, d):
        with _raises(ValueError, f'padding="same" needs stride 1, not {(2,) * d}'):
            self._call(d, padding="same", stride=2)

    def test_input_smaller_than_kernel(self, d):
        message = f"x of spatial size {(4,) * d} with padding {(0,) * d} is smaller than the dilated kernel {(5,) * d}"
        with _raises(ValueError, message):
            self._call(d, size=4, dilation=2)

    def test_rank_of_input(self, d):
        x, A, F = torch.zeros(4), torch.zeros(2, 2, 2), torch.zeros(2, 3, 2, *[3] * d)
        with _raises(ValueError, "x has shape (4,); it must be (batch, 4, size"):
            getattr(functional, f"phc_conv{d}d")(x, A, F)


@OPS
class TestAutocast:
    """Under autocast the arguments are cast as torch.nn.functional.linear casts its own."""

    @pytest.mark.parametrize("compiled", (True, False), ids=("kernels", "reference"))
    def test_result_is_half_precision(self, name, tensors, compiled, device, monkeypatch):
        if not compiled:
            monkeypatch.setattr(cpu, "available", lambda: False)
        del tensors["residual"]
        leaves = {key: t.requires_grad_() for key, t in tensors.items()}
        with torch.autocast(device.type, dtype=HALF):
            y = _call(name, leaves)
        cast = {key: (t if key in ALGEBRA else t.to(HALF)).detach().requires_grad_() for key, t in tensors.items()}
        expected = _call(name, cast)
        assert y.dtype is HALF and torch.equal(y, expected)
        grads = torch.autograd.grad(y.sum(), list(leaves.values()))
        expected_grads = torch.autograd.grad(expected.sum(), list(cast.values()))
        for (key, argument), grad, other in zip(cast.items(), grads, expected_grads, strict=True):
            assert grad.dtype is torch.float32 and other.dtype is argument.dtype
            assert torch.equal(grad, other.float()), key

    def test_backward_inside_is_the_same(self, name, tensors, device):
        leaves = {key: t.requires_grad_() for key, t in tensors.items()}
        with torch.autocast(device.type, dtype=HALF):
            y = _call(name, leaves).sum()
            inside = torch.autograd.grad(y, list(leaves.values()), retain_graph=True)
        outside = torch.autograd.grad(y, list(leaves.values()))
        for key, grad, other in zip(leaves, inside, outside, strict=True):
            assert torch.equal(grad, other), key

    def test_wider_residual_is_added_unrounded(self, name, tensors, device):
        with torch.autocast(device.type, dtype=HALF):
            y = _call(name, tensors)
            branch = _call(name, {key: t for key, t in tensors.items() if key != "residual"})
        assert branch.dtype is HALF
        assert y.dtype is torch.float32 and torch.equal(y, tensors["residual"] + branch)

    def test_residual_of_the_same_dtype_is_fused(self, name, tensors, device):
        half = {key: t.to(HALF) for key, t in tensors.items()}
        with torch.autocast(device.type, dtype=HALF):
            y = _call(name, {**tensors, "residual": half["residual"]})
        kept = {key: t for key, t in tensors.items() if key in ALGEBRA}
        assert y.dtype is HALF and torch.equal(y, _call(name, half | kept))

    @pytest.mark.parametrize("residual", [1.0, torch.ones(1, dtype=torch.int32), torch.ones(1, dtype=torch.complex64)])
    def test_residual_of_no_allowed_type(self, name, tensors, residual, device):
        with torch.autocast(device.type, dtype=HALF), pytest.raises(TypeError, match="^residual "):
            _call(name, {**tensors, "residual": residual})

    def test_wider_residual_of_another_shape(self, name, tensors, device):
        with torch.autocast(device.type, dtype=HALF), pytest.raises(ValueError, match="residual has shape"):
            _call(name, {**tensors, "residual": tensors["residual"][:1]})

    def test_float64_is_left_alone(self, name, tensors, device):
        double = {key: t.double() for key, t in tensors.items()}
        with torch.autocast(device.type, dtype=HALF):
            y = _call(name, double)
        assert y.dtype is torch.float64 and torch.equal(y, _call(name, double))

    def test_disabled_region_is_left_alone(self, name, tensors, device):
        with torch.autocast(device.type, dtype=HALF), torch.autocast(device.type, enabled=False):
            assert _call(name, tensors).dtype is torch.float32

    def test_integers_are_not_cast(self, name, tensors, device):
        argument = "U" if name in FACTORED else "A"
        message = f"{argument} has dtype torch.int64"
        with torch.autocast(device.type, dtype=HALF), pytest.raises(TypeError, match=message):
            _call(name, {**tensors, argument: tensors[argument].long()})

    def test_a_half_precision_algebra_is_not_widened(self, name, tensors, device):
        half = {key: t.to(HALF) for key, t in tensors.items()}
        with torch.autocast(device.type, dtype=HALF):
            y = _call(name, half)
        assert y.dtype is HALF and torch.equal(y, _call(name, half))
