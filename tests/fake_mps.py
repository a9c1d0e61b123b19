"""A stand-in for MPS, a device without float64, on machines that have none.

A tensor says that it is on "mps" and keeps its numbers on the CPU. What would give a float64 tensor
there raises the TypeError that MPS raises.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

MPS, CPU = torch.device("mps:0"), torch.device("cpu")
NO_FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it"


class FakeMPSTensor(torch.Tensor):
    """A tensor that says it is on MPS.

    Args:
        numbers: on the CPU.
    """

    @staticmethod
    def __new__(cls, numbers):
        """Return an empty shell of the same shape and strides."""
        if numbers.dtype in (torch.float64, torch.complex128):
            raise TypeError(NO_FLOAT64)
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), dtype=numbers.dtype, device=MPS
        )

    def __init__(self, numbers):
        self.numbers = numbers

    def __repr__(self):
        """Return the numbers as text."""
        return f"FakeMPSTensor({self.numbers})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Compute on the CPU."""
        return compute_on_cpu(func, args, kwargs or {})


def is_mps(device):
    """Return whether a device, or its name, is MPS."""
    return isinstance(device, (str, torch.device)) and str(device).split(":")[0] == "mps"


def compute_on_cpu(func, args, kwargs):
    """Return the result of a function of tensors, on MPS if its arguments or `device` are."""
    inputs = []

    def unwrap(x):
        """Return the numbers of a tensor, and the CPU for MPS."""
        if isinstance(x, FakeMPSTensor):
            inputs.append(x)
            return x.numbers
        return CPU if is_mps(x) else x

    device = kwargs.get("device")
    plain_args, plain_kwargs = tree_map(unwrap, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    on_mps = is_mps(device) or (device is None and inputs)
    own = {id(x.numbers): x for x in inputs}  # what a function in place returns

    def wrap(x):
        """Return a tensor of MPS."""
        if not isinstance(x, torch.Tensor) or not on_mps:
            return x
        return own[id(x)] if id(x) in own else FakeMPSTensor(x)

    return tree_map(wrap, result)


class FactoryMode(TorchDispatchMode):
    """Mode in which new tensors can be made on MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Compute on the CPU."""
        return compute_on_cpu(func, args, kwargs or {})


class BindingMode(TorchFunctionMode):
    """Mode for the methods that ask for MPS before they dispatch: `to` and indexing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Compute on the CPU what would ask for MPS; else call the function."""
        if func is torch.Tensor.to:
            return move(*args, **(kwargs or {}))
        x = args[0] if args else None
        if func is torch.Tensor.tolist and isinstance(x, FakeMPSTensor):
            return x.numbers.tolist()
        if func is torch.Tensor.new_tensor and isinstance(x, FakeMPSTensor):
            return FakeMPSTensor(x.numbers.new_tensor(*args[1:]))
        if func is torch.Tensor.__getitem__ and isinstance(x, FakeMPSTensor):
            index = args[1]
            if isinstance(index, torch.Tensor):
                return torch.ops.aten.index.Tensor(x, [index])
            if not x.requires_grad:
                return compute_on_cpu(func, args, {})
        return func(*args, **(kwargs or {}))


def move(x, *args, device=None, dtype=None, **kwargs):
    """Return what `Tensor.to` returns, on MPS too."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, (str, torch.device)):
            device = arg
    if not is_mps(device):
        return (
            torch._C.TensorBase.to(x, *args, dtype=dtype, **kwargs)
            if not args
            else (torch._C.TensorBase.to(x, *args, **kwargs))
        )
    if not isinstance(x, FakeMPSTensor):
        x = FakeMPSTensor(x.detach() if dtype is None else x.detach().type(dtype))
    return x if dtype in (None, x.dtype) else x.type(dtype)


@contextlib.contextmanager
def fake_mps(monkeypatch):
    """Give this machine a device "mps" inside the block: its tensors and its generators."""
    make = torch.Generator

    def generator(device="cpu"):
        """Return a generator, the CPU's for MPS."""
        return make("cpu" if is_mps(device) else device)

    with monkeypatch.context() as patch, FactoryMode(), BindingMode():
        patch.setattr(torch, "Generator", generator)
        yield


def move_module(module):
    """Move a module's parameters and buffers to the stand-in, and return the module."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                moved = torch.nn.Parameter(FakeMPSTensor(p.detach().clone()), p.requires_grad)
                part._parameters[name] = moved
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = FakeMPSTensor(b.clone())
    return module
