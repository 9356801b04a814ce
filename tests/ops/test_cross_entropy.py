"""cross_entropy: value and gradient against float64, and no float32 copy of the logits."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft import ops
from fastpeft.reference.cross_entropy import cross_entropy as reference
from tests.parity import assert_parity, leaf


def run(function, logits, labels, grad, **options):
    logits = leaf(logits)
    losses = function(logits, labels, **options)
    losses.backward(grad.to(losses.dtype))
    return losses.detach(), logits.grad


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (5, 31), (2, 9, 97), (70, 40001)])
@pytest.mark.parametrize("scale", (1.0, 100.0))
def test_parity(shape, dtype, scale):
    logits = (torch.randn(shape) * scale).to(dtype)
    labels, grad = torch.randint(0, shape[-1], shape[:-1]), torch.rand(shape[:-1])
    if labels.numel() > 2:
        labels.view(-1)[1::3] = -100
    results = zip(
        run(ops.cross_entropy, logits, labels, grad),
        run(reference, logits, labels, grad),
        run(reference, logits.double(), labels, grad),
        strict=True,
    )
    for (actual, plain, exact), name in zip(results, ("loss", "dlogits"), strict=True):
        assert_parity(actual, plain, exact, name)


def test_equals_torch():
    logits, labels = torch.randn(11, 17, requires_grad=True), torch.randint(0, 17, (11,))
    labels[3] = 5
    mine = ops.cross_entropy(logits, labels, ignore_index=5)
    theirs = F.cross_entropy(logits, labels, ignore_index=5, reduction="none")
    assert torch.allclose(mine, theirs, atol=1e-6) and mine[3] == 0


def test_ignored_rows_may_hold_anything_and_get_zeros():
    logits = torch.randn(4, 9)
    logits[1], logits[2, 3] = float("nan"), float("-inf")
    labels = torch.tensor([1, -100, 2, -100])
    losses, gradient = run(ops.cross_entropy, logits, labels, torch.ones(4))
    assert losses.isfinite().all() and (gradient[3] == 0).all()
    assert gradient[[0, 2]].isfinite().all() and gradient[2, 3] == 0


def test_gradcheck():
    logits, labels = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True), torch.randint(0, 7, (3, 4))
    assert torch.autograd.gradcheck(lambda z: ops.cross_entropy(z, labels), (logits,))


def test_opcheck_and_compile():
    logits, labels = leaf(torch.randn(5, 9)), torch.randint(0, 9, (5,))
    torch.library.opcheck(torch.ops.fastpeft.cross_entropy, (logits, labels, -100, None))
    compiled = torch.compile(lambda z: ops.cross_entropy(z, labels).sum(), fullgraph=True, backend="aot_eager")
    for function in (compiled, lambda z: ops.cross_entropy(z, labels).sum()):
        function(logits).backward()
    assert torch.allclose(logits.grad / 2, torch.autograd.grad(reference(logits, labels).sum(), logits)[0], atol=1e-6)


def test_no_tensor_is_as_large_as_a_float32_copy_of_the_logits():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.size = max(self.size, result.untyped_storage().nbytes())
            return result

    logits, labels = torch.randn(512, 20000, dtype=torch.bfloat16, requires_grad=True), torch.randint(0, 20000, (512,))
    with Largest() as seen:
        ops.cross_entropy(logits, labels).sum().backward()
    assert seen.size == logits.numel() * 2  # the gradient, in bf16


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"labels must be \(3,\); got \(4,\)"):
        ops.cross_entropy(torch.randn(3, 5), torch.zeros(4, dtype=torch.long))
    with pytest.raises(TypeError, match="labels torch.float32"):
        ops.cross_entropy(torch.randn(3, 5), torch.zeros(3))
