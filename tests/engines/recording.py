"""A CPU substitute for CUDA graphs: it records the operations of a step and replays them on the same tensors.

Like a graph, it knows nothing but tensors. A step whose values pass through Python, or whose shapes depend on data,
replays wrongly or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"}
"""Operations that copy a value to the host."""
DATA_DEPENDENT = {"nonzero", "nonzero_numpy", "masked_select", "unique", "_unique", "_unique2", "unique_dim",
                  "unique_consecutive", "bincount", "histc", "repeat_interleave"}  # fmt: skip
"""Operations whose output shape depends on data."""
FROM_HOST = {"lift_fresh", "lift", "scalar_tensor", "from_file", "pin_memory"}
"""Operations that create a tensor from host values, or would on a GPU."""
DRAWS = {"random_", "uniform_", "normal_", "bernoulli", "bernoulli_", "native_dropout", "rand", "randn", "randint"}
"""Operations with a random generator, whose state a graph would have to capture."""


TO_HOST = {"tolist", "numpy", "cpu", "cuda", "__array__"}
"""Methods that need no operation on a CPU, but would synchronise a GPU."""


class NoHost(TorchFunctionMode):
    """Refuses to move tensors to the host, or to a device by its name."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        assert name not in TO_HOST, f"{name} waits"
        if name == "to":
            devices = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, (str, torch.device))]
            assert not devices, "to(device) would move to or from the host"
        return function(*args, **kwargs)


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors(tree: Any) -> list[torch.Tensor]:
    """Return the tensors in nested tuples, lists and dicts, as ``tree_leaves`` would, in a fifth of its time."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [tensor for leaf in tree for tensor in tensors(leaf)] if isinstance(tree, (tuple, list)) else []


@cache
def overwritten(operation: Any) -> list[tuple[int, str]]:
    """Return place and name of the arguments that an operation writes to."""
    written = [a.alias_info is not None and a.alias_info.is_write for a in operation._schema.arguments]
    return [(place, a.name) for place, a in enumerate(operation._schema.arguments) if written[place]]


@dataclass
class Call:
    """One operation with its arguments and its result."""

    operation: Any
    given: tuple[tuple, dict]
    result: Any

    def outline(self, outside: set[int]) -> tuple:
        """Return what must be equal in every step: shapes, plain values, and the addresses of ``outside`` storages."""

        def part(tree: Any) -> Any:
            if isinstance(tree, torch.Tensor):
                place = storage(tree)
                shown = place if place in outside else None
                return tuple(tree.shape), tree.stride(), tree.dtype, tree.storage_offset(), shown
            if isinstance(tree, dict):
                return {name: part(value) for name, value in tree.items()}
            return [part(value) for value in tree] if isinstance(tree, (tuple, list)) else tree

        return str(self.operation), part(self.given), part(self.result)


@dataclass
class Recording(TorchDispatchMode):
    """Records every operation below autograd, and refuses those that a recorded step must not contain."""

    calls: list[Call] = field(default_factory=list)
    made: set[int] = field(default_factory=set)
    before: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.no_host = NoHost()

    def __enter__(self):
        self.no_host.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.no_host.__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, kwargs = operation.overloadpacket.__name__, kwargs or {}
        for refused, why in ((WAITS, "waits"), (DATA_DEPENDENT, "has a size that hangs on data"),
                             (FROM_HOST, "comes from the host"), (DRAWS, "draws from a generator")):  # fmt: skip
            assert name not in refused, f"{name} {why}"
        if name in ("_to_copy", "copy_"):
            assert len({t.device for t in tensors((args, kwargs))} | {torch.device("cpu")}) == 1
        if name == "index":
            assert all(t.dtype != torch.bool for t in tensors(args[1])), "a mask as index has a size that hangs on data"
        if name == "where":
            assert all(isinstance(a, torch.Tensor) for a in args), "where with a number makes a tensor on the host"
        self._save(operation, args, kwargs)
        result = operation(*args, **kwargs)
        given = {storage(t) for t in tensors((args, kwargs))}
        self.made |= {storage(t) for t in tensors(result)} - given
        self.calls.append(Call(operation, (args, kwargs), result))
        return result

    def _save(self, operation, args, kwargs) -> None:
        """Save the contents of tensors from before the step that the operation is about to overwrite."""
        for place, name in overwritten(operation):
            for tensor in tensors(args[place] if place < len(args) else kwargs.get(name)):
                if storage(tensor) not in self.made and storage(tensor) not in self.before:
                    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                    self.before[storage(tensor)] = whole, whole.clone()

    @property
    def outside(self) -> set[int]:
        """Storage addresses of tensors that existed before the step."""
        return {storage(t) for call in self.calls for t in tensors((call.given, call.result))} - self.made

    def outline(self) -> list[tuple]:
        outside = self.outside
        return [call.outline(outside) for call in self.calls]

    def undo(self) -> None:
        for tensor, saved in self.before.values():
            tensor.copy_(saved)

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat every operation on the very same tensors."""
        for call in self.calls:
            args, kwargs = call.given
            again = call.operation(*args, **kwargs)
            given = {storage(t) for t in tensors(call.given)}
            for old, new in zip(tensors(call.result), tensors(again), strict=True):
                assert old.shape == new.shape
                if storage(new) not in given:
                    old.copy_(new)


@dataclass
class FakeGraphs:
    """Replaces :class:`distilbench.engines.fused.cuda.graph_step.GraphRunner` on a CPU."""

    graphs: dict[Hashable, Recording] = field(default_factory=dict)
    replays: int = 0
    direct: int = 0
    used: set[Hashable] = field(default_factory=set)

    def record(self, key: Hashable, rehearsal: Callable[[], object], step: Callable[[], None]) -> float:
        rehearsal()
        recording = Recording()
        with recording:
            step()
        recording.undo()
        self.graphs[key] = recording
        return 1000.0  # seconds, more than anything else takes

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        if key in self.graphs:
            self.graphs[key].replay()
            self.replays += 1
            self.used.add(key)
        else:
            step()
            self.direct += 1
