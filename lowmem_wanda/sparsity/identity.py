"""What a function of the user's is, as a checksum, so that a job is not resumed with another one."""

import functools
import hashlib
import sys
import types
import uuid
from typing import Any

import numpy as np
import torch

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(...))
OTHERS = ("torch", "numpy", "math", "builtins", "functools", "lowmem_wanda")  # packages that are known by name


class UnidentifiedError(Exception):
    """A value has no identity that another process would find again."""


def identity(*values: Any) -> str:
    """The SHA-256 in hex of functions, classes and values.

    A function is its compiled code, its defaults, and the values and functions that it takes from outside. Where one of
    them cannot be identified, such as an open file, the checksum is a random one that nothing else has.
    """
    try:
        text = repr([_parts(value, ()) for value in values])
    except (UnidentifiedError, ValueError, TypeError):  # a closure without a value yet; an array of objects
        text = uuid.uuid4().hex
    return hashlib.sha256(text.encode()).hexdigest()


def _parts(value: Any, seen: tuple[int, ...]) -> Any:
    """A nested list of plain values that stands for a value. Raises UnidentifiedError."""
    if isinstance(value, PLAIN):
        return repr(value)
    if id(value) in seen:
        return "again"
    seen = (*seen, id(value))
    if isinstance(value, (tuple, list)):
        return [type(value).__name__, *(_parts(one, seen) for one in value)]
    if isinstance(value, (set, frozenset)):
        return ["set", *sorted(repr(_parts(one, seen)) for one in value)]
    if isinstance(value, (dict, types.MappingProxyType)):
        return ["dict", *sorted(repr((_parts(key, seen), _parts(one, seen))) for key, one in value.items())]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
        tensor = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        return [str(value.dtype), list(value.shape), digest]
    if isinstance(value, types.CodeType):
        constants = [_parts(one, seen) for one in value.co_consts]
        return ["code", value.co_code.hex(), value.co_names, value.co_varnames, constants]
    return _callable_parts(value, seen)


def _callable_parts(value: Any, seen: tuple[int, ...]) -> Any:
    """The parts of a function, a class, or an object that may be called."""
    module = str(getattr(value, "__module__", None) or getattr(type(value), "__module__", ""))
    if isinstance(value, types.ModuleType):
        return ["module", value.__name__]
    if isinstance(value, functools.partial):
        return ["partial", *(_parts(one, seen) for one in (value.func, value.args, value.keywords))]
    if isinstance(value, types.MethodType):
        return ["method", _parts(value.__func__, seen), _parts(value.__self__, seen)]
    named = isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType))
    if named and (isinstance(value, types.BuiltinFunctionType) or module.split(".")[0] in OTHERS):
        return ["named", module, value.__qualname__]
    if isinstance(value, types.FunctionType):
        outside = {name: value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__}
        inside = [cell.cell_contents for cell in value.__closure__ or ()]
        return ["function", *(_parts(one, seen) for one in (value.__code__, value.__defaults__ or (),
                                                            value.__kwdefaults__ or {}, inside, outside))]  # fmt: skip
    if isinstance(value, type):
        own = {name: one for name, one in vars(value).items() if isinstance(one, (types.FunctionType, *PLAIN))}
        own = {name: one for name, one in own.items() if name not in ("__doc__", "__module__", "__firstlineno__")}
        return ["class", value.__qualname__, _parts(own, seen), [_parts(base, seen) for base in value.__bases__]]
    if hasattr(value, "__dict__") and type(value).__module__.split(".")[0] not in sys.stdlib_module_names:
        return ["object", _parts(type(value), seen), _parts(vars(value), seen)]
    raise UnidentifiedError(type(value).__name__)
