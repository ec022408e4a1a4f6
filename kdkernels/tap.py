"""Read, or replace, the multi-scale features that pass through a module of a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Features = OrderedDict[str, Tensor]
Replace = Callable[[str, Features], Features]


def unwrap(model: nn.Module) -> nn.Module:
    """The bare model inside DistributedDataParallel, DataParallel or torch.compile wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def as_features(value: Any) -> Features | None:
    """Name the levels of a tensor, a sequence or a mapping of (N, C, H, W) tensors; None when it is anything else."""
    if isinstance(value, Tensor):
        levels: Any = [("0", value)]
    elif isinstance(value, Mapping):
        levels = [(str(key), level) for key, level in value.items()]
    elif isinstance(value, list | tuple):
        levels = [(str(index), level) for index, level in enumerate(value)]
    else:
        return None
    if not levels or not all(isinstance(level, Tensor) and level.dim() == 4 for _, level in levels):
        return None
    return OrderedDict(levels)


def _rebuild(original: Any, features: Features) -> Any:
    values = list(features.values())
    if isinstance(original, Tensor):
        return values[0]
    kind: Any = type(original)
    if isinstance(original, Mapping):
        return kind(zip(original.keys(), values, strict=True))
    if hasattr(original, "_fields"):
        return kind(*values)
    return kind(values)


class FeatureTap:
    """Records the features that one module, or several, give or take.

    Args:
        model: the model, bare or wrapped by DistributedDataParallel or torch.compile.
        paths: ``"backbone"`` taps the output of that submodule, ``"head:input"`` the first argument of that one which is
            a feature map (N, C, H, W) or a sequence or mapping of them.
        replace: called as ``replace(path, features)`` whenever features pass; what it returns, same names in the same
            order, goes on in their place.

    ``features`` holds what passed last: an ordered dict from level name to tensor. With one path the names are the keys of
    the mapping or the indices of the sequence; with several they are prefixed by the path. Used as a context manager the
    tap removes itself, and raises RuntimeError if nothing passed through it. A tap inside a compiled model must be set
    before the first call: torch.compile ignores hooks that are registered later.
    """

    def __init__(self, model: nn.Module, *paths: str, replace: Replace | None = None) -> None:
        if not paths:
            raise ValueError("FeatureTap needs at least one module path, such as 'backbone' or 'head:input'")
        self.paths = paths
        self._replace = replace
        self._seen: dict[str, Features] = {}
        self._handles: list[Any] = []
        bare = unwrap(model)
        for path in paths:
            name, _, side = path.partition(":")
            if side not in ("", "input", "output"):
                raise ValueError(f"path {path!r}: after ':' expected 'input' or 'output', got {side!r}")
            module = _submodule(bare, name)
            if side == "input":
                self._handles.append(module.register_forward_pre_hook(_uncompiled(self._input_hook(path)), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(_uncompiled(self._output_hook(path))))

    def _output_hook(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            features = as_features(output)
            if features is None:
                raise TypeError(f"tap {path!r}: expected (N, C, H, W) features, a sequence or a mapping of them, got {_describe(output)}")
            passed = self._pass(path, features)
            return output if passed is features else _rebuild(output, passed)

        return hook

    def _input_hook(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            for index, value in enumerate(args):
                features = as_features(value)
                if features is not None:
                    passed = self._pass(path, features)
                    return None if passed is features else ((*args[:index], _rebuild(value, passed), *args[index + 1 :]), kwargs)
            for key, value in kwargs.items():
                features = as_features(value)
                if features is not None:
                    passed = self._pass(path, features)
                    return None if passed is features else (args, {**kwargs, key: _rebuild(value, passed)})
            raise TypeError(f"tap {path!r}: no argument holds (N, C, H, W) features, got {_describe(args)}")

        return hook

    def _pass(self, path: str, features: Features) -> Features:
        if self._replace is not None:
            features = self._replace(path, features)
        self._seen[path] = features
        return features

    def level_names(self, path: str, features: Features) -> list[str]:
        """The names under which `features` of `path` stand in ``self.features``."""
        if len(self.paths) == 1:
            return list(features)
        return [path] if len(features) == 1 else [f"{path}.{name}" for name in features]

    @property
    def features(self) -> Features:
        """What passed last, all paths together. Raises RuntimeError naming the paths that saw nothing."""
        missing = [path for path in self.paths if path not in self._seen]
        if missing:
            raise RuntimeError(
                f"nothing passed through {', '.join(map(repr, missing))}: the module was not called since the tap was set or cleared "
                "(inside a compiled model, set the tap before the first call)"
            )
        found: Features = OrderedDict()
        for path in self.paths:
            found.update(zip(self.level_names(path, self._seen[path]), self._seen[path].values(), strict=True))
        return found

    def clear(self) -> None:
        """Forget the features, so that they can be freed."""
        self._seen.clear()

    def remove(self) -> None:
        """Take the tap off the model. The features seen last stay readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self.remove()
        if kind is None:
            _ = self.features


def _submodule(model: nn.Module, path: str) -> nn.Module:
    module = model
    for part in path.split(".") if path else []:
        child = getattr(unwrap(module), part, None)
        if not isinstance(child, nn.Module):
            children = ", ".join(name for name, _ in unwrap(module).named_children()) or "none"
            raise ValueError(f"module path {path!r} not found in {type(model).__name__}: no submodule {part!r} (there are: {children})")
        module = child
    return module


def _uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    # What torch.compiler.disable sets, without importing the compiler (a second and more) into programs that do not compile.
    hook._torchdynamo_disable = True  # type: ignore[attr-defined]
    return hook


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(_describe(item) for item in value)})"
    if isinstance(value, Mapping):
        return f"{type(value).__name__}({', '.join(f'{key}: {_describe(item)}' for key, item in value.items())})"
    return type(value).__name__
