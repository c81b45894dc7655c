"""Show text from prompts and models as it is, without characters that could change or hide parts of the page."""

from __future__ import annotations

import json
import math
import re
from typing import Any

ROUNDING = 1e-9  # smaller numbers are rounding errors of sums
MINUS, NOTHING = "\N{MINUS SIGN}", "\N{EN DASH}"
# C0 and C1 controls but line feed and tab, overrides and isolates of the writing direction, lone surrogates
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def visible(text: object) -> str:
    """The text with control characters written as escapes, such as \\x1b or \\u202e; line breaks and tabs stay."""
    return _HIDDEN.sub(_escape, str(text).replace("\r\n", "\n"))


def clipped(text: str, limit: int) -> str:
    """The first `limit` characters, and the number of the others."""
    left = len(text) - limit
    return text if left <= 0 else f"{text[:limit]} … ({left:,} more characters)"


def number(value: object, digits: int = 3) -> str:
    """A float with `digits` decimals, an integer as it is; a dash for any other value."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace("-", MINUS)
    return decimal(value, digits) if isinstance(value, float) and math.isfinite(value) else NOTHING


def decimal(value: float, digits: int) -> str:
    """A number with `digits` decimals; a smaller one in scientific notation, unless it is a rounding error."""
    if ROUNDING < abs(value) < 0.5 * 10**-digits:
        return scientific(value)
    return f"{value:z,.{digits}f}".replace("-", MINUS)  # z: what rounds to -0 is 0


def scientific(value: object) -> str:
    """A number in scientific notation, such as 4.9e−10; a dash for any other value."""
    if not isinstance(value, float) or not math.isfinite(value):
        return NOTHING
    return "0" if value == 0 else f"{value:.1e}".replace("-", MINUS)


def plain(value: object) -> str:
    """Any value of a JSON tree as one line of text."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, float):
        return f"{value:z.4g}".replace("-", MINUS) if math.isfinite(value) else NOTHING
    if isinstance(value, dict):
        return ", ".join(f"{visible(key).replace('_', ' ')} {plain(child)}" for key, child in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(child) for child in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return NOTHING if value is None else visible(value)


def embeddable(value: Any) -> str:
    """JSON that is safe inside a script element: without tags, the end of the element or line separators."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """The tree with six significant digits, None for infinite numbers and NaN, and visible text."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {visible(key): _finite(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(child) for child in value]
    return visible(value) if isinstance(value, str) else value


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
