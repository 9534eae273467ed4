"""The operations: one family of files each, and the backends that run them.

    residual.py         schema, checks, fake, autograd: what torch.ops.qadapter.residual_* is
    residual_torch.py   what it means, in plain PyTorch: the torch backend
    cpp.py, cuda.py     the compiled extensions (csrc/cpu, csrc/cuda), an operation a function
    triton.py           the launchers of `qadapter.kernels`
    backends.py         which of them serves a call

few_rows.py, layer_rows.py, decoder_layer.py and varlen_attention.py are no such operations: what is
called too often for a dispatch. `preference`, `linear` and `sample` are families like `residual`;
`library` holds what they share.
"""
