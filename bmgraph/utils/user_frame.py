"""One-line explanations of tracing errors, with the line of the user's code that caused them."""

from __future__ import annotations

import re
import traceback


def explain(error: Exception) -> str:
    """One line that says what failed, where in the user's model, and what to do."""
    text = str(error)
    kind = type(error).__name__
    where = user_line(text) or user_line(_trace_text(error))
    location = f" at {where}" if where else ""
    if "data-dependent" in text or kind in (
        "GuardOnDataDependentSymNode",
        "UserError",
        "DataDependentOutputException",
    ):
        return (
            f"the model's control flow depends on data{location}: a graph has a single path; replace the Python branch "
            "by torch.where or torch.cond, or decide it outside forward"
        )
    unknown = re.search(r"Found <class '([^']+)'> in output", text)
    if unknown:
        return (
            f"forward returns a {unknown[1]}, which holds no plain tensors: return tensors, or turn it off by a flag in "
            "the example (a KV cache by use_cache=False)"
        )
    if "Couldn't swap" in text:
        return (
            f"forward converts a module of the model{location} (module.to(...)): a graph has one form of each weight; "
            "convert the module before the model is captured, and leave the call out of forward"
        )
    if "tensor has no dimensions" in text and "scaled_dot_product_attention" in _trace_text(error):
        return (
            f"an attention{location} has a scalar as its mask, which torch.export cannot trace: give the mask axes for "
            "queries and keys, mask.reshape(1, 1)"
        )
    first = next((line.strip() for line in text.splitlines() if line.strip()), kind)
    return f"torch.export could not trace the model{location}: {kind}: {first[:300]}"


def user_line(text: str) -> str:
    """The last `file.py:line` of a stack trace outside torch and bmgraph; empty if there is none."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', text)
    outside = [f"{file}:{line}" for file, line in frames if "/torch/" not in file and "/bmgraph/" not in file]
    return outside[-1] if outside else ""


def _trace_text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
