"""The Triton backend: the launchers of `qadapter.kernels`, imported on first use."""

from qadapter.kernels.linear_fwd import linear_fwd
from qadapter.kernels.preference import preference_fwd
from qadapter.kernels.residual_bwd import residual_bwd
from qadapter.kernels.residual_fwd import residual_fwd
from qadapter.kernels.sample import sample

__all__ = ["linear_fwd", "preference_fwd", "residual_bwd", "residual_fwd", "sample"]
