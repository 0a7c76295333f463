"""Whether this process interprets Triton kernels; without it the other tests of this folder are left out."""

from __future__ import annotations


def test_kernels_are_interpreted(interpreter):
    from phydi_kernels.kernels.gpu import _launch

    assert _launch.INTERPRETED
