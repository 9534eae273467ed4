"""The Triton backend: the launchers of `qadapter.kernels`, imported on first use."""

from qadapter.kernels.linear_bwd import linear_bwd as linear_bwd
from qadapter.kernels.linear_fwd import linear_fwd as linear_fwd
from qadapter.kernels.preference import preference_fwd as preference_fwd
from qadapter.kernels.residual_bwd import residual_bwd as residual_bwd
from qadapter.kernels.residual_fwd import residual_fwd as residual_fwd
from qadapter.kernels.sample import sample as sample
