"""A GPU in name: runs --device cuda on a machine without one, and fails where a GPU would.

A tensor on it is of device cuda:0 for Python and of meta for PyTorch; its numbers are in a tensor
on the CPU. Wrong is raised for operands on two devices, and in what a CUDA graph captures for all
that a graph cannot do, or would do once and not again: reading a number, a copy between devices, a
result whose size depends on data, work on the CPU.
"""

import os
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from graph_on_cpu import Graph, tensors_in
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

# operators whose result, or its size, the CPU has to wait for
READS = {"_local_scalar_dense", "bincount", "equal", "masked_select", "nonzero"}
READS |= {"_unique2", "repeat_interleave", "unique_consecutive", "unique_dim"}


class Wrong(Exception):
    pass


class Pretended(torch.Tensor):
    device = property(lambda self: torch.device("cuda:0"))
    is_cuda = True

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        layout |= {"dtype": inner.dtype, "device": "meta"}
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout)
        self.inner = inner
        return self

    def __deepcopy__(self, memo):
        new = Pretended(self.inner.clone())
        return torch.nn.Parameter(new) if isinstance(self, torch.nn.Parameter) else new

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        raise Wrong(f"{operator} outside of pretend_cuda")


def replace(x, old, new):
    """Returns lists, tuples and dictionaries with new(x) in place of an x of the class old."""
    if isinstance(x, dict):
        return {key: replace(part, old, new) for key, part in x.items()}
    if isinstance(x, list | tuple):
        return type(x)([replace(part, old, new) for part in x])
    return new(x) if isinstance(x, old) else x


def wrap(x):
    return replace(x, torch.Tensor, Pretended)


def unwrap(x):
    return replace(x, Pretended, lambda pretended: pretended.inner)


class Machine(TorchDispatchMode):
    """Runs every operator on the CPU, and raises Wrong where a GPU would fail or mislead."""

    graph = None  # the one that captures

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = {key: x for key, x in (kwargs or {}).items() if key != "pin_memory"}
        if operator.namespace == "profiler":
            return operator(*args, **kwargs)
        name = operator._schema.name.removeprefix("aten::")
        tensors = tensors_in([args, kwargs])
        ours = [x for x in tensors if isinstance(x, Pretended)]
        others = [x for x in tensors if not isinstance(x, Pretended)]
        makes_ours = isinstance(args[0], Pretended) if name == "copy_" else bool(ours)
        if kwargs.get("device") is not None:
            makes_ours = torch.device(kwargs["device"]).type != "cpu"
            kwargs["device"] = "cpu"
        if ours and name != "copy_" and any(x.dim() for x in others):
            raise Wrong(f"operands on two devices: {operator}")
        if self.graph:
            masks = [x for x in ours if x.dtype == torch.bool and name.startswith("index")]
            if others or masks or name in READS or not makes_ours:
                raise Wrong(f"no part of a graph: {operator}")
        inner, options = unwrap([args, kwargs])
        if self.graph:
            results = self.graph.call(operator, inner, options)
        else:
            results = operator(*inner, **options)
        if not makes_ours:
            return results
        return return_and_correct_aliasing(operator, args, kwargs, wrap(results))

    @contextmanager
    def capture(self, graph):
        with graph.recording():
            self.graph = graph
            yield
            self.graph = None


@contextmanager
def pretend_cuda():
    machine = Machine()
    stream = mock.Mock(is_capturing=lambda: machine.graph is not None)
    make, move, load, save = torch.tensor, torch.Tensor.to, torch.load, torch.save

    def make_on(data, device="cpu", **options):
        return make(data, **options).to(device)

    def move_to(x, *where, **options):  # a build without CUDA must be told an index
        names = ["cuda:0" if place in ("cuda", torch.device("cuda")) else place for place in where]
        return move(x, *names, **options)

    def load_on(path, map_location, **options):
        values = load(path, map_location="cpu", **options)
        return values if map_location == "cpu" else wrap(values)

    def save_all(values, path):
        save(unwrap(values), path)

    patches = {
        "torch.accelerator.current_accelerator": lambda **options: torch.device("cuda"),
        "torch.accelerator.current_stream": lambda: stream,
        "torch.cuda.CUDAGraph": Graph,
        "torch.cuda.Stream": lambda: stream,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.current_stream": lambda: stream,
        "torch.cuda.graph": machine.capture,
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.is_bf16_supported": lambda *options: True,
        "torch.cuda.stream": nullcontext,
        "torch.cuda.synchronize": lambda: None,
        "torch.compile": lambda function: function,
        "torch.load": load_on,
        "torch.save": save_all,
        "torch.tensor": make_on,
        "torch.Tensor.to": move_to,
    }
    with ExitStack() as stack:
        for name, new in patches.items():
            stack.enter_context(mock.patch(name, new))
        stack.enter_context(mock.patch.dict(os.environ, TORCH_COMPILE_DISABLE="1"))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(machine)
        yield
