"""Chroma's metadata filters, with bounds that mean what they say."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Chroma takes floats as they are, and what is left of a fraction for integers.
_OTHER: dict[str, tuple[str, str, Callable[[float], int]]] = {
    "$gt": ("$or", "$gte", math.ceil),
    "$gte": ("$and", "$gt", math.floor),
    "$lt": ("$or", "$lte", math.floor),
    "$lte": ("$and", "$lt", math.ceil),
    "$eq": ("$and", "$ne", math.trunc),
    "$ne": ("$or", "$eq", math.trunc),
}


def exact(where: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rewrite fractions, which Chroma cuts to whole numbers where it compares them with integers.

    >>> exact({"n": {"$gte": 2.5}})
    {'$and': [{'n': {'$gte': 2.5}}, {'n': {'$gt': 2}}]}
    """
    if not isinstance(where, dict) or len(where) != 1:
        return where  # Chroma says what is wrong
    [(key, condition)] = where.items()
    if key in {"$and", "$or"} and isinstance(condition, list):
        return {key: [exact(part) for part in condition]}
    if not isinstance(condition, dict):
        condition = {"$eq": condition}
    if len(condition) != 1:
        return where
    [(operator, bound)] = condition.items()
    if operator in {"$in", "$nin"} and isinstance(bound, list) and any(map(_is_fraction, bound)):
        single, joint = ("$eq", "$or") if operator == "$in" else ("$ne", "$and")
        parts = [_bounded(key, single, item) for item in bound]
        return parts[0] if len(parts) == 1 else {joint: parts}
    return _bounded(key, operator, bound)


def _is_fraction(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and not value.is_integer()


def _bounded(key: str, operator: str, bound: Any) -> dict[str, Any]:
    """Add a condition that makes a fraction right for integers."""
    condition = {key: {operator: bound}}
    if operator not in _OTHER or not _is_fraction(bound):
        return condition
    joint, other, rounded = _OTHER[operator]
    return {joint: [condition, {key: {other: rounded(bound)}}]}
