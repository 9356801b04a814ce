"""The formula of each op in plain PyTorch: any dtype (float64 too), differentiable by autograd, slow and obvious.

Tests measure every backend against these functions; `backend="reference"` runs them.
"""
