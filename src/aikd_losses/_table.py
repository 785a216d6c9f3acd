from .targets import _Table as Table  # noqa: F401
